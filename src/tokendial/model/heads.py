"""The classification head of a backbone: its size and names, and timm's methods for it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tokendial.adapt.base import Adapter
from tokendial.backbones import Anatomy
from tokendial.decode import DecoderConfig


def head_size(anatomy: Anatomy) -> int:
    """Number of classes of the head; 0 without a head."""
    heads = anatomy.heads
    return int(getattr(heads[0], "out_features", 0)) if heads else 0


def head_names(anatomy: Anatomy) -> tuple[str, ...]:
    """Names of the classification heads in `anatomy.vit`; none if it has no head."""
    heads = {id(head) for head in anatomy.heads} if head_size(anatomy) else set()
    return tuple(name for name, part in anatomy.vit.named_modules() if id(part) in heads)


def check_headless(anatomy: Anatomy, decode: DecoderConfig | None) -> None:
    """Raise a ValueError if there is a decoder, and this backbone cannot have one."""
    if decode and anatomy.frames is not None:
        raise ValueError("a decoder reads images, but this model takes clips.")
    if decode and (size := head_size(anatomy)):
        raise ValueError(
            "a decoder needs a backbone without a classification head (num_classes=0), this "
            f"one has {size} classes."
        )


def timm_method(vit: nn.Module, name: str, decoder: nn.Module | None) -> Callable[..., Any]:
    """The method of that name of a timm model; it acts on the head.

    Raises:
        ValueError: If the backbone is not of timm, or there is a decoder in place of the head.
    """
    if decoder is not None:
        raise ValueError(f"{name} is for heads, but this model has a decoder.")
    method: Callable[..., Any] | None = getattr(vit, name, None)
    if method is None:
        raise ValueError(f"{name} needs a model of timm, vit is a {type(vit).__name__}.")
    return method


def reset_head(
    anatomy: Anatomy,
    adapter: Adapter,
    decoder: nn.Module | None,
    num_classes: int,
    global_pool: str | None,
) -> None:
    """Put a new head into the backbone; see `DialViT.reset_classifier`."""
    if adapter.replaces_class_token and global_pool not in (None, "token"):
        raise ValueError(
            f"global_pool must be token or None, got {global_pool!r}: this adapter needs a head "
            "that reads the class token."
        )
    if anatomy.frames is not None:
        raise ValueError(
            "the head of a video model cannot be reset: add_adapter(..., num_classes=...) "
            "makes a new one."
        )
    timm_method(anatomy.vit, "reset_classifier", decoder)(num_classes, global_pool)
