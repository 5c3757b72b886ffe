"""Anatomy: the parts of a ViT, by which it can be run block by block."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """What a block is called with besides the tokens."""

    rope: Tensor | None = None
    """The rotary table for `Tokens.rope`; None: the model has none."""
    valid: Tensor | None = None
    """[B, P] False for tokens that only pad a batch of images of different sizes; None: there are
    none."""

    @classmethod
    def of_padding_mask(cls, mask_B1PP: Tensor | None) -> "BlockInputs":
        """Read a mask that hides padding as keys: boolean, or added to the attention logits."""
        if mask_B1PP is None:
            return cls()
        shown = mask_B1PP if mask_B1PP.dtype == torch.bool else mask_B1PP == 0
        return cls(valid=shown[:, 0].any(dim=1))


class Anatomy(ABC):
    """Gives access to the parts of one kind of ViT, whose blocks are attention and then an FFN.

    It owns no weights. It calls the modules of `vit`, so layers that PEFT puts into them take
    effect. Layers are counted from 1.
    """

    acts_between_blocks: ClassVar[bool] = False
    """Whether the model changes the tokens between its blocks, see `enter_block`."""

    def __init__(self, vit: nn.Module) -> None:
        self.vit: Any = vit
        self._replica: nn.Module | None = None

    @classmethod
    @abstractmethod
    def recognises(cls, vit: nn.Module) -> bool:
        """Whether `vit` is of a class of this kind; `problem` says whether it can be run."""

    @classmethod
    @abstractmethod
    def problem(cls, vit: nn.Module) -> str | None:
        """Why `vit` cannot be run block by block; None: it can."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""

    def block(self, layer: int) -> Any:
        """The block `layer`, counted from 1."""
        return self.blocks[layer - 1] if self._replica is None else self._replica

    def with_block(self, block: nn.Module) -> Self:
        """The same anatomy for a replica of one block, on another device with its own weights."""
        view = copy.copy(self)
        view._replica = block
        return view

    @property
    @abstractmethod
    def shape(self) -> ViTShape:
        """Depth, width and token counts, which methods need when they are built."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model is configured for."""

    @property
    @abstractmethod
    def in_chans(self) -> int:
        """Channels of the images."""

    @property
    def frames(self) -> int | None:
        """Number of frames of a clip, for a video model; None for an image model."""
        return None

    @property
    def time_steps(self) -> int:
        """Feature maps of one input: 1 of an image, the (joined) frames of a clip."""
        return self.frames or 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input of the configured size: an image [3, H, W] or a clip [T, 3, H, W]."""
        image = (self.in_chans, *self.image_size)
        return image if self.frames is None else (self.frames, *image)

    @property
    @abstractmethod
    def heads(self) -> list[nn.Module]:
        """The classification heads. They train with every fine-tuning method."""

    @property
    def head_reads_prefix_only(self) -> bool:
        """Whether `classify` reads prefix tokens only, such as the class token."""
        return False

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, with which images are normalised."""
        return (0.5,) * self.in_chans, (0.5,) * self.in_chans

    @abstractmethod
    def embed(self, images_B3HW: Tensor) -> Tokens:
        """Tokens that enter the first block: patches with their positions, and prefix tokens.

        Video models take clips [B, T, 3, H, W].

        Raises:
            ValueError: If the size of the images or the number of frames does not fit the model.
        """

    @property
    def patch_convolution(self) -> nn.Module | None:
        """The layer whose output [B, D, rows, columns] holds every patch of an image in its place.

        None: the model has no such layer, or leaves patches out after it.
        """
        return None

    def run_vit(self, images_B3HW: Tensor) -> Any:
        """Run the model's own forward pass on images, or clips, of the configured size."""
        return self.vit(images_B3HW)

    @property
    def num_suffix_tokens(self) -> int:
        """How many of the prefix tokens stand behind the patches in the model's own order."""
        return 0

    def read_call(self, *arguments: Any, **named: Any) -> "BlockInputs":
        """What the model's own loop passes to a block besides the tokens.

        Args:
            *arguments: Positional arguments of the block after the tokens.
            **named: Its named arguments.

        Raises:
            ValueError: If the block gets a mask or another tensor, which only its own code can use.
        """
        tensors = [each for each in (*arguments, *named.values()) if isinstance(each, Tensor)]
        if tensors:
            raise ValueError(
                "the blocks get an attention mask, with which tokens cannot be reduced: set the "
                "degree to 0 for masked inputs."
            )
        return BlockInputs()

    def enter_block(self, layer: int, tokens: Tokens) -> Tokens:
        """What the model does to the tokens before block `layer`, outside of its blocks.

        It is called if `acts_between_blocks`. YOLOS adds positions again.
        """
        return tokens

    @abstractmethod
    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        """The input of the attention of `layer`: the normalised tokens."""

    @abstractmethod
    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, C], rotated where the model rotates them."""

    @abstractmethod
    def query_value(self, layer: int) -> dict[Literal["query", "value"], tuple[nn.Module, slice]]:
        """The linear layers that compute queries and values, and which of their output rows do so.

        PEFT may have put a layer of its own around them; `bare` gives the linear layer inside.
        """

    @abstractmethod
    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        """The residual branch of attention.

        Args:
            layer: The block, counted from 1.
            out_BND: Outputs of all heads, before the output projection.
            x_BND: The input of attention, which some models gate the output with.
        """

    @abstractmethod
    def attention_settings(self, layer: int) -> tuple[float, float]:
        """Factor on the dot products, and dropout probability of the attention weights."""

    @abstractmethod
    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        """The input of the FFN of `layer`: the normalised tokens [..., D]."""

    @abstractmethod
    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        """The residual branch of the FFN, computed from its input [..., D]."""

    @abstractmethod
    def norm(self, x_BND: Tensor) -> Tensor:
        """The final norm, which follows the last block."""

    @abstractmethod
    def classify(self, tokens: Tokens) -> Tensor:
        """Logits [B, num_classes] from the tokens of the last block; without a head, features.

        Pooling weighs a merged token by the number of patches it stands for, so that merging equal
        tokens changes nothing.
        """


def pair(size: Any) -> tuple[int, int]:
    """Height and width from what a configuration gives: both, or one number for a square."""
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def bare(layer: Any) -> nn.Linear:
    """The linear layer inside of a layer that PEFT may have put around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[no-any-return]


def split_heads(x_BND: Tensor, num_heads: int) -> Tensor:
    """Split features [B, N, H * C] into heads [B, H, N, C]."""
    batch, tokens, width = x_BND.shape
    return x_BND.reshape(batch, tokens, num_heads, width // num_heads).transpose(1, 2)


def mean_by_size(x_BND: Tensor, size_BN: Tensor | None) -> Tensor:
    """Mean over tokens [B, D], weighted by token size (None: all equal)."""
    if size_BN is None:
        return x_BND.mean(dim=1)
    share = (size_BN / size_BN.sum(dim=1, keepdim=True)).to(x_BND.dtype)
    return (x_BND * share.unsqueeze(-1)).sum(dim=1)
