"""Fitting a run: schedules for its best model, found on its training images, become a dial."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import images_in, read_image
from tokendial.methods import from_json
from tokendial.model.dial_vit import DialViT
from tokendial.runs.device import default_device
from tokendial.runs.run import Run
from tokendial.tasks import Classification, VideoClassification
from tokendial.tune import DTYPES, FitResult, Precision, fit

FIT = "fit.json"


def fit_run(
    run: Run,
    out: Path,
    budgets: dict[str, list[float]],
    *,
    reduce: str | None = None,
    calibration: Path | None = None,
    images: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    precision: Precision = "fp32",
    device: str | None = None,
    minutes: float = 5.0,
    note: Callable[[str], None] = lambda text: None,
) -> FitResult:
    """Fit the best model of a run, and write it with the dial that was found.

    Args:
        run: A run of classification of images.
        out: Folder for the saved model, which is used like a run itself; made if it is missing.
        budgets: One of speedup, latency_ms and gmacs, with its values; see `tokendial.fit`.
        reduce: tome or evit; None: the run's own, or tome if it has none.
        calibration: Folder of pictures to judge on; None: the run's training images, not varied.
        images: How many to draw, at most.
        seed: Of the draw.
        batch_size: Images of a batch.
        precision: Arithmetic that is timed.
        device: Where to compute; None: the accelerator if there is one.
        minutes: For everything.
        note: Told what is being done.

    Raises:
        ValueError: If the run is of another kind, images are not there, `out` holds something else,
            or see `tokendial.fit`.
    """
    task = run.task()
    if not isinstance(task, Classification) or isinstance(task, VideoClassification):
        raise ValueError(f"{run.folder} must be a run of classification of images, to be fitted.")
    if out.exists() and not (out / FIT).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is there already and holds no fit.")
    model = run.model().to(device or default_device(), DTYPES[precision])
    drawn = _drawn(run, task, model, calibration, images, seed)
    fitted = fit(
        model,
        drawn,
        speedup=budgets.get("speedup"),
        latency_ms=budgets.get("latency_ms"),
        gmacs=budgets.get("gmacs"),
        reduce=from_json("reduce", {"name": reduce}) if reduce else None,
        multi_label=task.multi_label,
        batch_size=batch_size,
        minutes=minutes,
        note=note,
    )
    _write(run, fitted, out)
    return fitted


def _drawn(
    run: Run, task: Classification, model: DialViT, folder: Path | None, count: int, seed: int
) -> Tensor:
    """Images [N, 3, H, W] in an order by chance, prepared without chance."""
    if count < 1:
        raise ValueError(f"images must be at least 1, got {count}.")
    transform = task.image_transform(model.anatomy)
    generator = torch.Generator().manual_seed(seed)

    def some(total: int) -> list[int]:
        return torch.randperm(total, generator=generator)[:count].tolist()

    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"calibration: no such folder: {folder}.")
        files = images_in(folder)
        if not files:
            raise ValueError(f"calibration: {folder} holds no images.")
        value_range = run.value_range()
        drawn = [read_image(files[index], value_range) for index in some(len(files))]
        return torch.stack([transform(image) for image in drawn])
    try:
        train: Any = run.data().train
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} Other pictures can be given by calibration.") from None
    return torch.stack([transform(train[index][0]) for index in some(len(train))])


def _write(run: Run, fitted: FitResult, out: Path) -> None:
    """A saved model, with the recipe and the classes that make it a run."""
    model = run.model(fitted.reduce)
    recipe, written = run.recipe(), Run(out)
    train = recipe.train.model_copy(update={"degree": None})
    changed = {"reduce": fitted.reduce, "output": str(out), "train": train}
    out.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (out / FIT, json.dumps(fitted.to_json(), indent=2) + "\n"),
        (written.classes_file, run.classes_file.read_text()),
        (written.recipe_file, recipe.model_copy(update=changed).to_yaml()),
    ):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    model.save_pretrained(out)
