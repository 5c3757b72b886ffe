"""The interface of a task: how samples are prepared, the loss, the inference and the metrics."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import default_collate

from tokendial.backbones.anatomy import Anatomy
from tokendial.data.transforms.image import PairTransform, Transform
from tokendial.model.dial import InferenceModel


class Metrics(Protocol):
    """Metrics gathered batch by batch, also over several processes, as in torchmetrics."""

    def to(self, device: Any) -> Any:
        """Move the state of the metrics to a device."""

    def update(self, logits: Tensor, targets: Any) -> None:
        """Add the predictions and targets of a batch."""

    def compute(self) -> dict[str, Any]:
        """Return the value of each metric by its name."""


class Task(Protocol):
    """A task that a model is trained for: transforms, loss, inference and metrics."""

    num_classes: int
    """Number of classes, which is the number of logits or of logit maps. 0: there are none."""
    score_name: str
    """Name of the quantity that `batch_score` returns, such as "accuracy"."""

    def eval_batch_size(self, batch_size: int) -> int:
        """Return the number of samples in an evaluation batch, given that of a training batch."""

    def train_transform(self, anatomy: Anatomy) -> PairTransform:
        """Return the random transform of a training sample and its target."""

    def eval_transform(self, anatomy: Anatomy) -> PairTransform:
        """Return the transform, without randomness, of a test sample and its target."""

    def image_transform(self, anatomy: Anatomy) -> Transform:
        """Return the transform, without randomness, of a sample that has no target."""

    def mix_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return a training batch with its samples mixed (mixup, cutmix), if the task does so."""

    def batch_targets(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return what logits are compared with: the targets of the data, or what a teacher says."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch."""

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean loss of logits that learn to be those of a teacher."""

    def batch_score(self, logits: Tensor, targets: Tensor) -> float:
        """Return the score of a training batch, at most 1, such as its accuracy."""

    def predict(self, model: InferenceModel, images: Tensor) -> Tensor:
        """Return the logits of a batch that `eval_transform` or `image_transform` prepared."""

    def metrics(self) -> Metrics:
        """Return new metrics for an evaluation set; the first one selects the best epoch."""


def collate(samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Join samples to a batch. Masks of different sizes become a list instead of a tensor.

    Images in a batch must have one size.
    """
    images, targets = zip(*samples, strict=True)
    if isinstance(targets[0], Tensor) and len({target.shape for target in targets}) > 1:
        return default_collate(list(images)), list(targets)
    return default_collate(list(images)), default_collate(list(targets))
