"""What every task provides: how its images are prepared, its loss, and its metrics."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import default_collate

from tokendial.backbones.anatomy import Anatomy
from tokendial.data.transforms.image import PairTransform, Transform
from tokendial.model.dial_vit import DialViT
from tokendial.tune import OptimizedViT


class Metrics(Protocol):
    """Gathers predictions, also of several processes; torchmetrics has this form."""

    def to(self, device: Any) -> Any:
        """Move the sums."""

    def update(self, logits: Tensor, targets: Any) -> None:
        """Take in a batch."""

    def compute(self) -> dict[str, Any]:
        """Each metric by its name."""


class Task(Protocol):
    """What a run learns."""

    num_classes: int

    def eval_batch(self, batch_size: int) -> int:
        """How many samples are evaluated together where `batch_size` are trained on."""

    def train_transform(self, anatomy: Anatomy) -> PairTransform:
        """Vary an image and its target."""

    def eval_transform(self, anatomy: Anatomy) -> PairTransform:
        """Prepare an image and its target without chance."""

    def image_transform(self, anatomy: Anatomy) -> Transform:
        """Prepare an image that has no target."""

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a training batch as a whole."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch."""

    def hits(self, logits: Tensor, targets: Tensor) -> float:
        """Share of right answers in a training batch."""

    def predict(self, model: DialViT | OptimizedViT, images: Tensor) -> Tensor:
        """Logits of images (or videos) that the eval transform has prepared."""

    def metrics(self) -> Metrics:
        """Metrics over an evaluation set; the first of them is what runs are judged by."""


def collate(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """A batch; masks of different sizes stay a list.

    Images of different sizes have to come one by one.
    """
    images, targets = zip(*samples, strict=True)
    if isinstance(targets[0], Tensor) and len({target.shape for target in targets}) > 1:
        return default_collate(list(images)), list(targets)
    return default_collate(list(images)), default_collate(list(targets))
