"""SSF: a learned scale and shift after every layer of the backbone.

Source: Lian et al., "Scaling & Shifting Your Features", NeurIPS 2022,
https://arxiv.org/abs/2210.08823, section 3.2: scale and shift act after each norm, each linear
layer and the patch embedding. By default scales start at 1 and shifts at 0, so that the model
starts unchanged; `init_std=0.02` draws them as the authors' code does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokendial.adapt.base import AdapterConfig
from tokendial.adapt.hooks import HookedAdapter, OutputTransform
from tokendial.checks import check_not_negative
from tokendial.methods import register
from tokendial.shape import ViTShape


@register("adapt", "ssf")
@dataclass(frozen=True, kw_only=True)
class SSF(AdapterConfig):
    """SSF: scale and shift the features after each norm, linear layer and the patch embedding."""

    patch_embedding: bool = True
    """Whether the patch embedding is scaled and shifted too. Some published parameter counts leave
    it out."""
    init_std: float = 0.0
    """Standard deviation of new scales around 1 and of new shifts around 0, at least 0."""

    def __post_init__(self) -> None:
        check_not_negative("init_std", self.init_std)

    def build(self, vit: ViTShape) -> "ScalesAndShifts":
        """Make the adapter; its weights are made when it is installed."""
        return ScalesAndShifts(self)


class ScaleShift(OutputTransform):
    """Computes `scale * output + shift` for the output of a layer, channel by channel."""

    def __init__(self, width: int, dim: int, std: float) -> None:
        super().__init__()
        self.shape = (-1,) + (1,) * (-dim - 1)
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        if std:
            nn.init.normal_(self.scale, mean=1.0, std=std)
            nn.init.normal_(self.shift, std=std)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the scaled and shifted output; `x` is not used."""
        return output * self.scale.view(self.shape) + self.shift.view(self.shape)

    def merged_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the scaled weight, and the scaled and shifted bias."""
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        if bias is None:
            raise ValueError(
                f"SSF cannot be merged: a {type(module).__name__} of the backbone has no bias."
            )
        scale = self.scale.view(-1, *(1,) * (weight.ndim - 1))
        return {"weight": weight * scale, "bias": bias * self.scale + self.shift}


class ScalesAndShifts(HookedAdapter):
    """Runs SSF, with a scale and a shift for each output channel of each layer."""

    is_additive = False

    def __init__(self, config: SSF) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict()

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Act on all layers of the blocks, and on norms and convolutions outside of the blocks."""
        inside = {id(module) for block in blocks for module in block.modules()}
        for name, module in list(vit.named_modules()):
            width, dim = _output(module)
            if isinstance(module, nn.Conv2d) and not self.config.patch_embedding:
                continue
            if width and (id(module) in inside or not isinstance(module, nn.Linear)):
                layer = ScaleShift(width, dim, self.config.init_std)
                self.layers[name.replace(".", "-")] = layer
                self.act_on(module, layer)


def _output(module: nn.Module) -> tuple[int, int]:
    """Return the number of output channels and their dimension; 0 channels for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, nn.Conv2d):
        return module.out_channels, -3
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 1:
        return len(weight), -1  # a norm
    return 0, -1
