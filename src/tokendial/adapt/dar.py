"""DAR's adapter: a bottleneck for every token and a convolutional compensator for the patches.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, and the authors' code: both read the un-normalised tokens that enter the FFN; one
learned number per layer scales their sum.
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
    """DAR's adapter: a bottleneck and a convolutional compensator beside the FFN of each layer."""

    dims: tuple[int, int] = (72, 48)
    """Width of the adapter's bottleneck, and number of channels of the compensator."""
    scale: float = 2.0
    """Initial value of the learned factor on the sum of adapter and compensator, above 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))
        if len(self.dims) != 2:
            raise ValueError(f"dims must be two widths (adapter, compensator), got {self.dims}.")
        for dim in self.dims:
            check_bottleneck(dim, self.scale)

    def build(self, vit: ViTShape) -> "DARAdapters":
        """Make an adapter and a compensator per layer."""
        return DARAdapters(self, vit)


class ConvCompensator(nn.Module):
    """Gives a patch that skips the FFN features of its neighbours, by a depthwise convolution."""

    def __init__(self, embed_dim: int, dim: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(embed_dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.up = nn.Conv2d(dim, embed_dim, 1)
        _init_fan_out(self.down)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, patches: Tensor) -> Tensor:
        """Map the grid of patches [B, D, rows, columns] to the same shape."""
        hidden = self.pointwise(self.depthwise(self.down(patches)))
        out: Tensor = self.up(nn.functional.gelu(hidden))
        return out


class DARAdapters(Bottlenecks):
    """Runs DAR's adapters; 195,722 parameters per layer with the default settings and D = 768."""

    needs_grid = True

    def __init__(self, config: DARAdapter, vit: ViTShape) -> None:
        width, channels = config.dims
        super().__init__(vit, width)
        for down in self.down:
            _init_fan_out(down)  # type: ignore[arg-type]  # ModuleList forgets its type
        self.compensators = nn.ModuleList(
            ConvCompensator(vit.embed_dim, channels) for _ in range(vit.depth)
        )
        self.scales = nn.ParameterList(torch.tensor(float(config.scale)) for _ in range(vit.depth))

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the scaled sum of this layer's adapter and compensator."""
        adapted = self.bottleneck(layer, tokens.x)
        patches = from_grid(
            self.compensators[layer - 1](patch_grid(tokens)), tokens.x.shape[1] - tokens.prefix
        )
        prefix, rest = adapted.tensor_split([tokens.prefix], dim=1)
        both = torch.cat([prefix, rest + patches], dim=1)
        return self.scales[layer - 1] * both, tokens.carried


def _init_fan_out(layer: nn.Linear | nn.Conv2d) -> None:
    """Initialise weights by Kaiming's rule with fan-out, and biases by zero, as DAR's code does.

    The layers in the middle of the compensator keep PyTorch's default initialisation.
    """
    nn.init.kaiming_uniform_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has one
