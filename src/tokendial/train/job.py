"""The interface between the training loop and its jobs."""

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokendial.backbones.anatomy import Anatomy
from tokendial.data.splits import Splits
from tokendial.tasks import Task


class Job(Protocol):
    """Everything about a training that the loop does not know: data, model, loss, metrics."""

    @property
    def data(self) -> Splits:
        """The training and the validation set."""

    @property
    def anatomy(self) -> Anatomy:
        """Describes the images that the model takes: size, mean and standard deviation."""

    @property
    def task(self) -> Task:
        """The task, whose transforms prepare the images and targets."""

    @property
    def module(self) -> nn.Module:
        """The module whose trainable parameters are checkpointed and averaged."""

    @property
    def objective(self) -> nn.Module:
        """The module that is called with (images, targets). It returns the loss, and the outputs
        that `batch_score` reads."""

    @property
    def score_name(self) -> str:
        """Name of the quantity that `batch_score` returns, such as "accuracy"."""

    @property
    def passes(self) -> int:
        """How often the objective is called with each batch; the gradients add up."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer."""

    def before_update(self, update: int, updates_per_epoch: int) -> None:
        """Prepare the next update, for example for a schedule.

        Args:
            update: Updates that are finished, counted over the whole run.
            updates_per_epoch: Updates in one epoch.
        """

    def before_pass(self, number: int) -> None:
        """Prepare the next call of the objective.

        Args:
            number: Number of the call with the present batch, from 0 to `passes` - 1.
        """

    def augment_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a training batch as a whole, as mixup does; return images and targets."""

    def batch_score(self, outputs: Tensor, targets: Tensor) -> float:
        """Score of a training batch, at most 1, such as its accuracy."""

    def validation_scores(
        self, loader: DataLoader[Any], accelerator: Accelerator
    ) -> dict[str, float]:
        """Metrics over the validation set. The first one decides which model is the best."""

    def save(self, folder: Path) -> None:
        """Save the present model."""
