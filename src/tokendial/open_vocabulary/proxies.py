"""The proxies of ProxyCLIP: ViTs such as DINO's, and encoders with attention in windows (SAM's).

Source of how SAM's encoder is used: the authors' code of ProxyCLIP (see `proxy_clip.py`). Windows
are resized to the size that the encoder was made for, and its map after the neck is what counts.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from tokendial.backbones.towers import find_towers
from tokendial.backbones.windowed import WindowedEncoder
from tokendial.model.dial import check_degree
from tokendial.model.dial_vit import DialViT
from tokendial.model.dialed_ffns import FFNsDial
from tokendial.model.features import restored_map
from tokendial.model.tower_dial import DialedPart
from tokendial.model.wrap import wrap
from tokendial.reduce.base import ReducerConfig

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""


class Proxy(Protocol):
    """A model whose patches tell which of them belong together."""

    module: Any
    """The model itself."""

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation of the images that it takes."""

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Numbers of pixels that must divide the sides of windows; empty if any side will do."""

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


def open_proxy(model: nn.Module, reduce: ReducerConfig | None) -> Proxy:
    """Give a model a dial, if a reduction method is given, and make it a proxy.

    Raises:
        ValueError: If it is not supported, it has a dial already and `reduce` is not None, or it
            takes clips.
    """
    if isinstance(model, DialViT):
        check_not_wrapped("proxy_reduce", reduce, "proxy")
        return ViTProxy(model)
    if encoder := _windowed_encoder(model):
        return WindowedProxy(model, encoder, reduce)
    return ViTProxy(wrap(model, reduce=reduce))


def is_windowed(model: nn.Module) -> bool:
    """Whether a proxy is, or holds, an encoder with attention in windows."""
    return _windowed_encoder(model) is not None


def _windowed_encoder(model: nn.Module) -> WindowedEncoder | None:
    """The only ViT in a model, if its attention is in windows."""
    towers = list(find_towers(model).values())
    return towers[0] if len(towers) == 1 and isinstance(towers[0], WindowedEncoder) else None


class ViTProxy:
    """A wrapped ViT: the patches of a window have the size that the ViT gives them."""

    def __init__(self, module: DialViT) -> None:
        if module.anatomy.frames is not None:
            raise ValueError("proxy must take images, but this model takes clips.")
        self.module = module

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation that a model of timm names; ImageNet's for transformers.

        Models of transformers do not name theirs. Those of DINO, DINOv2 and DINOv3 are ImageNet's.
        """
        if type(self.module.vit).__module__.startswith("transformers."):
            return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        return self.module.anatomy.statistics

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Sides of its patches."""
        return patch_sides(self.module)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of its dial."""
        return self.module.degrees

    @property
    def degree(self) -> int:
        """Position of its dial."""
        return self.module.degree

    def set_degree(self, degree: int) -> None:
        """Turn its dial; raise a ValueError if there is no such degree."""
        self.module.set_degree(degree)

    def features(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """The map of the last block after the final norm, and the numbers of tokens."""
        return run_blocks(self.module, images, norm=True)


class WindowedProxy:
    """SAM's or ViTDet's encoder, whose FFNs run on merged tokens; its dial is in place.

    The dial stays in the encoder, as one of `attach` does.
    """

    def __init__(
        self, module: nn.Module, encoder: WindowedEncoder, reduce: ReducerConfig | None
    ) -> None:
        """Set up the proxy.

        Args:
            module: The encoder, or a model that holds it.
            encoder: The encoder.
            reduce: FFNMerge, which is the only method that fits; None: the dial that the encoder
                has already, if it has one.

        Raises:
            ValueError: If another method is given, or the encoder has a dial already.
        """
        self.module, self._encoder = module, encoder
        self._dial: Any = None
        first = encoder.ffns[0]
        if isinstance(first, DialedPart):
            check_not_wrapped("proxy_reduce", reduce, "proxy")
            self._dial = first.tower_dial
        elif reduce is not None:
            self._dial = FFNsDial(encoder, reduce)
            self._dial.enter()

    @property
    def statistics(self) -> Statistics:
        """Mean and deviation that a model of timm names; ImageNet's for transformers."""
        named: Any = getattr(self._encoder.vit, "pretrained_cfg", {})
        return named.get("mean", IMAGENET_DEFAULT_MEAN), named.get("std", IMAGENET_DEFAULT_STD)

    @property
    def patch_sides(self) -> tuple[int, ...]:
        """Empty: windows are resized."""
        return ()

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of its dial."""
        return self._dial.reducer.degrees if self._dial else (0,)

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
        """The map after the neck, at the encoder's own size, and the numbers of tokens."""
        vit: Any = self._encoder.vit
        resized = F.interpolate(images, self._encoder.input_shape[1:], mode="bilinear")
        if hasattr(vit, "forward_features"):  # timm's forward pools the map
            maps = vit.forward_features(resized)
        else:
            out = vit(resized)
            maps = out.feature_maps[-1] if hasattr(out, "feature_maps") else out.last_hidden_state
        # Merged tokens are restored after each FFN.
        return maps, [self._encoder.shape.num_patches] * self._encoder.shape.depth


def run_blocks(
    model: DialViT, images: Tensor, last: int | None = None, *, norm: bool = False
) -> tuple[Tensor, list[int]]:
    """Run the first blocks of a model.

    Args:
        model: The model.
        images: Its images, normalised.
        last: The last block to run, counted from 1; None: all.
        norm: Apply the final norm.

    Returns:
        The feature map with all reductions undone, and the number of tokens that leave each block.
    """
    depth = len(model.anatomy.blocks) if last is None else last
    counts, tokens = [], None
    for step in model.steps(images, track=True, dropped="own"):
        tokens = step.tokens
        counts.append(tokens.x.shape[1])
        if step.layer == depth:
            break
    assert tokens is not None
    return restored_map(model.anatomy, tokens, norm=norm), counts


def patch_sides(model: DialViT) -> tuple[int, ...]:
    """Height and width of a model's patches in pixels."""
    convolution = next((p for p in model.vit.parameters() if p.ndim >= 4), None)
    if convolution is not None:
        return tuple(convolution.shape[-2:])
    # Patches are embedded by a linear layer.
    height, width = model.anatomy.image_size
    return (round(math.sqrt(height * width / model.anatomy.shape.num_patches)),)


def check_not_wrapped(reduce_name: str, reduce: ReducerConfig | None, name: str) -> None:
    """Raise a ValueError if a model that has a dial already is given a reduction method."""
    if reduce is not None:
        raise ValueError(
            f"{reduce_name} must be None, because {name} is wrapped already; wrap it with "
            f"reduce={type(reduce).__name__}(...) instead."
        )
