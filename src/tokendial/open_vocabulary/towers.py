"""What ProxyCLIP does with a wrapped tower: run some of its blocks, know its patches."""

import math

from torch import Tensor

from tokendial.model.dial_vit import DialViT
from tokendial.model.features import restored_map
from tokendial.reduce.base import ReducerConfig


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


def check_no_dial(reduce_name: str, reduce: ReducerConfig | None, name: str) -> None:
    """Raise a ValueError if a model that has a dial already is given a reduction method."""
    if reduce is not None:
        raise ValueError(
            f"{reduce_name} must be None, because {name} is wrapped already; wrap it with "
            f"reduce={type(reduce).__name__}(...) instead."
        )
