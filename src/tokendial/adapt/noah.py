"""NOAH: prompts, LoRA and adapters in one model, each with a width of its own in every block.

Source: Zhang, Zhou and Liu, "Neural Prompt Search", 2022, https://arxiv.org/abs/2206.04673, section
3, and the authors' code. `NOAH` has fixed widths. `NOAHSupernet` trains the weights of all widths
at once: each forward pass in training draws a subnet, which consists of the first rows or columns
of the weights. `tokendial noah` searches the best subnet, which is then trained anew.

As in the code, a block's prompts take the place of those before it. LoRA has no factor and acts on
queries, keys and values. An adapter after the FFN computes h + up(QuickGELU(down(h))). All matrices
start with a deviation of 0.02, those that other methods start at zero as well.

Departures: the code also holds prompts for the input of the first block, which that block replaces
before anything reads them; here they do not exist and are not counted. A block that has prompts
replaces all that are there; in the code, those before a block without prompts stay, which its
searches never meet.
"""

# Shape legend: B batch, N tokens, D embed_dim, P prompts, R rank.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.adapt.hooks import HookedAdapter, OutputTransform
from tokendial.adapt.peft import check_targets
from tokendial.checks import check_count, check_dropout, check_target_modules
from tokendial.methods import register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens

KINDS = ("prompts", "rank", "dim")
"""The fields that hold widths."""
_DRAWN_PROMPTS = 100
"""Number of prompts that the authors' code draws in each block, whatever number it then uses. The
range of the drawn values depends on it."""
_STD = 0.02


class Widths(NamedTuple):
    """The widths of a subnet, one for each block; 0: none there."""

    prompts: tuple[int, ...]
    """Number of prompts of each block."""
    rank: tuple[int, ...]
    """Rank of LoRA in each block."""
    dim: tuple[int, ...]
    """Width of the adapter in each block."""


@register("adapt", "noah")
@dataclass(frozen=True, kw_only=True)
class NOAH(AdapterConfig):
    """NOAH: prompts, LoRA and adapters, each with a width for every block."""

    prompts: int | Sequence[int] = 5
    """Number of prompt tokens of each block: a list with one number for each block, or one number
    for all. They replace those of the blocks before. A block with 0 keeps those."""
    rank: int | Sequence[int] = 5
    """Rank of LoRA in each block: a list, or one number for all blocks. 0: none there."""
    dim: int | Sequence[int] = 5
    """Width of the adapter after the FFN of each block: a list, or one number for all blocks. 0:
    none there."""
    dropout: float = 0.0
    """Probability of dropout in training, in [0, 1): on prompts, on the input of LoRA, and inside
    the adapters. The authors train with 0.1."""
    target_modules: tuple[str, ...] = ("qkv",)
    """Linear layers that LoRA acts on, each by the last part of its name: qkv, proj, fc1 or fc2 in
    timm's ViTs."""

    def __post_init__(self) -> None:
        for name in KINDS:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
            _check_numbers(name, value, at_least=0)
        if not any(map(any, map(_as_tuple, (self.prompts, self.rank, self.dim)))):
            raise ValueError("prompts, rank and dim must not all be 0: nothing would be trained.")
        _check_rest(self)

    def widths(self, depth: int) -> Widths:
        """Return the widths of each block of a model of `depth` blocks.

        Raises:
            ValueError: If a list does not have one width for each block.
        """
        lists = []
        for name in KINDS:
            value = getattr(self, name)
            lists.append(value if isinstance(value, tuple) else (value,) * depth)
            if len(lists[-1]) != depth:
                raise ValueError(
                    f"{name} must have one width for each of {depth} blocks, got {list(value)}."
                )
        return Widths(*lists)

    def build(self, vit: ViTShape) -> "PromptModules":
        """Make prompts and adapters; LoRA's matrices are made when it is installed.

        Raises:
            ValueError: If a list does not have one width for each block.
        """
        return PromptModules(self, vit)


