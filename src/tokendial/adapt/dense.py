"""Dense Adapter: bottlenecks beside the FFNs that also read earlier layers' adapters.

Source: Liu et al., "Sparse-Tuning: Adapting Vision Transformers with Efficient Fine-tuning and
Inference", version 3, https://arxiv.org/abs/2405.14700, overview figure and tables VI to XII:

    h_n = W1_n x_n + [n > 1] W2_n S(z_(n-1)) + [n >= start] W3_n S(z_(n-interval))
    z_n = scale * Wup_n ReLU(h_n)
    y_n = x_n + FFN(LN x_n) + z_n

where x_n are the tokens after attention and reduction, and S makes the features of earlier layers
follow the reductions since; z_0 are the embedded tokens, which the adapter of layer `start` =
`interval` reads as the authors' code lets it. The variants of tables VI (which features an adapter
reads) and VII (where they are summed up) are settings. The published parameter counts have one more
vector of width D per layer, whose role the paper does not tell. By default it is left out (0.8 % of
the parameters); `channel_scale` gives it the role of a learned factor on each channel of z_n.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig, init_bottleneck
from tokendial.checks import check_bottleneck, check_choice
from tokendial.methods import register
from tokendial.shape import ViTShape
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
    reads: tuple[Literal["previous", "earlier"], ...] = ("previous", "earlier")
    """What an adapter reads besides its layer's tokens: the previous layer's adapter, and the one
    `interval` layers back."""
    fusion: Literal["input", "inner", "output"] = "inner"
    """Where the features are summed up: before one down-projection, after one each, or after a
    whole bottleneck each."""
    channel_scale: bool = False
    """Whether to learn a factor for each channel of an adapter's output."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", tuple(self.reads))
        check_bottleneck(self.dim, self.scale)
        for name in self.reads:
            check_choice("reads", name, ("previous", "earlier"))
        check_choice("fusion", self.fusion, ("input", "inner", "output"))
        if type(self.interval) is not int or self.interval < 2:
            raise ValueError(f"interval must be an integer of at least 2, got {self.interval}.")
        if type(self.start) is not int or self.start < self.interval:
            raise ValueError(
                f"start must be an integer of at least the interval ({self.interval}), "
                f"got {self.start}."
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
        self._reads = tuple(_read_names(config, layer) for layer in range(1, vit.depth + 1))
        furthest = config.interval if "earlier" in config.reads else 1
        self._names = tuple(_name(back) for back in range(furthest, 0, -1))
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
        """Carries the embedded tokens on where a later adapter reads them."""
        if layer > 1 or self.config.start > self.config.interval:
            return tokens
        return replace(tokens, carried=tokens.carried | {_name(1): tokens.x})

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The adapter of this layer; carries on its output and those it still needs."""
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
        names.append(_name(1))
    if layer >= config.start and "earlier" in config.reads:
        names.append(_name(config.interval))
    return names


def _name(back: int) -> str:
    """Key of the carried output of the Dense Adapter `back` layers back."""
    return f"dense_adapter-{back}"
