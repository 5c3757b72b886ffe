"""The forward passes of one training step, which the losses of methods read."""

# Shape legend: B batch, N tokens, D embed_dim.

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokendial.tokens import Tokens


@dataclass(slots=True)
class ForwardPass:
    """Results of one forward pass."""

    degree: int
    """The degree of the dial during the pass."""
    logits: Tensor
    """[B, num_classes] logits, float32; with a decoder [B, num_classes, h, w]."""
    features: Tensor
    """[B, N, D] tokens of the last block after the final norm."""
    tokens: list[Tokens]
    """The tokens that leave each block, in order."""
    feature_map: Tensor | None = None
    """[B, D, rows, columns] features that the decoder reads; None without a decoder."""


@dataclass(slots=True)
class TrainingPasses:
    """The forward passes of one training step."""

    student: ForwardPass
    """The pass of the model that trains, at the degree that trains."""
    complete: ForwardPass | None
    """The pass of the same model at degree 0, with gradients; None unless "complete" is one of the
    reducer's `extra_passes`."""
    teacher: ForwardPass | None
    """The pass of a trained model; None unless `Reducer.extra_passes` names it and the recipe has a
    teacher."""
    task_loss: Callable[[Tensor], Tensor]
    """Computes the loss of the task from logits, against the targets of this step."""
