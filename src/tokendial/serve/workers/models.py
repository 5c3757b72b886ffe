"""Models with their weights: runs by name, on one backbone; the process that computes has them."""

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokendial.compensate import Compensator
from tokendial.errors import error_message
from tokendial.model.dial_vit import DialViT
from tokendial.model.files import read_files
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.device import default_device
from tokendial.runs.run import Run
from tokendial.serve.workers.facts import Facts, ServedTask, TaskOf, revision_of
from tokendial.serve.workers.token_view import TokenView, seen_image, token_view
from tokendial.tasks import BinaryMasks, Classification, Segmentation, VideoClassification
from tokendial.tune import OptimizedViT, SpeedSettings, apply_speed


@dataclasses.dataclass(slots=True)
class Models:
    """One model in memory that is several: a run each, by adapters on one backbone."""

    facts: Facts
    model: DialViT
    """With an adapter for each name."""
    fast: DialViT | OptimizedViT
    """What runs: the model, or its treated copy."""
    bridge: tuple[Compensator, int] | None
    """What is attached to the model, and the degree that this was trained at."""
    device: str = "cpu"

    def prepare(
        self, speed: SpeedSettings | None = None, *, batch: int = 8, device: str | None = None
    ) -> None:
        """Make them ready to run.

        Args:
            speed: What to do for speed; one run only.
            batch: Images of the batches that it is done for.
            device: Where to compute; None: the accelerator if there is one.

        Raises:
            ValueError: If speed is asked for and there are several runs.
        """
        if speed and len(self.facts.tasks) > 1:
            raise ValueError(
                "optimize, compile and precision are for one run: several take turns in one model."
            )
        self.device = device or default_device()
        if self.device != "cpu":
            self._move()
        if speed:
            example = torch.zeros(batch, *self.facts.input_shape, device=self.device)
            self.fast = apply_speed(self.model, example, speed, self.facts.degrees)

    def _move(self) -> None:
        if self.bridge:
            self.bridge[0].detach(self.model)  # it keeps copies of weights where these were
        self.model.to(self.device)
        if self.bridge:
            plugin, source = self.bridge
            plugin.to(self.device).attach(self.model, source)

    @torch.no_grad()
    def run(self, name: str, degree: int, images: Tensor) -> Tensor:
        """Logits of images [B, 3, H, W], in float32 on the CPU."""
        if len(self.facts.tasks) > 1:
            self.model.set_adapter(self.facts.tasks[name].adapter)
        if self.fast.degree != degree:
            self.fast.set_degree(degree)
        logits = self.facts.tasks[name].task.predict(self.fast, images.to(self.device))
        return logits.float().cpu()

    def view(self, name: str, degree: int, image: Tensor) -> tuple[TokenView, str]:
        """The tokens of an image [3, H, W], and what the model sees of it: a PNG in base64."""
        view = token_view(self.model, image, degree, adapter=self.facts.tasks[name].adapter)
        return view, seen_image(self.model, image)


def load_models(runs: Mapping[str, Run], *, compensator: Path | None = None) -> Models:
    """Put runs into the memory of the CPU, the backbone once.

    Args:
        runs: By the names that they are served under.
        compensator: Folder of a compensator, which turns with the dial.

    Raises:
        ValueError: If a run has no model, cannot be read or served, or does not share the backbone
            and the reduction of the first one.
    """
    if not runs:
        raise ValueError("runs must name at least one run.")
    try:
        return _loaded(runs, compensator)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a file may cause that says something else than it should
        folders = ", ".join(str(run.folder) for run in runs.values())
        raise ValueError(
            f"{folders} cannot be read: {type(error).__name__}: {error_message(error)}"
        ) from error


def _loaded(runs: Mapping[str, Run], compensator: Path | None) -> Models:
    tasks = {name: _task(run) for name, run in runs.items()}
    # Read before the weights, so that weights that change meanwhile are seen by the next reload.
    revisions = {name: revision_of(run) for name, run in runs.items()}
    model, adapters, degrees, bridge = _model(runs, compensator)
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
            run.value_range(),
        )
    return Models(Facts(served, degrees, model.anatomy.input_shape), model, model, bridge)


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
    runs: Mapping[str, Run], compensator: Path | None
) -> tuple[DialViT, dict[str, str], tuple[int, ...], tuple[Compensator, int] | None]:
    """All runs in one model, the names of their adapters in it, the degrees it can be at, and what
    is attached to it."""
    first = next(iter(runs.values()))
    plugin = Compensator.from_pretrained(compensator).eval() if compensator else None
    unreduced = plugin is not None and first.recipe().reduce is None
    model = first.model(plugin.reduce_config if plugin and unreduced else None).eval()
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
        source = sources.pop()
        plugin.attach(model, source)
        offered = degrees_to_show(model, "all", model.degrees[: plugin.steps + 1])
        return model, adapters, tuple(offered), (plugin, source)
    # Each degree is timed when the server starts, and neighbours on a long dial hardly differ.
    return model, adapters, tuple(degrees_to_show(model, "all")), None


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
