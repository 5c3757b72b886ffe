"""Blocks on reduced tokens, inside of a model that stays as it is.

The model's own forward pass calls its blocks one after another. Under the dial, a block hands on
features of every position, so nothing around it notices; but it remembers the reduced tokens, and
when the next block is called with those features, it goes on with the reduced tokens.
"""

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokendial.adapt.base import Adapter
from tokendial.attention import PYTORCH_KERNEL
from tokendial.backbones.anatomy import Anatomy, BlockInputs
from tokendial.model.blocks import BlockRunner
from tokendial.model.protect import protect
from tokendial.model.tower_dial import DialedPart, TowerDial
from tokendial.reduce.base import ReducerConfig
from tokendial.reduce.tome import ToMeReducer
from tokendial.tokens import Tokens

_INPUTS = ("hidden_states", "x", "q_x", "input")
"""Names of a block's first argument, in the libraries whose blocks can run on reduced tokens."""
_NO_ADAPTER = Adapter()
_PADDING_SIZE = 1e-30
"""Size of tokens that only pad a batch. Its logarithm, -69, hides them in any precision, and a mean
of several of them is not divided by zero."""


class BlocksDial(TowerDial):
    """The dial of a ViT whose blocks run on reduced tokens."""

    def __init__(self, anatomy: Anatomy, reduce: ReducerConfig) -> None:
        reducer = reduce.build(anatomy.shape)
        if any(True for _ in reducer.parameters()):
            raise ValueError(
                "reduce must be a method without weights of its own, such as ToMe, EViT or "
                f"FFNMerge, got {type(reduce).__name__}: train it with td.wrap."
            )
        reads_grid = reducer.reads_grid or reducer.reads_grid_shape
        if reads_grid and anatomy.patch_convolution is None:
            raise ValueError(
                f"reduce: {type(reduce).__name__} needs the rows and columns of patches, which "
                f"{type(anatomy.vit).__name__} does not tell its blocks: use another method, or "
                "td.wrap."
            )
        super().__init__(anatomy.vit, anatomy.blocks, reducer, anatomy.shape, anatomy.input_shape)
        self.anatomy = anatomy
        """The parts of the ViT."""
        self.passage = _Passage()
        self._reads_grid = reads_grid
        self._hook: RemovableHandle | None = None

    def enter(self) -> None:
        """Make the blocks run under this dial, in place."""
        super().enter()
        if self._reads_grid:
            # Blocks get a sequence, so the shape of the image is read where patches are made.
            convolution = self.anatomy.patch_convolution
            assert convolution is not None
            self._hook = convolution.register_forward_hook(self._note_grid)

    def leave(self) -> None:
        """Make the blocks as they were."""
        super().leave()
        if self._hook is not None:
            self._hook.remove()

    def _note_grid(self, _layer: nn.Module, _args: Any, map_BDHW: Tensor) -> None:
        rows, columns = map_BDHW.shape[-2:]
        self.passage.grid = rows, columns

    def run_vit(self, images_B3HW: Tensor) -> Any:
        """Run the ViT's own forward pass on images of the configured size."""
        return self.anatomy.run_vit(images_B3HW)

    def run(self, part: DialedPart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block on the reduced tokens, and return features of every position [B, P, D].

        A call that is not part of a pass through all blocks, such as that of a single block, is
        left to the block's own code.
        """
        x, args, kwargs = _split_call(args, kwargs)
        layer, anatomy, passage = part.tower_layer, self.anatomy, self.passage
        inputs = anatomy.read_call(*args, **kwargs)
        if layer == 1:
            _check_call(part, self.vit, kwargs)
            tokens = self._entering(x, inputs)
        elif passage.layer == layer - 1 and passage.tokens is not None:
            tokens = passage.tokens
            if x is not passage.shown:  # changed between the blocks, or moved to another device
                tokens = tokens.with_restored(self._patches_last(x))
        else:
            return NotImplemented
        tokens = replace(tokens, rope=inputs.rope)
        if getattr(part, "_is_replica", False):  # of torch.nn.DataParallel
            anatomy = anatomy.with_block(part)
        runner = BlockRunner(anatomy, self.reducer, self.degree, _NO_ADAPTER, PYTORCH_KERNEL)
        tokens = runner.run(layer, tokens).tokens
        if self.counts is not None:
            self.counts.append(tokens.x.shape[1])
        shown = self._suffix_last(tokens.restore_positions())
        if layer == len(self.parts):
            passage.layer, passage.tokens, passage.shown = 0, None, None
        else:
            passage.layer, passage.tokens, passage.shown = layer, tokens, shown
        return shown

    def _entering(self, x_BPD: Tensor, inputs: BlockInputs) -> Tokens:
        """Tokens that enter the first block."""
        prefix, grids = self.shape.num_prefix_tokens, self.shape.num_grids
        grid = self._grid((x_BPD.shape[1] - prefix) // grids)
        # Methods that move patches have to find the table of positions, to move its rows as well.
        tokens = Tokens(self._patches_last(x_BPD), prefix, grid, grids, rope=inputs.rope)
        tokens = tokens.with_tracking(follow_fused=False)
        if self.protected is not None:
            tokens = protect(tokens, self.protected, self.reducer)
        valid_BP = inputs.valid
        if valid_BP is None:
            return tokens
        if self.protected is not None:
            raise ValueError("batches with padding cannot protect patches.")
        if not isinstance(self.reducer, ToMeReducer) or not self.reducer.proportional_attention:
            raise ValueError(
                "batches with padding need reduce=td.ToMe(...) with proportional attention, got "
                f"{type(self.reducer).__name__.removesuffix('Reducer')}: set the degree to 0 for "
                "them."
            )
        # Padding stands for almost no patch: attention does not see it, and it changes no token
        # that absorbs it.
        return replace(tokens, size=torch.where(valid_BP, 1.0, _PADDING_SIZE))

    def _grid(self, num_patches: int) -> tuple[int, int]:
        """Rows and columns of patches; one row if the method does not read them."""
        if not self._reads_grid:
            return 1, num_patches
        grid, self.passage.grid = self.passage.grid, None
        if grid is None or grid[0] * grid[1] != num_patches:
            seen = "none" if grid is None else f"{grid[0]} x {grid[1]}"
            raise ValueError(
                f"{type(self.reducer).__name__.removesuffix('Reducer')} needs all patches of an "
                f"image: the first block got {num_patches}, and the embedding gave {seen}. Set the "
                "degree to 0 for such calls."
            )
        return grid

    def _patches_last(self, x_BPD: Tensor) -> Tensor:
        """Move tokens that stand behind the patches before them. Attention ignores the order."""
        if not (suffix := self.anatomy.num_suffix_tokens):
            return x_BPD
        before = self.shape.num_prefix_tokens - suffix
        prefix, patches, after = x_BPD.tensor_split([before, x_BPD.shape[1] - suffix], dim=1)
        return torch.cat([prefix, after, patches], dim=1)

    def _suffix_last(self, x_BPD: Tensor) -> Tensor:
        """The inverse of `_patches_last`."""
        if not (suffix := self.anatomy.num_suffix_tokens):
            return x_BPD
        end = self.shape.num_prefix_tokens
        prefix, after, patches = x_BPD.tensor_split([end - suffix, end], dim=1)
        return torch.cat([prefix, patches, after], dim=1)


class _Passage(threading.local):
    """Where the present forward pass of a ViT is. Each thread has its own."""

    layer: int = 0
    """The block that ran last, counted from 1; 0: no pass is under way."""
    tokens: Tokens | None = None
    """The reduced tokens that left it."""
    shown: Tensor | None = None
    """The features of every position that it returned."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches that the embedding gave; None: not known, or not needed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Passage":
        return _Passage()

    def __reduce__(self) -> tuple[type["_Passage"], tuple[()]]:
        return _Passage, ()


def _split_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The tokens that a block is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = next(name for name in _INPUTS if name in kwargs)
    return kwargs[name], (), {other: v for other, v in kwargs.items() if other != name}


def _check_call(block: nn.Module, vit: Any, kwargs: dict[str, Any]) -> None:
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
