"""Features: maps of the tokens of a block at the positions of the patches, and pooled features."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from tokendial.backbones import Anatomy
from tokendial.model.blocks import Step
from tokendial.tokens import Tokens, to_grid


def restored_map(anatomy: Anatomy, tokens: Tokens, *, norm: bool) -> Tensor:
    """Undo all reductions of tracked tokens.

    Args:
        anatomy: Calls the final norm of the backbone.
        tokens: Tokens that leave a block.
        norm: Apply the final norm.

    Returns:
        [B, D, rows, columns], of clips [B, T, D, rows, columns], without prefix tokens.
    """
    rows, columns = tokens.grid
    x = tokens.restore_positions()[:, -tokens.grids * rows * columns :]
    restored = to_grid(anatomy.norm(x) if norm else x, tokens.grid)
    if anatomy.frames is None:
        return restored
    return restored.reshape(-1, anatomy.time_steps, *restored.shape[1:])


def collect_maps(
    anatomy: Anatomy, steps: Iterable[Step], layers: Sequence[int] | None, *, norm: bool
) -> list[Tensor]:
    """Feature maps after some blocks; see `DialViT.feature_maps`.

    Args:
        anatomy: Calls the final norm of the backbone.
        steps: One run of the model with tracked tokens. It stops after the last of `layers`.
        layers: Blocks, counted from 1; None: the last one.
        norm: Apply the final norm to each map.

    Returns:
        [B, D, rows, columns] for each layer, of clips [B, T, D, rows, columns].

    Raises:
        ValueError: If there is no such layer.
    """
    depth = len(anatomy.blocks)
    layers = [depth] if layers is None else list(layers)
    if bad := [layer for layer in layers if not 1 <= layer <= depth]:
        raise ValueError(f"layer must lie in [1, {depth}] (counted from 1), got {bad[0]}.")
    maps: dict[int, Tensor] = {}
    for step in steps:
        if step.layer in layers:
            maps[step.layer] = restored_map(anatomy, step.tokens, norm=norm)
        if step.layer == max(layers):
            break
    return [maps[layer] for layer in layers]


def pooled_features(anatomy: Anatomy, tokens: Tokens) -> Tensor:
    """What the head reads of the tokens that leave the last block; see `DialViT.embeddings`.

    Args:
        anatomy: Pools and classifies.
        tokens: Tokens that leave the last block.

    Raises:
        ValueError: If the model does not pool its tokens.
    """
    # A head that pools frames itself holds the linear layer that comes after the pooling.
    layers = [getattr(head, "head", head) for head in anatomy.heads]
    hooks = [layer.register_forward_hook(_give_input) for layer in layers]
    try:
        pooled = anatomy.classify(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if pooled.ndim != 2:
        raise ValueError("embeddings need a model that pools its tokens, but this one does not.")
    return pooled


def _give_input(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Any:
    """A forward hook that replaces the output of a head by its input."""
    return inputs[0]
