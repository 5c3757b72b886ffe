"""DAR's adapter: a bottleneck for every token and a convolutional compensator for the patches.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, and the authors' code: both read the un-normalised tokens that enter the FFN;
their sum is scaled by one learned number per layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokendial.adapt.base import AdapterConfig, Bottlenecks
from tokendial.checks import check_bottleneck
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens, from_grid, patch_grid


@register("adapt", "dar")
@dataclass(frozen=True, kw_only=True)
class DARAdapter(AdapterConfig):
    """Adapter and compensator beside the FFN of each layer."""

    dims: tuple[int, int] = (72, 48)
    """Widths of the adapter's and of the compensator's bottleneck."""
    scale: float = 2.0
    """First value of the learned factor on both."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))
        if len(self.dims) != 2:
            raise ValueError(f"dims must be two widths (adapter, compensator), got {self.dims}.")
        for dim in self.dims:
            check_bottleneck(dim, self.scale)

    def build(self, vit: ViTShape) -> "DARAdapters":
        """Make the modules."""
        return DARAdapters(self, vit)


class Compensator(nn.Module):
    """Brings back what the neighbours of a skipped patch know; the token grid stays complete."""

    def __init__(self, embed_dim: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(embed_dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.up = nn.Conv2d(dim, embed_dim, 1)
        _init_by_outputs(self.down)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, D, rows, columns] to the same."""
        hidden = self.pointwise(self.depthwise(self.down(patches)))
        out: Tensor = self.up(nn.functional.gelu(hidden))
        return out


class DARAdapters(Bottlenecks):
    """Runs the adapters of all layers; 195,722 parameters each for D = 768 with DAR's widths."""

    needs_grid = True

    def __init__(self, config: DARAdapter, vit: ViTShape) -> None:
        width, narrow = config.dims
        super().__init__(vit, width)
        for down in self.down:
            _init_by_outputs(down)  # type: ignore[arg-type]  # ModuleList forgets its type
        self.compensators = nn.ModuleList(
            Compensator(vit.embed_dim, narrow) for _ in range(vit.depth)
        )
        self.scales = nn.ParameterList(torch.tensor(float(config.scale)) for _ in range(vit.depth))

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The branch of this layer."""
        adapted = self.bottleneck(layer, tokens.x)
        patches = from_grid(
            self.compensators[layer - 1](patch_grid(tokens)), tokens.x.shape[1] - tokens.prefix
        )
        prefix, rest = adapted.tensor_split([tokens.prefix], dim=1)
        both = torch.cat([prefix, rest + patches], dim=1)
        return self.scales[layer - 1] * both, tokens.carried


def _init_by_outputs(layer: nn.Linear | nn.Conv2d) -> None:
    """Kaiming's initialisation by the number of outputs, with biases of zero, as DAR's code has it.

    The layers between the first and the last one of its compensator start as PyTorch's do.
    """
    nn.init.kaiming_uniform_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has one
