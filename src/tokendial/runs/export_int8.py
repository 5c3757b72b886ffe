"""Export of a run with linear layers in 8 bits, unless that costs too much accuracy."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.atomic import atomic_write
from tokendial.export_files import export, model_facts, output_names, write_bundle
from tokendial.extras import check_installed
from tokendial.measure import Interval, mean_difference
from tokendial.model.dial import InferenceModel
from tokendial.model.dial_vit import DialViT
from tokendial.runs.evaluate import evaluate_loader, main_score, validation_set
from tokendial.runs.export_facts import run_facts
from tokendial.runs.image_scores import right_answers
from tokendial.runs.run import Run
from tokendial.runs.stored_logits import collect_logits, scores_of
from tokendial.runtimes import ExportedViT
from tokendial.runtimes.onnxruntime_sessions import open_file, quantized
from tokendial.tasks import Classification, Task


@dataclass(frozen=True, slots=True)
class Int8File:
    """An exported file with 8-bit linear layers, and what it costs on the validation set."""

    path: Path
    """Path of the file."""
    degree: int
    """Degree of the dial that the file runs at."""
    metric: str
    """Name of the run's main metric."""
    before: float
    """The main metric of the model in float32."""
    after: float
    """The main metric of the file."""
    accuracy_lost: Interval | None
    """Accuracy of the model minus that of the file, paired by image. None unless the task is
    classification with one label per image."""


def export_int8(
    run: Run,
    out: Path | None = None,
    *,
    degree: int | None = None,
    max_loss: float = 0.01,
    batch_size: int = 64,
) -> Int8File:
    """Write the best model of a run as an ONNX file whose linear layers compute in 8 bits.

    Products of two activations, such as those that compare tokens, stay in float32. The file runs
    on the validation set before it is kept.

    Args:
        run: A run with a model.
        out: File to write, which ends in .onnx; None: in the folder `export` of the run. An
            existing file is replaced.
        degree: Degree of the dial; None: the one that the model was trained at.
        max_loss: How much of the main metric the file may lose, 0.01 for one point.
        batch_size: Images per forward pass.

    Raises:
        ValueError: If the file loses more than `max_loss` (then nothing is written), `out` has
            another ending, `degree` is not offered or a package is missing.
    """
    if out is not None and out.suffix != ".onnx":
        raise ValueError(f"out must end in .onnx for int8, got {out}.")
    trial = _new_trial(run, max_loss, batch_size)
    degree = trial.model.degree if degree is None else degree
    return trial.write(degree, out or run.folder / "export" / f"degree_{degree}.int8.onnx")


def export_int8_bundle(
    run: Run,
    degrees: Sequence[int],
    out: Path | None = None,
    *,
    max_loss: float = 0.01,
    batch_size: int = 64,
) -> list[Int8File]:
    """Write several degrees as `export_int8` does, in a bundle as `export_bundle` writes it.

    Args:
        run: A run with a model.
        degrees: Degrees of the dial.
        out: Folder to write to; None: `export/int8` in the folder of the run. A bundle in it is
            replaced.
        max_loss: How much of the main metric each degree may lose, 0.01 for one point.
        batch_size: Images per forward pass.

    Raises:
        ValueError: As `export_int8` does. No degree is written if one of them loses too much.
    """
    trial, folder = _new_trial(run, max_loss, batch_size), out or run.folder / "export" / "int8"
    names = {degree: f"degree_{degree}.int8.onnx" for degree in degrees}
    with tempfile.TemporaryDirectory() as written:
        found = [trial.write(degree, Path(written, name)) for degree, name in names.items()]
        folder.mkdir(parents=True, exist_ok=True)
        for name in names.values():
            shutil.copyfile(Path(written, name), folder / name)
    gmacs = {degree: trial.model.cost(degree).gmacs for degree in degrees}
    write_bundle(folder, names, gmacs, {**model_facts(trial.model, output_names()), **trial.facts})
    return [replace(each, path=folder / names[each.degree]) for each in found]


@dataclass(frozen=True, slots=True)
class _Trial:
    """What files in 8 bits are made of and compared with."""

    model: DialViT
    task: Task
    loader: DataLoader[Any]
    facts: Mapping[str, Any]
    max_loss: float

    def write(self, degree: int, out: Path) -> Int8File:
        """Write the file of a degree unless it loses too much."""
        self.model.set_degree(degree)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.onnx")
            export(self.model, file, facts=self.facts)
            session = open_file(file, "int8", next(iter(self.loader))[0].numpy())
            before, right_before = _scores(self.task, self.model, self.loader)
            eight_bits = ExportedViT(self.model.anatomy, {degree: session}, degree)
            after, right_after = _scores(self.task, eight_bits, self.loader)
            metric, lost = next(iter(before)), main_score(before) - main_score(after)
            if lost > self.max_loss:
                raise ValueError(
                    f"int8 loses {100 * lost:.1f} points of {metric} at degree {degree} "
                    f"({100 * main_score(before):.1f} to {100 * main_score(after):.1f}), more than "
                    f"max_loss ({100 * self.max_loss:g}); nothing was written."
                )
            out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(out) as temporary:
                shutil.copyfile(quantized(file), temporary)
        interval = None
        if right_before is not None and right_after is not None:
            interval = mean_difference(right_before, right_after)
        return Int8File(out, degree, metric, main_score(before), main_score(after), interval)


def _new_trial(run: Run, max_loss: float, batch_size: int) -> _Trial:
    check_installed("int8", "onnx", "onnxscript", "onnxruntime")
    model = run.model().eval()
    task, loader = validation_set(run, model, batch_size)
    return _Trial(model, task, loader, run_facts(run, model), max_loss)


def _scores(
    task: Task, model: InferenceModel, loader: DataLoader[Any]
) -> tuple[dict[str, float], Tensor | None]:
    """Metrics over a loader, and for classification whether each image is right (1 or 0)."""
    if not isinstance(task, Classification):
        return evaluate_loader(model, loader, task), None
    degree = model.degree
    logits, labels = collect_logits(model, [degree], loader, task)
    right = None if task.multi_label else right_answers(task, logits[degree], labels)
    return scores_of(task, logits[degree], labels), right