@register("adapt", "noah_supernet")
@dataclass(frozen=True, kw_only=True)
class NOAHSupernet(AdapterConfig):
    """NOAH's supernet: one set of weights for all widths, to search the best widths with.

    In training, each forward pass draws a subnet from PyTorch's global generator: for each of
    prompts, LoRA and adapters a number of blocks, and a width for each of these blocks, the first
    ones of the model. Otherwise the largest subnet runs, or the one of `PromptModules.use`.
    """

    prompts: Sequence[int] = (1, 5, 10)
    """Numbers of prompts that a block can have, each at least 1."""
    rank: Sequence[int] = (1, 5, 10)
    """Ranks that LoRA can have in a block, each at least 1."""
    dim: Sequence[int] = (1, 5, 10)
    """Widths that the adapter of a block can have, each at least 1."""
    depths: Sequence[int] = (3, 6, 9, 12)
    """How many blocks, from the first on, can have prompts, LoRA or adapters; each at least 1."""
    dropout: float = 0.0
    """Probability of dropout in training, in [0, 1); see `NOAH`."""
    target_modules: tuple[str, ...] = ("qkv",)
    """Linear layers that LoRA acts on, each by the last part of its name; see `NOAH`."""

    def __post_init__(self) -> None:
        for name in (*KINDS, "depths"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name} must be a list of numbers, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
            _check_numbers(name, value, at_least=1)
        _check_rest(self)

    def draw(self, depth: int, choose: Callable[[Sequence[int]], int]) -> NOAH:
        """Return a subnet for a model of `depth` blocks, number by number.

        Args:
            depth: Number of blocks of the model.
            choose: Chooses one of several numbers; `max` gives the largest subnet.
        """
        widths = {}
        for name in KINDS:
            filled = choose(self.depths)
            drawn = [choose(getattr(self, name)) for _ in range(filled)]
            widths[name] = (*drawn, *[0] * (depth - filled))
        return self.subnet(widths)

    def subnet(self, widths: dict[str, tuple[int, ...]]) -> NOAH:
        """Return the method that has these widths and the other settings of the supernet."""
        return NOAH(**widths, dropout=self.dropout, target_modules=self.target_modules)

    def build(self, vit: ViTShape) -> "PromptModules":
        """Make the weights of the largest subnet.

        Raises:
            ValueError: If `depths` has a number above the number of blocks.
        """
        if max(self.depths) > vit.depth:
            raise ValueError(
                f"depths must be at most {vit.depth}, the number of blocks, got {self.depths}."
            )
        return PromptModules(self.draw(vit.depth, max), vit, self)


