"""Checkpoints in the format of the ToCom authors' code.

Their code always bridges 16 steps, and stores the steps in the opposite order: degree r switches on
the last r of them.
"""

# Shape legend: D embed_dim, K width of a pair: rank times steps.

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from tokendial.weights import check_finite

STEPS = 16
"""Steps of the dial in the authors' code."""
_NAME = re.compile(r"blocks\.(\d+)\.attn\.([qv])_tocom\.adapter_(down|up)\.weight")
_PARTS = {"q": "query", "v": "value"}


@dataclass(frozen=True, slots=True)
class AuthorsCheckpoint:
    """The compensator in a checkpoint of the authors' code."""

    rank: int
    """Rank of the pair of one step."""
    depth: int
    """Number of transformer blocks."""
    embed_dim: int
    """Width of a token."""
    tensors: dict[str, Tensor]
    """State dict of a `Compensator` of `STEPS` steps."""
    ignored: Counter[str]
    """Number of other tensors in the checkpoint, by the first part of their names."""


def read_authors_format(state_dict: Mapping[str, Tensor]) -> AuthorsCheckpoint:
    """Find the compensator in a state dict, also where that lies under "model".

    Raises:
        ValueError: If there is none, it does not consist of `STEPS` equal steps, or its numbers are
            not finite.
    """
    state_dict = state_dict.get("model", state_dict)  # type: ignore[assignment]
    found = {match.groups(): name for name in state_dict if (match := _NAME.search(name))}
    depth = 1 + max((int(layer) for layer, _, _ in found), default=-1)
    if not found or set(found) != set(_keys(depth)):
        raise ValueError(
            "this is not a ToCom state dict: it needs blocks.N.attn.{q,v}_tocom."
            f"adapter_{{down,up}}.weight for every block, got {len(found)} of them."
        )
    if unknown := [n for n in state_dict if "_tocom." in n and n not in found.values()]:
        raise ValueError(f"this is not a ToCom state dict: {unknown[0]} has no place in one.")
    check_finite({name: state_dict[name] for name in found.values()}, "the state dict")
    width, embed_dim = state_dict[found["0", "q", "down"]].shape
    if width % STEPS:
        raise ValueError(f"the width of a pair must be a multiple of {STEPS}, got {width}.")
    return AuthorsCheckpoint(
        rank=width // STEPS,
        depth=depth,
        embed_dim=embed_dim,
        tensors={
            _own_name(*key): _reverse_steps(state_dict[name], key[2], embed_dim)
            for key, name in found.items()
        },
        ignored=Counter(n.split(".")[0] for n in state_dict if n not in found.values()),
    )


def to_authors_format(
    own: Mapping[str, Tensor], *, depth: int, embed_dim: int
) -> dict[str, Tensor]:
    """Give the state dict of a `Compensator` the authors' names and order of steps."""
    return {
        f"blocks.{layer}.attn.{part}_tocom.adapter_{half}.weight": _reverse_steps(
            own[_own_name(layer, part, half)], half, embed_dim
        )
        for layer, part, half in _keys(depth)
    }


def _keys(depth: int) -> Iterator[tuple[str, str, str]]:
    """Block (counted from 0), "q" or "v", and "down" or "up" of every tensor."""
    return (
        (str(layer), part, half)
        for layer in range(depth)
        for part in _PARTS
        for half in ("down", "up")
    )


def _own_name(layer: str, part: str, half: str) -> str:
    return f"{half}.{_PARTS[part]}.{layer}"


def _reverse_steps(weight: Tensor, half: str, embed_dim: int) -> Tensor:
    """Reverse the order of the steps in `down` [K, D] or `up` [D, K]."""
    rows = weight if half == "down" else weight.T
    reversed_rows = rows.reshape(STEPS, -1, embed_dim).flip(0).reshape(rows.shape)
    return (reversed_rows if half == "down" else reversed_rows.T).contiguous()
