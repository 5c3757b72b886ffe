"""What every fine-tuning method provides."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from tokendial.shape import ViTShape
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
    needs_all: ClassVar[bool] = False
    """Whether what it gives one token depends on the others, in whatever order and number."""
    reads_ffn_input: ClassVar[bool] = False
    """Whether `beside_ffn` reads the normalised tokens that enter the FFN."""
    matrices: tuple[str, ...] = ()
    """Names of its parameters that are matrices although they are no layer's weight; weight decay
    acts on them as on those."""
    in_backbone: ClassVar[bool] = False
    """Whether it acts by layers or hooks that it puts into the backbone."""
    adds: bool = True
    """Whether it only adds to the output of a backbone's layer, and what it adds does not depend on
    the layer's weights."""
    merged: bool = False
    """Whether its weights are part of the backbone's at present."""

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Put layers into `vit` in place and choose which of its weights train.

        The backbone is frozen before this is called; the heads are made trainable after it.

        Args:
            vit: The backbone.
            blocks: Its blocks, in order.

        Raises:
            ValueError: If the backbone has not the layers that the method acts on.
        """

    def switch(self, *, on: bool) -> None:
        """Act on the backbone, or leave it alone while another adapter acts."""

    def merge(self) -> None:
        """Put the adapter into the backbone's weights; a ValueError if it is not linear."""
        raise ValueError(
            f"{type(self).__name__} cannot be merged: only LoRA, SSF, FacT and linear methods of "
            "PEFT can."
        )

    def unmerge(self) -> None:
        """Bring back the backbone's own weights."""

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Tokens that enter `layer` (counted from 1), after a reduction before it."""
        return tokens

    def beside_attention(self, layer: int, x_BND: Tensor, tokens: Tokens) -> Tensor | None:
        """What is added to the output of attention, from its normalised input; None: nothing."""
        return None

    def after_ffn(self, layer: int, out: Tensor) -> Tensor:
        """Act on what the FFN adds to the tokens that it processed, [..., D]."""
        return out

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Act on the tokens that enter the FFN of `layer` (after attention and reduction).

        Args:
            layer: The block, counted from 1.
            tokens: The tokens, un-normalised.
            ffn_input: Their normalised features [B, N, D], which the FFN reads; None unless
                `reads_ffn_input`.

        Returns:
            What is added to the output of the block ([B, N, D], or None for nothing), and the
            features to carry on to the next layers.
        """
        return None, tokens.carried

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Tokens that leave `layer`."""
        return tokens


class Bottlenecks(Adapter):
    """One bottleneck per layer: 2 * D * dim + dim + D parameters each, zero at the start."""

    def __init__(self, vit: ViTShape, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.ModuleList(nn.Linear(vit.embed_dim, dim) for _ in range(vit.depth))
        self.up = nn.ModuleList(nn.Linear(dim, vit.embed_dim) for _ in range(vit.depth))
        for down, up in zip(self.down, self.up, strict=True):
            init_bottleneck(down, up)  # type: ignore[arg-type]  # ModuleList forgets its type

    def bottleneck(self, layer: int, x: Tensor) -> Tensor:
        """`scale * up(ReLU(down(x)))` of one layer (counted from 1)."""
        out: Tensor = self.up[layer - 1](self.down[layer - 1](x).relu())
        return self.scale * out


def init_bottleneck(down: nn.Linear, up: nn.Linear) -> None:
    """Initialise a bottleneck so that it starts as zero: Kaiming down, zeros up and biases."""
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(up.weight)
    for linear in (down, up):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
