"""What the loop asks of what is trained."""

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tokendial.backbones.anatomy import Anatomy
from tokendial.data.splits import Splits
from tokendial.tasks import Task


class Job(Protocol):
    """What is trained, and how: all that the loop does not know."""

    @property
    def data(self) -> Splits:
        """Training and validation set."""

    @property
    def anatomy(self) -> Anatomy:
        """Says what images the model takes."""

    @property
    def task(self) -> Task:
        """Says how images are prepared."""

    @property
    def module(self) -> nn.Module:
        """Its parameters that train are checkpointed and averaged."""

    @property
    def objective(self) -> nn.Module:
        """Gives the loss of (images, targets), and what `hits` reads."""

    @property
    def shows(self) -> str:
        """What the share of hits is called."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets."""

    def before_update(self, update: int, updates_per_epoch: int) -> None:
        """Told how many updates were done."""

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a training batch as a whole."""

    def hits(self, outputs: Tensor, targets: Tensor) -> float:
        """Share of right answers in a training batch."""

    def scores(self, loader: DataLoader[Any], accelerator: Accelerator) -> dict[str, float]:
        """Metrics over the validation set; the first one is what models are judged by."""

    def save(self, folder: Path) -> None:
        """Write what was trained."""
