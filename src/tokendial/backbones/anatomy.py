"""What the library needs to know of a kind of ViT to run it block by block."""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


class Anatomy(ABC):
    """One kind of ViT, taken apart; every block is pre-norm attention and then an FFN.

    It owns no weights: it calls the modules of `vit`, so that layers which PEFT puts into them
    act. Layers count from 1.
    """

    def __init__(self, vit: nn.Module) -> None:
        self.vit: Any = vit

    @classmethod
    @abstractmethod
    def problem(cls, vit: nn.Module) -> str | None:
        """Why `vit` cannot be run block by block; None: it can."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in order."""

    @property
    @abstractmethod
    def shape(self) -> ViTShape:
        """The numbers that methods need."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it is configured for."""

    @property
    @abstractmethod
    def in_chans(self) -> int:
        """Channels of the images."""

    @property
    def frames(self) -> int | None:
        """Frames of the clips that a video model takes; None: it takes images."""
        return None

    @property
    def time_steps(self) -> int:
        """Feature maps of one clip: its frames, or fewer where frames were joined; 1 for images."""
        return self.frames or 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image [3, H, W] of the configured size, or of one clip [T, 3, H, W]."""
        image = (self.in_chans, *self.image_size)
        return image if self.frames is None else (self.frames, *image)

    @property
    @abstractmethod
    def heads(self) -> list[nn.Module]:
        """The classification heads, which train in every method of fine-tuning."""

    @property
    def reads_prefix_alone(self) -> bool:
        """Whether `classify` looks at prefix tokens only, such as a class token."""
        return False

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation that images are normalised with."""
        return (0.5,) * self.in_chans, (0.5,) * self.in_chans

    @abstractmethod
    def embed(self, images_B3HW: Tensor) -> Tokens:
        """Patches with positions and prefix tokens, as they enter the first block.

        Video models take clips [B, T, 3, H, W].

        Raises:
            ValueError: If the size of the images does not fit the model, or the number of frames.
        """

    @abstractmethod
    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        """What attention of `layer` reads: the normalised tokens."""

    @abstractmethod
    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, C], rotated where the model rotates them."""

    @abstractmethod
    def query_value(self, layer: int) -> dict[Literal["query", "value"], tuple[nn.Module, slice]]:
        """The linear layers that make queries and values, and which of their rows do.

        As they stand in the model: with what PEFT has put around them, see `bare`.
        """

    @abstractmethod
    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        """What is added to the tokens, from the heads' outputs and the input of attention."""

    @abstractmethod
    def attention_settings(self, layer: int) -> tuple[float, float]:
        """Scale of the dot products and dropout of the attention weights."""

    @abstractmethod
    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        """What the FFN of `layer` reads: the normalised tokens; [..., D] is allowed."""

    @abstractmethod
    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        """What is added to the tokens, from the input of the FFN; [..., D] is allowed."""

    @abstractmethod
    def norm(self, x_BND: Tensor) -> Tensor:
        """The norm after the last block."""

    @abstractmethod
    def classify(self, tokens: Tokens) -> Tensor:
        """Logits [B, num_classes] (features without a head) from the last block's tokens.

        Pooling counts a merged token as often as the patches it stands for, so that merging equal
        tokens changes nothing.
        """


def bare(layer: Any) -> nn.Linear:
    """A linear layer without what PEFT may have put around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[no-any-return]


def split_heads(x_BND: Tensor, num_heads: int) -> Tensor:
    """[B, N, H * C] to [B, H, N, C]."""
    batch, tokens, width = x_BND.shape
    return x_BND.reshape(batch, tokens, num_heads, width // num_heads).transpose(1, 2)


def mean_by_size(x_BND: Tensor, size_BN: Tensor | None) -> Tensor:
    """Mean over tokens [B, D], each counted by its size."""
    if size_BN is None:
        return x_BND.mean(dim=1)
    share = (size_BN / size_BN.sum(dim=1, keepdim=True)).to(x_BND.dtype)
    return (x_BND * share.unsqueeze(-1)).sum(dim=1)
