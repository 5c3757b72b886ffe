"""Dense Adapter: bottlenecks beside the FFNs that also read earlier layers' adapters.

Source: Liu et al., "Sparse-Tuning: Adapting Vision Transformers with Efficient Fine-tuning and
Inference", version 3, https://arxiv.org/abs/2405.14700, overview figure and tables VI to XII:

    h_n = W1_n x_n + [n > 1] W2_n S(z_(n-1)) + [n >= start] W3_n S(z_(n-interval))
    z_n = scale * Wup_n ReLU(h_n)
    y_n = x_n + FFN(LN x_n) + z_n

where x_n are the tokens after attention and reduction, and S makes the features of earlier layers
follow the reductions since. Departure: the published parameter counts have one more vector of
width D per layer, whose role the paper does not tell; it is left out (0.8 % of the parameters).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, check_bottleneck, init_bottleneck
from tokendial.methods import register
from tokendial.reduce.base import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "dense_adapter")
@dataclass(frozen=True, kw_only=True)
class DenseAdapter(AdapterConfig):
    """Dense Adapters of Sparse-Tuning, one in each layer."""

    dim: int = 32
    """Width of the bottleneck."""
    scale: float = 1.0
    """Factor on the branch."""
    start: int = 4
    """First layer that reads the adapter `interval` layers back (the first reducing layer in the
    paper)."""
    interval: int = 3
    """How many layers back the long connection reaches."""

    def __post_init__(self) -> None:
        check_bottleneck(self.dim, self.scale)
        if type(self.interval) is not int or self.interval < 2:
            raise ValueError(f"interval must be an integer of at least 2, got {self.interval}.")
        if type(self.start) is not int or self.start <= self.interval:
            raise ValueError(
                f"start must be an integer above the interval ({self.interval}), got {self.start}."
            )

    def build(self, vit: ViTShape) -> "DenseAdapters":
        """Make the modules."""
        return DenseAdapters(self, vit)


class DenseAdapters(Adapter):
    """Runs the Dense Adapters of all layers."""

    def __init__(self, config: DenseAdapter, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        for layer in range(1, vit.depth + 1):
            inputs = 1 + (layer > 1) + (layer >= config.start)
            down = nn.ModuleList(nn.Linear(vit.embed_dim, config.dim) for _ in range(inputs))
            up = nn.Linear(config.dim, vit.embed_dim)
            for linear in down:
                init_bottleneck(linear, up)  # type: ignore[arg-type]  # ModuleList forgets its type
            self.layers.append(nn.ModuleDict({"down": down, "up": up}))

    def beside_ffn(self, layer: int, tokens: Tokens) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The adapter of this layer; carries on its output and those it still needs."""
        adapter = self.layers[layer - 1]
        inputs = [tokens.x]
        if layer > 1:
            inputs.append(tokens.carried[_name(1)])
        if layer >= self.config.start:
            inputs.append(tokens.carried[_name(self.config.interval)])
        downs = zip(adapter["down"], inputs, strict=True)  # type: ignore[index]
        hidden = sum(down(x) for down, x in downs)
        z = self.config.scale * adapter["up"](F.relu(hidden))  # type: ignore[index]
        carried = dict(tokens.carried)
        for back in range(self.config.interval, 1, -1):
            if _name(back - 1) in carried:
                carried[_name(back)] = carried[_name(back - 1)]
        return z, carried | {_name(1): z}


def _name(back: int) -> str:
    """Key of the carried output of the Dense Adapter `back` layers back."""
    return f"dense_adapter-{back}"