class PromptModules(HookedAdapter):
    """Runs NOAH.

    It has D parameters for each prompt, (inputs + outputs) * R for LoRA of each layer (4 * D * R
    for timm's `qkv`), and 2 * D * dim + dim + D for each adapter. New prompts change the outputs of
    the model, and so do new matrices.

    A supernet remembers one pass. So where activations are recomputed in the backward pass, that
    of a pass has to run before the next pass.
    """

    adds_prompts = True

    def __init__(self, largest: NOAH, vit: ViTShape, supernet: NOAHSupernet | None = None) -> None:
        super().__init__()
        self.config, self.supernet = largest, supernet
        self.depth, self.embed_dim = vit.depth, vit.embed_dim
        self.largest = self._subnet = largest.widths(vit.depth)
        self._drawn: Widths | None = None
        """The subnet that the present pass drew; None: none was drawn yet."""
        self.prompts, self.lora = nn.ParameterDict(), nn.ModuleDict()
        self.adapters = nn.ModuleDict()
        bound = (6.0 / ((_DRAWN_PROMPTS + 1) * vit.embed_dim)) ** 0.5
        for layer in range(1, vit.depth + 1):
            if count := self.largest.prompts[layer - 1]:
                prompts = torch.empty(count, vit.embed_dim).uniform_(-bound, bound)
                self.prompts[str(layer)] = nn.Parameter(prompts)
            if dim := self.largest.dim[layer - 1]:
                self.adapters[str(layer)] = _Bottleneck(vit.embed_dim, dim, largest.dropout)

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Let LoRA act on its layers in each block that has some.

        Raises:
            ValueError: If the backbone has no linear layer of a name in `target_modules`.
        """
        check_targets(vit, self.config.target_modules)
        for layer, block in enumerate(blocks, 1):
            if not (rank := self.largest.rank[layer - 1]):
                continue
            for name, module in block.named_modules():
                ending = name.rsplit(".", 1)[-1]
                if isinstance(module, nn.Linear) and ending in self.config.target_modules:
                    update = _LowRank(self, layer, module.in_features, module.out_features, rank)
                    self.lora[f"{layer}-{name.replace('.', '-')}"] = update
                    self.act_on(module, update)

    @property
    def active(self) -> Widths:
        """The widths of the subnet that runs."""
        return self._drawn if self.training and self._drawn else self._subnet

    def use(self, subnet: NOAH) -> None:
        """Run a subnet from now on, outside of training: the first rows or columns of the weights.

        Raises:
            ValueError: If a width is larger than that of the weights.
        """
        widths = subnet.widths(self.depth)
        for name, wanted, most in zip(KINDS, widths, self.largest, strict=True):
            if any(width > limit for width, limit in zip(wanted, most, strict=True)):
                raise ValueError(f"{name} must be at most {list(most)}, got {list(wanted)}.")
        self._subnet = widths

    def num_parameters(self, subnet: NOAH) -> int:
        """Return how many parameters a subnet has when it is built on its own."""
        widths = subnet.widths(self.depth)
        prompts = self.embed_dim * sum(widths.prompts)
        adapters = sum(_num_bottleneck(self.embed_dim, dim) for dim in widths.dim if dim)
        updates: list[_LowRank] = list(self.lora.values())  # type: ignore[arg-type]  # a ModuleDict names no type
        lora = sum(widths.rank[update.layer - 1] * update.per_rank for update in updates)
        return prompts + adapters + lora

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Put the prompts of this block, if it has some, in the place of those before."""
        if layer == 1 and self.supernet and self.training:
            self._drawn = self.supernet.draw(self.depth, _choose).widths(self.depth)
        count = self.active.prompts[layer - 1]
        if not _runs(self, count) or str(layer) not in self.prompts:
            return tokens
        if count and (before := self._prompts_before(layer)):
            tokens = tokens.without_prompts(before)
        prompts_BPD = self.prompts[str(layer)][:count].expand(tokens.x.shape[0], -1, -1)
        return tokens.with_prompts(F.dropout(prompts_BPD, self.config.dropout, self.training))

    def after_ffn(self, layer: int, out: Tensor) -> Tensor:
        """Let the adapter of this block, if it has one, act on the output of the FFN."""
        dim = self.active.dim[layer - 1]
        if not _runs(self, dim) or str(layer) not in self.adapters:
            return out
        changed: Tensor = self.adapters[str(layer)](out, dim)
        return changed

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Remove the prompts after the last block."""
        if layer == self.depth and (left := self._prompts_before(self.depth + 1)):
            return tokens.without_prompts(left)
        return tokens

    def _prompts_before(self, layer: int) -> int:
        """Number of prompts that are there when a block begins: those of the last with any."""
        return next((count for count in reversed(self.active.prompts[: layer - 1]) if count), 0)

    def merge(self) -> None:
        """Raise a ValueError: prompts and adapters cannot be merged."""
        Adapter.merge(self)


class _Bottleneck(nn.Module):
    """h + up(QuickGELU(down(h))), with the first `dim` channels in between."""

    def __init__(self, embed_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.down, self.up, self.dropout = (
            nn.Linear(embed_dim, dim),
            nn.Linear(dim, embed_dim),
            dropout,
        )
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, out: Tensor, dim: int) -> Tensor:
        """Map the output of an FFN, [..., D], to [..., D]."""
        hidden = F.linear(out, self.down.weight[:dim], self.down.bias[:dim])
        hidden = F.dropout(hidden * torch.sigmoid(1.702 * hidden), self.dropout, self.training)
        return out + F.linear(hidden, self.up.weight[:, :dim], self.up.bias * bool(dim))


class _LowRank(OutputTransform):
    """Adds LoRA of one layer to its output, with the first rows of `down` and columns of `up`."""

    def __init__(
        self, modules: PromptModules, layer: int, inputs: int, outputs: int, rank: int
    ) -> None:
        super().__init__()
        # In a tuple, so that it does not become a submodule: it holds this one.
        self._modules_of, self.layer, self.per_rank = (modules,), layer, inputs + outputs
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=_STD)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output plus that of the update."""
        (modules,) = self._modules_of
        rank = modules.active.rank[self.layer - 1]
        if not _runs(modules, rank):
            return output
        x = F.dropout(x, modules.config.dropout, self.training)
        hidden = F.linear(x, self.down.weight[:rank])
        return output + F.linear(hidden, self.up.weight[:, :rank])


def _runs(modules: PromptModules, width: int) -> bool:
    """Whether a part of this width has to run.

    In the training of a supernet a part of width 0 runs, too, and adds nothing. So every parameter
    has a gradient in each update, which distributed training relies on.
    """
    return width > 0 or (modules.supernet is not None and modules.training)


def _num_bottleneck(embed_dim: int, dim: int) -> int:
    """Number of parameters of an adapter."""
    return 2 * embed_dim * dim + dim + embed_dim


def _choose(options: Sequence[int]) -> int:
    """Choose one of several numbers by PyTorch's global generator."""
    return options[int(torch.randint(len(options), ()))]


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _check_numbers(name: str, value: object, *, at_least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `at_least`, or a list of some."""
    for number in value if isinstance(value, list | tuple) and value else (value,):
        check_count(name, number, at_least=at_least)


def _check_rest(config: NOAH | NOAHSupernet) -> None:
    """Check the settings that both have, and make `target_modules` a tuple."""
    object.__setattr__(config, "target_modules", tuple(config.target_modules))
    check_dropout("dropout", config.dropout)
    check_target_modules(config.target_modules)
