"""What every fine-tuning method provides."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from tokendial.reduce.base import ViTShape
from tokendial.tokens import Tokens


class AdapterConfig(ABC):
    """Settings of a fine-tuning method; subclasses are registered frozen dataclasses."""

    @abstractmethod
    def build(self, vit: ViTShape) -> "Adapter":
        """Make the module that runs.

        Raises:
            ValueError: If the settings do not fit the backbone.
        """


class Adapter(nn.Module):
    """Owns the weights of a fine-tuning method, and says where they act.

    Every hook does nothing unless a method overrides it, and a fresh adapter leaves the model's
    outputs unchanged.
    """

    needs_grid: ClassVar[bool] = False
    """Whether it reads the patches as a map, which no reduction may have thinned out."""

    def install(self, vit: nn.Module) -> None:
        """Put layers into `vit` in place and choose which of its weights train.

        The backbone is frozen before this is called; the heads are made trainable after it.
        """

    def beside_ffn(self, layer: int, tokens: Tokens) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Act on the tokens that enter the FFN of `layer` (after attention and reduction).

        Returns:
            What is added to the output of the block ([B, N, D], or None for nothing), and the
            features to carry on to the next layers.
        """
        return None, tokens.carried


def init_bottleneck(down: nn.Linear, up: nn.Linear) -> None:
    """Initialise a bottleneck so that it starts as zero: Kaiming down, zeros up and biases."""
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(up.weight)
    for linear in (down, up):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def check_bottleneck(dim: int, scale: float) -> None:
    """Raise a ValueError unless the width and the scale of a bottleneck make sense."""
    if type(dim) is not int or dim < 1:
        raise ValueError(f"dim must be an integer of at least 1, got {dim}.")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise ValueError(f"scale must be a number above 0, got {scale}.")
