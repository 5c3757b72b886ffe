"""Dry runs: two updates of a recipe, to see that it works before a long training."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Subset

from tokendial.measure.neighbours import MIN_IMAGES
from tokendial.runs.recipe import BaseRecipe
from tokendial.train.job import Job
from tokendial.train.loop import Trainer

_UPDATES = 2


@dataclass(frozen=True, slots=True)
class DryRun:
    """The result of a dry run."""

    metrics: dict[str, Any]
    """Record of its only epoch: the training loss, and scores on one batch or a few images."""
    seconds: float
    """Seconds that the dry run took, with start and evaluation."""


def dry_run(recipe: BaseRecipe, make_job: Callable[[Any], Any]) -> DryRun | None:
    """Train for two updates, evaluate one batch per process, save to a temporary folder.

    Args:
        recipe: The recipe to try.
        make_job: Makes the job of the recipe: `FineTuning` or `CompensatorTraining`.

    Returns:
        The result. None in all processes but the main one.

    Raises:
        ValueError: If training itself would raise one.
    """
    start = time.perf_counter()
    settings = recipe.train
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "output": str(Path(folder) / "run"),
            "train": settings.model_copy(update={"epochs": 1, "workers": 0}),
        }
        short = recipe.model_copy(update=changes)
        job: Job = make_job(short)
        batch = settings.batch_size * Accelerator().num_processes
        _shorten_data(job, train=_UPDATES * settings.accumulate * batch, val=max(batch, MIN_IMAGES))
        trainer = Trainer(short, job, quiet=True)
        records = trainer.run_to_end().metrics()
    if not trainer.is_main:
        return None
    return DryRun(records[0], time.perf_counter() - start)


def _shorten_data(job: Any, *, train: int, val: int) -> None:
    """Cut the data of a job to their first samples, at most `train` and `val` of them."""
    data = job.data
    job.data = replace(
        data,
        train=Subset(data.train, range(min(train, len(data.train)))),
        val=Subset(data.val, range(min(val, len(data.val)))),
    )
