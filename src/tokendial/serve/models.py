"""What is served: runs by name, on one backbone; images in, classes or masks out."""

import csv
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from tokendial.compensate import Compensator
from tokendial.data.transforms import Transform
from tokendial.saving import CONFIG, WEIGHTS, read_files
from tokendial.serve.controller import Rules
from tokendial.serve.costs import Costs, measured_costs
from tokendial.speed import Optimized, Speed, sped_up
from tokendial.tasks import BinaryMasks, Classification, Segmentation, VideoClassification
from tokendial.train.evaluate import default_device
from tokendial.train.predict import mask_image, mask_share
from tokendial.train.runs import Run
from tokendial.vit import DialViT

ServedTask = Classification | BinaryMasks | Segmentation


@dataclasses.dataclass(frozen=True, slots=True)
class Classes:
    """Classes of an image, most probable first."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """The mask of an image, of its size."""

    png: bytes
    """Probabilities as grey levels, or class indices with a palette."""
    share: float
    """Share of the pixels that lie inside, or that are of any class but the first."""


@dataclasses.dataclass(frozen=True, slots=True)
class TaskOf:
    """What one name stands for."""

    task: ServedTask
    classes: tuple[str, ...]
    transform: Transform
    adapter: str
    """Its name in the model."""
    revision: str
    """Begins the hash of its weights and configuration."""
    gmacs: Mapping[int, float]
    """Multiply-accumulates of an image at each degree, in 1e9."""
    accuracy: Mapping[int, float]
    """At the degrees where `tokendial eval` has measured it."""


@dataclasses.dataclass(slots=True)
class Served:
    """One model in memory that is several: a run each, by adapters on one backbone.

    `run`, `measured` and what is done with `model` belong to one thread at a time, that of the
    engine once it runs; the rest is for any.
    """

    tasks: Mapping[str, TaskOf]
    """What each name stands for; the first one is the default."""
    model: DialViT
    """With an adapter for each name."""
    fast: DialViT | Optimized
    """What runs: the model, or its treated copy."""
    degrees: tuple[int, ...]
    """Of the dial, as far as a compensator reaches."""
    device: str
    runs: Mapping[str, Run]
    """Where they were read."""
    again: Callable[[], "Served"]
    """Reads them anew."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models."""
        return tuple(self.tasks)

    def ladder(self, max_degree: int | None, min_accuracy: float | None) -> tuple[int, ...]:
        """Degrees that the controller may use.

        Args:
            max_degree: The last of them; None: any.
            min_accuracy: The least accuracy, as `tokendial eval` found it, of every model.

        Raises:
            ValueError: If there is no such degree, or accuracies are not known.
        """
        last = self.degrees[-1]
        if max_degree is not None and max_degree not in self.degrees:
            raise ValueError(f"max_degree must lie in [0, {last}], got {max_degree}.")
        allowed = [d for d in self.degrees if max_degree is None or d <= max_degree]
        if min_accuracy is None:
            return tuple(allowed)
        for name, task in self.tasks.items():
            if missing := [degree for degree in allowed if degree not in task.accuracy]:
                raise ValueError(
                    f"min_accuracy needs the accuracy of {name} at degree {missing[0]}: run "
                    "`tokendial eval` on it first."
                )
            allowed = [degree for degree in allowed if task.accuracy[degree] >= min_accuracy]
        if not allowed:
            raise ValueError(f"min_accuracy: no degree reaches {min_accuracy:g}.")
        return tuple(allowed)

    def prepare(self, name: str, image: Image.Image) -> Tensor:
        """What the model sees of an RGB image, [3, H, W]."""
        return self.tasks[name].transform(image)

    @torch.no_grad()
    def run(self, name: str, degree: int, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each image."""
        self._turn_to(name, degree)
        batch = torch.stack(list(images)).to(self.device)
        logits = self.tasks[name].task.predict(self.fast, batch)
        return list(logits.float().cpu())

    def answer(
        self, name: str, logits: Tensor, size: tuple[int, int], top: int = 5
    ) -> Classes | Mask:
        """What logits say.

        Args:
            name: Of the model.
            logits: Of an image, as `run` gives them.
            size: Height and width of the image.
            top: How many classes to name, if there are as many.
        """
        of = self.tasks[name]
        if not isinstance(of.task, Classification):
            mask = mask_image(of.task, logits, size)
            return Mask(_png(mask), mask_share(of.task, mask))
        likely = of.task.probabilities(logits.unsqueeze(0))[0]
        values, indices = likely.topk(min(top, len(of.classes)))
        names = tuple(of.classes[index] for index in indices.tolist())
        return Classes(names, tuple(values.tolist()))

    def kind(self, name: str) -> Literal["classes", "masks"]:
        """What it gives."""
        return "classes" if isinstance(self.tasks[name].task, Classification) else "masks"

    def measured(self, rules: Rules, degrees: Sequence[int]) -> Costs:
        """How long batches take here, on random images."""
        draw = torch.Generator().manual_seed(0)
        shape = self.model.anatomy.input_shape
        image = torch.randn(shape, generator=draw)

        def seconds(name: str, degree: int, images: int) -> float:
            began = time.perf_counter()
            self.run(name, degree, [image] * images)
            return time.perf_counter() - began

        within = rules.slo_s / 2
        return measured_costs(seconds, self.names, degrees, most=rules.max_batch, within_s=within)

    def reload(self, between_batches: Callable[[Callable[[], None]], Future[None]]) -> list[str]:
        """Read runs that have changed on disk since, while the old ones go on answering.

        For that time the model is in memory twice.

        Args:
            between_batches: `Engine.call`.

        Returns:
            Names of those that have changed.

        Raises:
            ValueError: If one cannot be read any more, or is another kind of model now; everything
                stays as it was.
        """
        changed = [name for name, run in self.runs.items() if _revision(run) != self.revision(name)]
        if not changed:
            return []
        fresh = self.again()
        for name in changed:
            if (fresh._outside(name), fresh.degrees) != (self._outside(name), self.degrees):
                raise ValueError(f"{name} is another kind of model now: restart the server.")

        def take() -> None:
            self.tasks, self.model, self.fast = fresh.tasks, fresh.model, fresh.fast

        between_batches(take).result()
        return changed

    def revision(self, name: str) -> str:
        """Begins the hash of its weights and configuration."""
        return self.tasks[name].revision

    def classes(self, name: str) -> tuple[str, ...]:
        """Names of its classes."""
        return self.tasks[name].classes

    def gmacs(self, name: str, degree: int) -> float:
        """Multiply-accumulates of an image, in 1e9."""
        return self.tasks[name].gmacs[degree]

    def accuracy(self, name: str, degree: int) -> float | None:
        """As `tokendial eval` measured it last; None: it did not."""
        return self.tasks[name].accuracy.get(degree)

    def _outside(self, name: str) -> tuple[Any, ...]:
        """What clients and waiting requests rely on."""
        return self.kind(name), self.classes(name), self.model.anatomy.input_shape

    def _turn_to(self, name: str, degree: int) -> None:
        if len(self.tasks) > 1:
            self.model.set_adapter(self.tasks[name].adapter)
        if self.fast.degree != degree:
            self.fast.set_degree(degree)


def load_served(
    runs: Mapping[str, Run],
    *,
    compensator: Path | None = None,
    speed: Speed = Speed.plain,
    batch: int = 8,
    device: str | None = None,
) -> Served:
    """Put runs into memory, the backbone once.

    Args:
        runs: By the names that they are served under.
        compensator: Folder of a compensator, which turns with the dial.
        speed: What to do for speed; one run only.
        batch: Images of the batches that it is done for.
        device: Where to compute; None: the accelerator if there is one.

    Raises:
        ValueError: If a run has no model, cannot be served or does not share the backbone and the
            reduction of the first one, or a setting does not go with several runs.
    """
    if not runs:
        raise ValueError("runs must name at least one run.")
    if speed is not Speed.plain and len(runs) > 1:
        raise ValueError("optimize and compile are for one run: several take turns in one model.")
    tasks = {name: _task(run) for name, run in runs.items()}
    on = device or default_device()
    # Read before the weights, so that weights that change meanwhile are seen by the next reload.
    revisions = {name: _revision(run) for name, run in runs.items()}
    model, adapters, degrees = _model(runs, compensator, on)
    fast: DialViT | Optimized = model
    if speed is not Speed.plain:
        example = torch.zeros(batch, *model.anatomy.input_shape, device=on)
        fast = sped_up(model, example, speed, degrees)
    served = {}
    for name, run in runs.items():
        model.set_adapter(adapters[name])
        served[name] = TaskOf(
            tasks[name],
            run.classes(),
            tasks[name].image_transform(model.anatomy),
            adapters[name],
            revisions[name],
            {degree: model.cost(degree).gmacs for degree in degrees},
            _accuracy(run, bridged=compensator is not None),
        )
    again = partial(
        load_served, runs, compensator=compensator, speed=speed, batch=batch, device=device
    )
    return Served(served, model, fast, degrees, on, runs, again)


def _task(run: Run) -> ServedTask:
    """What a run learnt, if it can be served."""
    task = run.task()
    if isinstance(task, VideoClassification):
        raise ValueError(f"{run.folder} is a run on videos; what can be served are runs on images.")
    if not isinstance(task, Classification | BinaryMasks | Segmentation):
        raise ValueError(f"{run.folder}: a {type(task).__name__} cannot be served.")
    if not isinstance(task, Classification) and task.augment.test != "whole":
        raise ValueError(
            f"{run.folder}: dense.augment.test must be whole to be served, it is "
            f"{task.augment.test}: one request would be any number of windows."
        )
    return task


def _model(
    runs: Mapping[str, Run], compensator: Path | None, device: str
) -> tuple[DialViT, dict[str, str], tuple[int, ...]]:
    """All runs in one model, the names of their adapters in it, and the degrees it can be at."""
    first = next(iter(runs.values()))
    plugin = Compensator.from_pretrained(compensator).to(device).eval() if compensator else None
    unreduced = plugin is not None and first.recipe().reduce is None
    model = first.model(plugin.reduce_config if plugin and unreduced else None).to(device).eval()
    sources = {0 if unreduced else model.degree}
    adapters = dict.fromkeys(runs, model.active_adapter)
    for name, run in list(runs.items())[1:]:
        adapters[name] = f"run {name}"
        model.load_adapter(adapters[name], run.best)
        _, config, _ = read_files(run.best, kind="model")
        sources.add(config["degree"])
    if plugin:
        if len(sources) > 1:
            told = ", ".join(map(str, sorted(sources)))
            raise ValueError(f"compensator: runs were trained at different degrees ({told}).")
        plugin.attach(model, sources.pop())
    return model, adapters, model.degrees[: plugin.steps + 1] if plugin else model.degrees


def _revision(run: Run) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        path = run.best / name
        if not path.is_file():
            raise ValueError(f"{run.folder} has no finished epoch yet, so there is no model.")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _accuracy(run: Run, *, bridged: bool) -> dict[int, float]:
    """By degree, as `tokendial eval` has written it."""
    path = run.folder / "eval" / ("bridged.csv" if bridged else "degrees.csv")
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # What runs are judged by stands after the degree, or, with a compensator, under its own name.
    judged = "accuracy" if bridged else list(rows[0])[1]
    return {int(row["degree"]): float(row[judged]) for row in rows}


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
