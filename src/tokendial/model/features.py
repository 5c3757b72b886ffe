"""Feature maps: the tokens of a block put back to the positions of the patches."""

from collections.abc import Iterable, Sequence

from torch import Tensor

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
        [B * grids, D, rows, columns], without prefix tokens.
    """
    rows, columns = tokens.grid
    x = tokens.restore_positions()[:, -tokens.grids * rows * columns :]
    return to_grid(anatomy.norm(x) if norm else x, tokens.grid)


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
    found = [maps[layer] for layer in layers]
    if anatomy.frames is None:
        return found
    return [each.reshape(-1, anatomy.time_steps, *each.shape[1:]) for each in found]
