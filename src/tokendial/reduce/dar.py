"""DAR: a convolution over the token grid selects the tokens that the FFN processes.

Source: "Rethinking Token Reduction with Parameter-Efficient Fine-Tuning in ViT for Pixel-Level
Tasks", CVPR 2025, and the authors' code: the convolution reads the un-normalised tokens after
attention; attention reads all tokens; the adapter and the compensator beside the FFN (`DARAdapter`)
act on all tokens. Departure: inference accepts any batch size and any grid (the authors' code: one
image with a square grid).
"""

# Shape legend: B batch, L patch tokens, D embed_dim, R x C grid.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.methods import register
from tokendial.passes import TrainingPasses
from tokendial.reduce.select import SelectConfig, Selector, selected_patches
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens, patch_grid


@register("reduce", "dar")
@dataclass(frozen=True, kw_only=True)
class DAR(SelectConfig):
    """DAR: each FFN processes the fraction `target_ratio` of the patches; use with `DARAdapter`."""

    def build(self, vit: ViTShape) -> "DARReducer":
        """Make one convolution per layer."""
        return DARReducer(self, vit)


class Dispatcher(nn.Conv2d):
    """A 3x3 convolution to one channel, computed as nine dot products per token.

    PyTorch's convolution would first copy all features into another memory order.
    """

    def forward(self, grid_BDRC: Tensor) -> Tensor:
        """Return the logits [B, 1, R, C]."""
        batch, _, rows, columns = grid_BDRC.shape
        taps = self.weight[0].flatten(1).expand(batch, -1, -1)
        taps_BL9 = grid_BDRC.flatten(2).transpose(1, 2) @ taps
        # Each token sums the products that its neighbours computed for it: map t, shifted by tap t.
        maps_B9RC = taps_BL9.transpose(1, 2).reshape(batch, 9, rows, columns)
        shifts = torch.eye(9, dtype=maps_B9RC.dtype, device=maps_B9RC.device).view(1, 9, 3, 3)
        return F.conv2d(maps_B9RC, shifts, self.bias, padding=1)


class DARReducer(Selector):
    """Runs DAR, with one 3x3 convolution of 9 D + 1 parameters per layer."""

    reads_grid = True

    def __init__(self, config: DAR, vit: ViTShape) -> None:
        super().__init__(config, vit)
        self.dispatchers = nn.ModuleList(
            Dispatcher(vit.embed_dim, 1, 3, padding=1) for _ in range(vit.depth)
        )

    def logits(self, layer: int, tokens: Tokens) -> Tensor:
        """Return the convolution's logits of the patch tokens."""
        logits: Tensor = self.dispatchers[layer - 1](patch_grid(tokens))
        return logits.reshape(-1, tokens.x.shape[1] - tokens.prefix)

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Return the loss on the fraction of processed tokens."""
        target = self.rates[passes.student.degree]
        rate = ada_loss(selected_patches(passes.student), target)
        return {"rate": self.config.ratio_weight * rate}


def ada_loss(selected_BL: Tensor, target: float) -> Tensor:
    """Squared difference of the fraction of selected tokens and the target, mean over images.

    Args:
        selected_BL: Decisions [B, ...] of all layers.
        target: The fraction to reach, in (0, 1].

    Source:
        DAR's code (AdaLoss). DyT's loss takes one fraction of the whole batch instead.
    """
    return torch.mean((selected_BL.flatten(1).mean(dim=1) - target) ** 2)
