"""The interface of fine-tuning methods, and the bottleneck that several of them share.

A method consists of a config (`AdapterConfig`), which users write down, and a module (`Adapter`),
which the config builds for a backbone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


class AdapterConfig(ABC):
    """Settings of a fine-tuning method. Subclasses are registered frozen dataclasses."""

    @abstractmethod
    def build(self, vit: ViTShape) -> "Adapter":
        """Make the module that runs the method in a backbone of this shape.

        Raises:
            ValueError: If the settings do not fit the backbone.
        """


class Adapter(nn.Module):
    """Holds the weights of a fine-tuning method, and applies them at its hooks.

    A method overrides the hooks that it needs; the others change nothing. A new adapter leaves the
    outputs of the model unchanged (except `VPT`, `NOAH`, `ResTuning` and `SynQT`).
    """

    needs_grid: bool = False
    """Whether the adapter reads the patch tokens as a complete grid. Reductions that remove tokens
    are then refused."""
    depends_on_other_tokens: bool = False
    """Whether the adapter's output for one token depends on the other tokens."""
    adds_prompts: bool = False
    """Whether the adapter adds prompt tokens."""
    asks_blocks: bool = False
    """Whether `ask_block` is called: the adapter sends queries of its own through the blocks."""
    replaces_class_token: bool = False
    """Whether the adapter puts a feature of its own into the place of the class token after the
    last block. Models whose head reads anything else are then refused."""
    reads_ffn_input: bool = False
    """Whether `beside_ffn` reads the normalised tokens that enter the FFN."""
    decayed_parameters: tuple[str, ...] = ()
    """Names of the adapter's parameters that weight decay treats like the weight of a layer. Other
    parameters that are no layer's weight have no weight decay."""
    in_backbone: bool = False
    """Whether the adapter works by layers or hooks that it puts into the backbone."""
    is_additive: bool = True
    """Whether the adapter only adds something to the outputs of the backbone's layers, and this
    does not depend on the weights of these layers. A merged compensator needs that."""
    merged: bool = False
    """Whether the adapter is merged into the backbone's weights at present."""

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Put layers or hooks into the backbone in place, and choose which of its weights train.

        All weights of the backbone are frozen before the call. The heads become trainable after it.

        Args:
            vit: The backbone.
            blocks: The blocks of the backbone, in order.

        Raises:
            ValueError: If the backbone lacks layers that the method needs.
        """

    def switch(self, *, on: bool) -> None:
        """Start or stop acting on the backbone, because adapters of one model take turns."""

    def merge(self) -> None:
        """Merge the adapter into the backbone's weights.

        Raises:
            ValueError: If the method cannot be merged, because it is not linear.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be merged into the backbone's weights: only LoRA, SSF, "
            "FacT and linear methods of PEFT can."
        )

    def unmerge(self) -> None:
        """Undo `merge`: restore the backbone's own weights exactly."""

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the tokens that enter `layer` (counted from 1), after a reduction before it."""
        return tokens

    def ask_block(
        self, layer: int, tokens: Tokens, ask: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Send queries through a block beside its tokens, if `asks_blocks` is set.

        Args:
            layer: The block, counted from 1.
            tokens: The tokens that enter the block, un-normalised.
            ask: Runs the frozen block on queries [B, Q, D], which read the keys and values of the
                tokens, while no token reads them. Returns what attention adds to the queries and
                what the FFN then adds to these sums, [B, Q, D] each.

        Returns:
            What later blocks find in `Tokens.aside`.
        """
        return tokens.aside

    def beside_attention(self, layer: int, x_BND: Tensor, tokens: Tokens) -> Tensor | None:
        """Return what is added to the output of attention, [B, N, D], or None for nothing.

        Args:
            layer: The block, counted from 1.
            x_BND: The normalised tokens that attention reads.
            tokens: The tokens that enter the block, un-normalised.
        """
        return None

    def after_ffn(self, layer: int, out: Tensor) -> Tensor:
        """Return the output of the FFN of `layer`, [..., D], as the adapter changes it."""
        return out

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return what is added beside the FFN of `layer`, from the tokens that enter the FFN.

        Args:
            layer: The block, counted from 1.
            tokens: The tokens after attention and reduction, un-normalised.
            ffn_input: Their normalised features [B, N, D], which the FFN reads; None unless
                `reads_ffn_input`.

        Returns:
            What is added to the output of the block ([B, N, D], or None for nothing), and the
            carried features that the next layers get (`Tokens.carried`).
        """
        return None, tokens.carried

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the tokens that leave `layer`."""
        return tokens


class Bottlenecks(Adapter):
    """One bottleneck per layer, with 2 * D * dim + dim + D parameters each.

    A new bottleneck returns zeros.
    """

    def __init__(
        self, vit: ViTShape, dim: int, scale: float = 1.0, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.down = nn.ModuleList(nn.Linear(vit.embed_dim, dim) for _ in range(vit.depth))
        self.up = nn.ModuleList(nn.Linear(dim, vit.embed_dim) for _ in range(vit.depth))
        for down, up in zip(self.down, self.up, strict=True):
            init_bottleneck(down, up)  # type: ignore[arg-type]  # ModuleList forgets its type

    def bottleneck(self, layer: int, x: Tensor) -> Tensor:
        """Return `scale * up(dropout(ReLU(down(x))))` of one layer (counted from 1)."""
        hidden = F.dropout(self.down[layer - 1](x).relu(), self.dropout, self.training)
        out: Tensor = self.up[layer - 1](hidden)
        return self.scale * out


class ResidualBottleneck(nn.Module):
    """x + up(GELU(down(x))), with 2 * D * dim + dim + D parameters."""

    def __init__(self, embed_dim: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(embed_dim, dim), nn.Linear(dim, embed_dim)
        self.activation, self.drop = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [..., D] to [..., D], with dropout after both layers."""
        hidden = self.drop(self.activation(self.down(x)))
        out: Tensor = x + self.drop(self.up(hidden))
        return out


def init_bottleneck(down: nn.Linear, up: nn.Linear) -> None:
    """Initialise a bottleneck that returns zeros: Kaiming for `down`, zeros for `up` and biases."""
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(up.weight)
    for linear in (down, up):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
