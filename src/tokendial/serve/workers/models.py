"""Models with their weights: one backbone, and an adapter and a head for each run."""

import csv
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokendial.cascade import Cascade, CascadeStages
from tokendial.compensate import Compensator
from tokendial.errors import error_message
from tokendial.model.dial import InferenceModel
from tokendial.model.dial_vit import DialViT
from tokendial.model.files import read_files
from tokendial.runs.compensated import load_to_compensate
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.device import default_device
from tokendial.runs.run import Run
from tokendial.runtimes import PLAIN, Runtime
from tokendial.serve.workers.catalog import ModelCatalog, ServedModel, ServedTask
from tokendial.serve.workers.token_view import TokenView, model_input_png, token_view
from tokendial.tasks import BinaryMasks, Segmentation, VideoClassification


@dataclasses.dataclass(slots=True)
class LoadedModels:
    """The served models in the memory of one process."""

    catalog: ModelCatalog
    """Description of the models."""
    model: DialViT
    """The wrapped backbone, with one adapter for each served model."""
    fast_model: InferenceModel
    """The model that runs batches: `model` itself, or what the runtime made of it."""
    bridge: tuple[Compensator, int] | None
    """The compensator attached to `model`, and the degree that the model was trained at."""
    device: str = "cpu"
    """Device that the models run on."""

    def prepare(
        self,
        runtime: Runtime = PLAIN,
        *,
        batch: int = 8,
        device: str | None = None,
        folder: Path | None = None,
        calibration: Callable[[DialViT], Tensor] | None = None,
    ) -> Runtime:
        """Move the models to their device and start the runtime.

        Args:
            runtime: Where and how to compute; other than plain PyTorch for a single run only.
            batch: Number of images of the batches to optimise for.
            device: Device to run on; None: the accelerator if there is one, else the CPU.
            folder: Where exported files are kept for the next start; None: they are not kept.
            calibration: Reads the images that 8-bit files are calibrated on, see `Runtime.start`.

        Returns:
            The runtime that computes, which is the fastest one if `runtime` is "auto".

        Raises:
            ValueError: If a runtime is asked for and there are several runs, it cannot start, or it
                computes in another way than in the calibration of the cascade.
        """
        if runtime and len(self.catalog.models) > 1:
            raise ValueError(
                "runtime, optimize, compile and precision are for one run: several runs share one "
                "model."
            )
        for model in self.catalog.models.values():
            if model.cascade is not None:
                model.cascade.check_numerics(runtime.numerics)
        self.device = device or default_device()
        if self.device != "cpu":
            self._move()
        example = torch.zeros(batch, *self.catalog.input_shape, device=self.device)
        chosen, self.fast_model = runtime.choose_and_start(
            self.model,
            example,
            degrees=self.catalog.degrees,
            folder=folder,
            calibration=calibration,
            mixed_sizes=True,
        )
        return chosen

    def _move(self) -> None:
        if self.bridge:
            # An attached compensator keeps copies of weights on the device where they were.
            self.bridge[0].detach(self.model)
        self.model.to(self.device)
        if self.bridge:
            compensator, source = self.bridge
            compensator.to(self.device).attach(self.model, source)

    @torch.no_grad()
    def run(self, name: str, degree: int, images: Tensor) -> Tensor:
        """Return the logits of images [B, 3, H, W], in float32 on the CPU."""
        self._use(name, degree)
        task = self.catalog.models[name].task
        return task.predict(self.fast_model, images.to(self.device)).float().cpu()

    @torch.no_grad()
    def run_with_embeddings(self, name: str, degree: int, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the embeddings [B, D] of images, in float32 on the CPU."""
        self._use(name, degree)
        # What tasks predict for images of one size is the logits of the model.
        logits, embeddings = self.fast_model.logits_and_embeddings(images.to(self.device))
        return logits.float().cpu(), embeddings.float().cpu()

    def _use(self, name: str, degree: int) -> None:
        """Switch to a model and a degree."""
        if len(self.catalog.models) > 1:
            self.model.set_adapter(self.catalog.models[name].adapter)
        if self.fast_model.degree != degree:
            self.fast_model.set_degree(degree)

    def view(self, name: str, degree: int, image: Tensor) -> tuple[TokenView, str]:
        """Return the tokens of a normalised image [3, H, W], and the image as base64 of a PNG."""
        view = token_view(self.model, image, degree, adapter=self.catalog.models[name].adapter)
        return view, model_input_png(self.model, image)


def load_models(
    runs: Mapping[str, Run], *, compensator: Path | None = None, cascade: bool = False
) -> LoadedModels:
    """Load runs into the memory of the CPU, the backbone once.

    Args:
        runs: The runs by the names that they are served under.
        compensator: Folder of a compensator, which adapts the model to each degree.
        cascade: Whether to load the cascade of the run.

    Raises:
        ValueError: If a run has no model, cannot be read or served, or does not share the backbone
            and the reduction of the first run; or if a cascade is asked for and there are several
            runs, a compensator, or no cascade for these weights.
    """
    if not runs:
        raise ValueError("runs must name at least one run.")
    if cascade and (len(runs) > 1 or compensator):
        raise ValueError("cascade is for one run without a compensator.")
    try:
        return _load(runs, compensator, cascade)
    except (ValueError, OSError):
        raise
    except Exception as error:  # a damaged file can cause any error
        folders = ", ".join(str(run.folder) for run in runs.values())
        raise ValueError(
            f"{folders} cannot be read: {type(error).__name__}: {error_message(error)}"
        ) from error


def _load(runs: Mapping[str, Run], compensator: Path | None, cascade: bool) -> LoadedModels:
    tasks = {name: _served_task(run) for name, run in runs.items()}
    # The revision is read before the weights. If weights change in between, the catalog has the
    # old revision, and the next reload reads the new weights.
    revisions = {name: run.revision() for name, run in runs.items()}
    model, adapters, degrees, bridge = _build_model(runs, compensator)
    stages = None
    if cascade:
        ((name, run),) = runs.items()
        stages = _stages(run, model, revisions[name])
        degrees = tuple(sorted({*degrees, *stages.degrees}))
    models = {}
    for name, run in runs.items():
        model.set_adapter(adapters[name])
        models[name] = ServedModel(
            tasks[name],
            run.classes(),
            tasks[name].image_transform(model.anatomy),
            adapters[name],
            revisions[name],
            {degree: model.cost(degree).gmacs for degree in degrees},
            _measured_accuracy(run, bridged=compensator is not None),
            run.value_range(),
            stages,
        )
    catalog = ModelCatalog(models, degrees, model.anatomy.input_shape)
    return LoadedModels(catalog, model, model, bridge)


def _stages(run: Run, model: DialViT, revision: str) -> CascadeStages:
    """The calibrated cascade of a run; a ValueError if there is none for its weights."""
    stages = Cascade.load(model, run.cascade_file, revision=revision).stages
    if stages.calibration is None:
        raise ValueError(f"{run.cascade_file} is not calibrated; run `tokendial cascade`.")
    return stages


def _served_task(run: Run) -> ServedTask:
    """The task of a run; a ValueError if it cannot be served."""
    task = run.task()
    if isinstance(task, VideoClassification) or not isinstance(task, ServedTask):
        raise ValueError(f"{run.folder} is a run on videos; only runs on images can be served.")
    if isinstance(task, BinaryMasks | Segmentation) and task.augment.test != "whole":
        raise ValueError(
            f"{run.folder}: dense.augment.test must be whole to be served, it is "
            f"{task.augment.test}: one request could need any number of windows."
        )
    return task


def _build_model(
    runs: Mapping[str, Run], compensator: Path | None
) -> tuple[DialViT, dict[str, str], tuple[int, ...], tuple[Compensator, int] | None]:
    """Load all runs into one model.

    Returns:
        The model, the name of each run's adapter in it, the degrees to offer, and the attached
        compensator with its source degree.
    """
    first = next(iter(runs.values()))
    plugin = Compensator.from_pretrained(compensator).eval() if compensator else None
    model = (load_to_compensate(first, plugin) if plugin else first.model()).eval()
    sources = {model.degree}
    adapters = dict.fromkeys(runs, model.active_adapter)
    for name, run in list(runs.items())[1:]:
        adapters[name] = f"run {name}"
        model.load_adapter(adapters[name], run.best)
        _, config, _ = read_files(run.best, kind="model")
        sources.add(config["degree"])
    bridge = None
    if plugin:
        if len(sources) > 1:
            listed = ", ".join(map(str, sorted(sources)))
            raise ValueError(f"compensator: runs were trained at different degrees ({listed}).")
        bridge = plugin, sources.pop()
        plugin.attach(model, bridge[1])
    # Each degree is timed at start-up, and neighbouring degrees of a long dial hardly differ.
    return model, adapters, tuple(degrees_to_show(model, "all")), bridge


def _measured_accuracy(run: Run, *, bridged: bool) -> dict[int, float]:
    """Accuracy by degree, from the table that `tokendial eval` has written."""
    path = run.folder / "eval" / ("bridged.csv" if bridged else "degrees.csv")
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # The main metric is the column after the degree; with a compensator it is called accuracy.
    metric = "accuracy" if bridged else list(rows[0])[1]
    return {int(row["degree"]): float(row[metric]) for row in rows}
