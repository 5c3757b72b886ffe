"""Training one model at several degrees of the dial in each update."""

import numpy as np
from torch import Tensor, nn

from tokendial.model.dial_vit import DialViT
from tokendial.runs.recipe import DegreesSection
from tokendial.train.objective import Objective


class SeveralDegrees(nn.Module):
    """Runs an objective at one degree after the other, one per call; the first teaches the others.

    Source:
        The sandwich rule and in-place distillation of US-Nets (arXiv 1903.05134), whose widths are
        degrees here.
    """

    def __init__(self, objective: Objective, settings: DegreesSection) -> None:
        """Set up the objective.

        Args:
            objective: Gives the losses at one degree. Its model is at the highest degree to train.
            settings: Which degrees an update runs, and the weight of the task's loss.

        Raises:
            ValueError: If the model has no dial, its reduction method learns to select one share
                of the tokens, or the degrees do not end with the model's.
        """
        super().__init__()
        self.objective, self.settings = objective, settings
        self.highest = _highest_degree(objective.model)
        if settings.each and settings.each[-1] != self.highest:
            raise ValueError(
                f"train.degrees.each must end with the highest degree, train.degree "
                f"{self.highest}, got {list(settings.each)}."
            )
        self.degrees: tuple[int, ...] = (self.highest,)
        """The degrees of the present update, rising."""
        self.number = 0
        """Which of them the next call runs."""
        self._taught: Tensor | None = None

    def mark_trained(self) -> None:
        """Note in the model which degrees it is trained for, so that this is saved with it."""
        reducer = self.objective.model.reducer
        assert reducer is not None
        reducer.trained_degrees = self.settings.each or tuple(range(self.highest + 1))

    def draw_degrees(self, seed: int, update: int) -> None:
        """Draw the degrees of an update; the same numbers give the same degrees everywhere."""
        if self.settings.each:
            self.degrees = self.settings.each
            return
        draw = np.random.default_rng((seed, update))
        if self.settings.sandwich is None:
            self.degrees = (int(draw.integers(self.highest + 1)),)
            return
        between = range(1, self.highest)
        count = min(self.settings.sandwich, len(between))
        chosen = draw.choice(between, size=count, replace=False).tolist() if count else []
        # The highest degree is last: processes exchange gradients then, and it uses every weight.
        self.degrees = (0, *sorted(chosen), self.highest)

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the present degree as its share of the update's mean, and logits."""
        self.objective.model.set_degree(self.degrees[self.number])
        if self.number == 0:
            loss, logits = self.objective(images, targets)
            self._taught = logits.detach()
        else:
            assert self._taught is not None
            loss, logits = self.objective(images, targets, self.settings.task_weight)
            loss = loss + self.objective.task.distillation(logits, self._taught)
        # A low degree may leave weights of the reduction unread, and distributed training expects a
        # gradient of every parameter.
        reducer = self.objective.model.reducer
        assert reducer is not None
        loss = loss + sum(0.0 * weight.sum() for weight in reducer.parameters())
        return loss / len(self.degrees), logits


def _highest_degree(model: DialViT) -> int:
    """The degree that a model is at: the highest one to train.

    Raises:
        ValueError: If the model has no dial to train along.
    """
    reducer = model.reducer
    if reducer is None or model.degree == 0:
        raise ValueError(
            "train.degrees needs a reduction method and a highest degree of at least 1, got "
            f"{'no reduction' if reducer is None else 'train.degree 0'}."
        )
    if reducer.learns_one_share:
        raise ValueError(
            f"train.degrees: {type(model.reduce_config).__name__} learns to select one share of "
            "the tokens, not several; use another method, such as ToMe, EViT or LearntMetric."
        )
    return model.degree
