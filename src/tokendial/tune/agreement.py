"""How much a model that removes tokens agrees with itself when it removes none."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendial.reduce.base import divergence
from tokendial.tune.cost_meters import ScheduledModel
from tokendial.tune.schedules import Schedule


@dataclass(frozen=True, slots=True)
class Agreement:
    """With the model that removes nothing, mean over images (and labels, where there are many)."""

    divergence: float
    """Kullback-Leibler divergence from its softmax, in nats."""
    top1: float
    """Share of images whose most probable class, or of labels whose answer, is the same."""


class AgreementMeter:
    """Tells the agreement of schedules on some images."""

    def __init__(
        self, tried: ScheduledModel, images: Sequence[Tensor], *, multi_label: bool = False
    ) -> None:
        """Run the model that removes nothing.

        Args:
            tried: The model.
            images: Batches [B, 3, H, W], which lie where the model does.
            multi_label: Whether any number of classes can be right at once.
        """
        self.tried, self.images, self.multi_label = tried, images, multi_label
        self.logits = self._logits(tried.space.none)

    def __call__(self, schedule: Schedule) -> Agreement:
        """Run all images by `schedule`."""
        return compared(self._logits(schedule), self.logits)

    @torch.no_grad()
    def _logits(self, schedule: Schedule) -> Tensor:
        model = self.tried.turn(schedule)
        logits = torch.cat([model(batch).float() for batch in self.images])
        return two_way(logits) if self.multi_label else logits


def compared(logits_BK: Tensor, unreduced_BK: Tensor) -> Agreement:
    """Agreement of logits with those of the model that removes nothing."""
    same = logits_BK.argmax(dim=1) == unreduced_BK.argmax(dim=1)
    return Agreement(float(divergence(logits_BK, unreduced_BK)), float(same.float().mean()))


def two_way(logits_BK: Tensor) -> Tensor:
    """Labels by themselves: [B * K, 2], whose softmax is the sigmoid of each and what it leaves."""
    return torch.stack([logits_BK, torch.zeros_like(logits_BK)], dim=-1).flatten(0, 1)
