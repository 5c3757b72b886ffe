"""The forward passes of one training step, as the losses of methods read them."""

# Shape legend: B batch, N tokens, D embed_dim.

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokendial.tokens import Tokens


@dataclass(slots=True)
class ForwardPass:
    """A forward pass as the losses of methods see it."""

    degree: int
    """The degree that it ran at."""
    logits: Tensor
    """[B, num_classes], float32."""
    features: Tensor
    """[B, N, D] tokens after the final norm."""
    tokens: list[Tokens]
    """Tokens that leave each block."""
    feature_map: Tensor | None = None
    """[B, D, rows, columns] that a decoder reads; None without one."""


@dataclass(slots=True)
class TrainingPasses:
    """What the losses of a method read: the passes of one training step."""

    student: ForwardPass
    """The pass at the degree that trains."""
    complete: ForwardPass | None
    """The same model at degree 0, with gradients, if `Reducer.also_runs` asks for it."""
    teacher: ForwardPass | None
    """A trained model's pass, if `Reducer.also_runs` asks for it and there is a teacher."""
    task_loss: Callable[[Tensor], Tensor]
    """The task's loss as a function of logits."""
