"""Blocks of a model that stays as it is, run under the dial: what `attach` puts into them.

The model's own forward pass calls its blocks one after another. Under the dial, a block hands on
features of every position, so nothing around it notices; but it remembers the reduced tokens, and
when the next block is called with those features, it goes on with the reduced tokens.
"""

import functools
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokendial.adapt.base import Adapter
from tokendial.attention import PYTORCH_KERNEL
from tokendial.backbones import Anatomy
from tokendial.model.blocks import BlockRunner
from tokendial.reduce.base import Reducer
from tokendial.tokens import Tokens

_INPUTS = ("hidden_states", "x", "q_x", "input")
"""Names of a block's first argument, in the libraries whose blocks can be dialed."""
_NO_ADAPTER = Adapter()


class _Passage(threading.local):
    """Where the present forward pass of a ViT is. Each thread has its own."""

    layer: int = 0
    """The block that ran last, counted from 1; 0: no pass is under way."""
    tokens: Tokens | None = None
    """The reduced tokens that left it."""
    shown: Tensor | None = None
    """The features of every position that it returned."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Passage":
        return _Passage()

    def __reduce__(self) -> tuple[type["_Passage"], tuple[()]]:
        return _Passage, ()


class TowerDial:
    """The dial of one ViT inside of a model: its reduction, its degree, and its present pass."""

    def __init__(self, anatomy: Anatomy, reducer: Reducer) -> None:
        self.anatomy = anatomy
        """The parts of the ViT."""
        self.reducer = reducer
        """The reduction method."""
        self.degree = reducer.degree
        """The degree of the dial."""
        self.counts: list[int] | None = None
        """If it is a list, blocks add the number of tokens that leave them."""
        self.passage = _Passage()

    def run(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a block on the reduced tokens.

        Args:
            layer: The block, counted from 1.
            block: The block as it was called, which may be a replica of the model's own.
            args: Positional arguments of the call.
            kwargs: Named arguments of the call.

        Returns:
            Features of every position, [B, P, D]; NotImplemented if the call is not part of a
            forward pass through all blocks, such as a call of a single block.
        """
        x, args, kwargs = _split_call(args, kwargs)
        anatomy, passage = self.anatomy, self.passage
        if layer == 1:
            _check_call(block, anatomy.vit, kwargs)
            tokens = self._entering(x)
        elif passage.layer == layer - 1 and passage.tokens is not None:
            tokens = passage.tokens
            if x is not passage.shown:  # changed between the blocks, or moved to another device
                tokens = tokens.with_restored(self._patches_last(x))
        else:
            return NotImplemented
        tokens = replace(tokens, rope=anatomy.rope_in_call(*args, **kwargs))
        if getattr(block, "_is_replica", False):  # of torch.nn.DataParallel
            anatomy = anatomy.with_block(block)
        runner = BlockRunner(anatomy, self.reducer, self.degree, _NO_ADAPTER, PYTORCH_KERNEL)
        tokens = runner.run(layer, tokens).tokens
        if self.counts is not None:
            self.counts.append(tokens.x.shape[1])
        shown = self._suffix_last(tokens.restore_positions())
        if layer == len(self.anatomy.blocks):
            passage.layer, passage.tokens, passage.shown = 0, None, None
        else:
            passage.layer, passage.tokens, passage.shown = layer, tokens, shown
        return shown

    def _entering(self, x_BPD: Tensor) -> Tokens:
        """Tokens that enter the first block."""
        prefix = self.anatomy.shape.num_prefix_tokens
        # No method without weights reads rows and columns, and blocks do not know them.
        grid = (1, x_BPD.shape[1] - prefix)
        return Tokens(self._patches_last(x_BPD), prefix, grid).with_tracking(follow_fused=False)

    def _patches_last(self, x_BPD: Tensor) -> Tensor:
        """Move tokens that stand behind the patches before them. Attention ignores the order."""
        if not (suffix := self.anatomy.num_suffix_tokens):
            return x_BPD
        before = self.anatomy.shape.num_prefix_tokens - suffix
        prefix, patches, after = x_BPD.tensor_split([before, x_BPD.shape[1] - suffix], dim=1)
        return torch.cat([prefix, after, patches], dim=1)

    def _suffix_last(self, x_BPD: Tensor) -> Tensor:
        """The inverse of `_patches_last`."""
        if not (suffix := self.anatomy.num_suffix_tokens):
            return x_BPD
        before = self.anatomy.shape.num_prefix_tokens - suffix
        prefix, after, patches = x_BPD.tensor_split([before, before + suffix], dim=1)
        return torch.cat([prefix, patches, after], dim=1)


def _split_call(args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, tuple[Any, ...], Any]:
    """The tokens that a block is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = next(name for name in _INPUTS if name in kwargs)
    return kwargs[name], (), {other: v for other, v in kwargs.items() if other != name}


def _check_call(block: nn.Module, vit: Any, kwargs: Any) -> None:
    """Raise a ValueError if the forward pass wants something that the dial cannot give."""
    config = getattr(vit, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ValueError(
            "output_attentions must be False above degree 0: attention maps of reduced tokens "
            "have no row for each position."
        )
    checkpoints = getattr(block, "gradient_checkpointing", False) and block.training
    if (checkpoints or getattr(vit, "grad_checkpointing", False)) and torch.is_grad_enabled():
        raise ValueError(
            "gradient checkpointing must be off above degree 0: the blocks that the backward pass "
            "runs again would not find their reduced tokens."
        )


class DialedBlock(nn.Module):
    """Mixed into the class of a block: at degree 0 the block's own code runs."""

    tower_dial: TowerDial
    """The dial of the ViT that the block belongs to."""
    tower_layer: int
    """Place of the block in the ViT, counted from 1."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block under the dial."""
        if self.tower_dial.degree:
            out = self.tower_dial.run(self.tower_layer, self, args, kwargs)
            if out is not NotImplemented:
                return out
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made while the program runs: a copy makes it again from the block's own.
        return _empty_block, (own_class(self),), self.__dict__


@functools.cache
def dialed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a block with `DialedBlock` mixed in; it has the same name."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (DialedBlock, cls), names)


def own_class(block: nn.Module) -> type[nn.Module]:
    """The class that a dialed block had before."""
    cls: type[nn.Module] = type(block).__bases__[1]
    return cls


def _empty_block(cls: type[nn.Module]) -> nn.Module:
    dialed = dialed_class(cls)
    return dialed.__new__(dialed)


def dial_blocks(dial: TowerDial) -> None:
    """Make the blocks of a ViT run under the dial, in place."""
    for layer, block in enumerate(dial.anatomy.blocks, start=1):
        block.tower_dial, block.tower_layer = dial, layer  # type: ignore[assignment]
        _set_class(block, dialed_class(type(block)))


def undial_blocks(dial: TowerDial) -> None:
    """Make the blocks of a ViT as they were."""
    for block in dial.anatomy.blocks:
        _set_class(block, own_class(block))
        del block.tower_dial, block.tower_layer


def _set_class(block: nn.Module, cls: type[nn.Module]) -> None:
    block.__class__ = cls
    if "_old_forward" in block.__dict__:  # Accelerate's hooks keep the forward that they found
        block._old_forward = cls.forward.__get__(block)
