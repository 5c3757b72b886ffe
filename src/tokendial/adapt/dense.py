"""Dense Adapter: bottlenecks beside the FFNs that also read earlier layers' adapters.

Source: Liu et al., "Sparse-Tuning: Adapting Vision Transformers with Efficient Fine-tuning and
Inference", version 3, https://arxiv.org/abs/2405.14700, overview figure and tables VI to XII:

    h_n = W1_n x_n + [n > 1] W2_n S(z_(n-1)) + [n >= start] W3_n S(z_(n-interval))
    z_n = scale * Wup_n ReLU(h_n)
    y_n = x_n + FFN(LN x_n) + z_n

where x_n are the tokens after attention and reduction, and S applies the reductions of later layers
to the features of earlier layers. z_0 are the embedded tokens; as in the authors' code, the adapter
of layer `start` reads them if `start` = `interval`. The variants of tables VI (which features an
adapter reads) and VII (where they are summed) are settings.

Departure: the published parameter counts contain one more vector of width D per layer, whose role
the paper does not explain. By default it is left out (0.8 % of the parameters); `channel_scale`
makes it a learned factor on each channel of z_n.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, init_bottleneck
from tokendial.checks import check_bottleneck, check_choice, check_count
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "dense_adapter")
@dataclass(frozen=True, kw_only=True)
class DenseAdapter(AdapterConfig):
    """Dense Adapter of Sparse-Tuning: bottlenecks that also read the adapters of earlier layers."""

    dim: int = 32
    """Width of each bottleneck."""
    scale: float = 1.0
    """Factor on the output of each adapter, above 0."""
    start: int = 4
    """First layer (counted from 1) whose adapter reads the adapter `interval` layers before it. In
    the paper it is the first layer that reduces tokens. At least `interval`."""
    interval: int = 3
    """Number of layers between an adapter and the earlier adapter that it reads, at least 2."""
    reads: tuple[Literal["previous", "earlier"], ...] = ("previous", "earlier")
    """What each adapter reads besides the tokens of its layer: "previous" is the output of the
    adapter one layer before, "earlier" that of the adapter `interval` layers before."""
    fusion: Literal["input", "inner", "output"] = "inner"
    """Where an adapter sums the features that it reads: "input" before one down-projection, "inner"
    after one down-projection each, "output" after one bottleneck each."""
    channel_scale: bool = False
    """Whether each adapter learns a factor for each channel of its output."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", tuple(self.reads))
        check_bottleneck(self.dim, self.scale)
        for name in self.reads:
            check_choice("reads", name, ("previous", "earlier"))
        check_choice("fusion", self.fusion, ("input", "inner", "output"))
        check_count("interval", self.interval, at_least=2)
        check_count("start", self.start)
        if self.start < self.interval:
            raise ValueError(
                f"start must be at least interval ({self.interval}), got {self.start}."
            )

    def build(self, vit: ViTShape) -> "DenseAdapters":
        """Make one adapter per layer."""
        return DenseAdapters(self, vit)


class DenseAdapters(Adapter):
    """Runs the Dense Adapters, one per layer. `Tokens.carried` holds outputs of earlier layers."""

    def __init__(self, config: DenseAdapter, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        self._reads = tuple(_read_names(config, layer) for layer in range(1, vit.depth + 1))
        furthest = config.interval if "earlier" in config.reads else 1
        self._names = tuple(_carried_name(back) for back in range(furthest, 0, -1))
        for layer in range(1, vit.depth + 1):
            inputs = 1 + len(self._reads[layer - 1])
            downs = 1 if config.fusion == "input" else inputs
            ups = inputs if config.fusion == "output" else 1
            down = nn.ModuleList(nn.Linear(vit.embed_dim, config.dim) for _ in range(downs))
            up = nn.ModuleList(nn.Linear(config.dim, vit.embed_dim) for _ in range(ups))
            for number in range(downs):
                init_bottleneck(down[number], up[min(number, ups - 1)])  # type: ignore[arg-type]
            self.layers.append(nn.ModuleDict({"down": down, "up": up}))
        self.channel_scales = (
            nn.ParameterList(torch.ones(vit.embed_dim) for _ in self.layers)
            if config.channel_scale
            else None
        )

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Carry the embedded tokens to later layers, if the adapter of layer `start` reads them."""
        if layer > 1 or self.config.start > self.config.interval:
            return tokens
        return replace(tokens, carried=tokens.carried | {_carried_name(1): tokens.x})

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return this layer's output, and carry it with the earlier outputs that are still read."""
        config = self.config
        adapter: Any = self.layers[layer - 1]
        inputs, hidden, outs = [tokens.x], [], []
        for name in self._reads[layer - 1]:
            inputs.append(tokens.carried[name])
        if config.fusion == "input":
            inputs = [sum(inputs[1:], start=inputs[0])]
        for linear, x in zip(adapter.down, inputs, strict=True):
            hidden.append(linear(x))
        if config.fusion == "inner":
            hidden = [sum(hidden[1:], start=hidden[0])]
        for linear, h in zip(adapter.up, hidden, strict=True):
            outs.append(linear(h.relu()))
        z = config.scale * sum(outs[1:], start=outs[0])
        if self.channel_scales is not None:
            z = z * self.channel_scales[layer - 1]
        # Every carried output is now one layer further back.
        carried = dict(tokens.carried)
        for further, nearer in pairwise(self._names):
            if nearer in carried:
                carried[further] = carried[nearer]
        carried[self._names[-1]] = z
        return z, carried


def _read_names(config: DenseAdapter, layer: int) -> list[str]:
    """Names of the carried features that the adapter of `layer` reads."""
    names = []
    if layer > 1 and "previous" in config.reads:
        names.append(_carried_name(1))
    if layer >= config.start and "earlier" in config.reads:
        names.append(_carried_name(config.interval))
    return names


def _carried_name(back: int) -> str:
    """Name in `Tokens.carried` of the output of the adapter `back` layers before."""
    return f"dense_adapter-{back}"
