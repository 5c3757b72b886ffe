"""The proxies of ProxyCLIP: ViTs such as DINO's, and SAM's and ViTDet's encoders.

Source of how SAM's encoder is used: the authors' code of ProxyCLIP (see `proxy_clip.py`). Images
are resized to the size that the encoder was made for; its feature map tells what belongs together.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from tokendial.backbones.towers import find_towers
from tokendial.backbones.windowed import WindowedEncoder
from tokendial.model.attach import AttachedDial, attach, attached
from tokendial.model.dial import check_degree
from tokendial.model.dial_vit import DialViT
from tokendial.model.tower_dial import DialedPart
from tokendial.model.wrap import wrap
from tokendial.open_vocabulary.towers import check_no_dial, patch_sides, run_blocks
from tokendial.reduce.base import ReducerConfig

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""


class Proxy(Protocol):
    """A model whose features tell which patches of an image belong together."""

    model: Any
    """The model itself."""

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation of the images that it takes."""

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Numbers of pixels that must divide the sides of images; empty if any side will do."""

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of its dial, from 0 (no reduction) to the cheapest."""

    @property
    def degree(self) -> int:
        """Position of its dial."""

    def set_degree(self, degree: int) -> None:
        """Turn its dial; raise a ValueError if there is no such degree."""

    def features(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """Features of normalised images, and the number of tokens that leave each block.

        Returns:
            The feature map [B, D, rows, columns] with all reductions undone, and the numbers.
        """


def make_proxy(model: nn.Module, reduce: ReducerConfig | None) -> Proxy:
    """Make a model a proxy, with a dial if a reduction method is given.

    Raises:
        ValueError: If it is not supported, it has a dial already and `reduce` is not None, or it
            takes clips.
    """
    if isinstance(model, DialViT):
        check_no_dial("proxy_reduce", reduce, "proxy")
        return ViTProxy(model)
    if encoder := _windowed_encoder(model):
        return EncoderProxy(model, encoder, reduce)
    return ViTProxy(wrap(model, reduce=reduce))


def is_windowed(model: nn.Module) -> bool:
    """Whether a model is, or holds, an encoder such as SAM's, whose attention is in windows."""
    return _windowed_encoder(model) is not None


def _windowed_encoder(model: nn.Module) -> WindowedEncoder | None:
    """The only ViT in a model, if its attention is in windows."""
    towers = list(find_towers(model).values())
    return towers[0] if len(towers) == 1 and isinstance(towers[0], WindowedEncoder) else None


class ViTProxy:
    """A wrapped ViT, which takes images of any size that its patches divide."""

    def __init__(self, model: DialViT) -> None:
        if model.anatomy.frames is not None:
            raise ValueError("proxy must take images, but this model takes clips.")
        self.model = model

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation that a model of timm names; ImageNet's for transformers.

        Models of transformers do not name theirs. Those of DINO, DINOv2 and DINOv3 are ImageNet's.
        """
        if type(self.model.vit).__module__.startswith("transformers."):
            return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        return self.model.anatomy.statistics

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Sides of its patches."""
        return patch_sides(self.model)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of its dial."""
        return self.model.degrees

    @property
    def degree(self) -> int:
        """Position of its dial."""
        return self.model.degree

    def set_degree(self, degree: int) -> None:
        """Turn its dial; raise a ValueError if there is no such degree."""
        self.model.set_degree(degree)

    def features(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """The map of the last block after the final norm, and the numbers of tokens."""
        return run_blocks(self.model, images, norm=True)


class EncoderProxy:
    """SAM's or ViTDet's encoder, or a model that holds it. Its dial stays in it, as by `attach`."""

    def __init__(
        self, model: nn.Module, encoder: WindowedEncoder, reduce: ReducerConfig | None
    ) -> None:
        """Set up the proxy.

        Args:
            model: The encoder, or a model that holds it.
            encoder: The encoder.
            reduce: FFNMerge, which is the only method that fits; None: the dial that the encoder
                has already, if it has one.

        Raises:
            ValueError: If another method is given, or the encoder has a dial already.
        """
        self.model, self._encoder = model, encoder
        self._dial: AttachedDial | None = None
        if isinstance(encoder.ffns[0], DialedPart):
            check_no_dial("proxy_reduce", reduce, "proxy")
            self._dial = attached(model)
        elif reduce is not None:
            self._dial = attach(model, reduce)

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation that a model of timm names; ImageNet's for transformers."""
        named: Any = getattr(self._encoder.vit, "pretrained_cfg", {})
        return named.get("mean", IMAGENET_DEFAULT_MEAN), named.get("std", IMAGENET_DEFAULT_STD)

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Empty: images are resized."""
        return ()

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of its dial."""
        return self._dial.degrees if self._dial else (0,)

    @property
    def degree(self) -> int:
        """Position of its dial."""
        return self._dial.degree if self._dial else 0

    def set_degree(self, degree: int) -> None:
        """Turn its dial; raise a ValueError if there is no such degree."""
        check_degree(degree, self.degrees)
        if self._dial:
            self._dial.set_degree(degree)

    def features(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """The encoder's map of images that are resized to its size, and the numbers of tokens."""
        encoder = self._encoder
        size = encoder.input_shape[1:]
        maps = encoder.feature_map(F.interpolate(images, size, mode="bilinear"))
        # Merged tokens are restored after each FFN.
        return maps, [encoder.shape.num_patches] * encoder.shape.depth
