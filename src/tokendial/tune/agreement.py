"""Agreement of a model that removes tokens with the same model when it removes none."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendial.reduce.base import kl_divergence
from tokendial.tune.cost_meters import ScheduledModel
from tokendial.tune.schedules import Schedule


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement with the unreduced model, as a mean over images (and labels, if multi-label)."""

    divergence: float
    """Kullback-Leibler divergence from the softmax of the unreduced model, in nats."""
    top1: float
    """Fraction of images with the same top class, or of labels with the same answer."""


class AgreementMeter:
    """Measures the agreement of schedules on some images."""

    def __init__(
        self,
        scheduled_model: ScheduledModel,
        images: Sequence[Tensor],
        *,
        multi_label: bool = False,
    ) -> None:
        """Compute the logits of the unreduced model, to compare with.

        Args:
            scheduled_model: The model to run by different schedules.
            images: Batches [B, 3, H, W] on the device of the model.
            multi_label: Whether an image can have several labels; each is compared by itself.
        """
        self.scheduled_model, self.images, self.multi_label = scheduled_model, images, multi_label
        self.logits = self._logits(scheduled_model.space.none)

    def __call__(self, schedule: Schedule) -> Agreement:
        """Run all images by `schedule`, and compare."""
        return compare_logits(self._logits(schedule), self.logits)

    @torch.no_grad()
    def _logits(self, schedule: Schedule) -> Tensor:
        model = self.scheduled_model.use(schedule)
        logits = torch.cat([model(batch).float() for batch in self.images])
        return binary_logits(logits) if self.multi_label else logits


def compare_logits(logits_BK: Tensor, unreduced_BK: Tensor) -> Agreement:
    """Compare logits with those of the unreduced model."""
    same = logits_BK.argmax(dim=1) == unreduced_BK.argmax(dim=1)
    return Agreement(float(kl_divergence(logits_BK, unreduced_BK)), float(same.float().mean()))


def binary_logits(logits_BK: Tensor) -> Tensor:
    """Turn multi-label logits into [B * K, 2], one row per label.

    The softmax of a row is the sigmoid of the label and its complement.
    """
    return torch.stack([logits_BK, torch.zeros_like(logits_BK)], dim=-1).flatten(0, 1)
