"""A few updates of a recipe, to see that it runs before it is left alone for days."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Subset

from tokendial.runs.recipe import BaseRecipe
from tokendial.train.job import Job
from tokendial.train.loop import Trainer

_UPDATES = 2


@dataclass(frozen=True, slots=True)
class DryRun:
    """What was seen."""

    metrics: dict[str, Any]
    """The record of the one short epoch: loss, scores on one batch."""
    seconds: float
    """For all of it, start and evaluation included."""


def dry_run(recipe: BaseRecipe, make_job: Callable[[Any], Any]) -> DryRun | None:
    """Train for two updates, evaluate on one batch of each process, save; nothing is kept.

    Args:
        recipe: A recipe whose data are at hand.
        make_job: `FineTuning` or `Compensating`.

    Returns:
        What was seen; None in all processes but the first.

    Raises:
        ValueError: As training itself does.
    """
    start = time.perf_counter()
    settings = recipe.train
    with tempfile.TemporaryDirectory() as folder:
        short = {
            "output": str(Path(folder) / "run"),
            "train": settings.model_copy(update={"epochs": 1, "workers": 0}),
        }
        few = recipe.model_copy(update=short)
        job: Job = make_job(few)
        images = settings.batch_size * Accelerator().num_processes
        _shorten(job, images, _UPDATES * settings.accumulate * images)
        trainer = Trainer(few, job, quiet=True)
        records = trainer.run_to_end().metrics()
    if not trainer.main:
        return None
    return DryRun(records[0], time.perf_counter() - start)


def _shorten(job: Any, val: int, train: int) -> None:
    """Leave a job the first samples of its data; all of them if there are no more."""
    data = job.data
    job.data = replace(
        data,
        train=Subset(data.train, range(min(train, len(data.train)))),
        val=Subset(data.val, range(min(val, len(data.val)))),
    )
