"""Rows of speed: images/s, and the fraction of the saved cost that is saved time."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.alternating import Runner, Turn, alternate, page_faults, ratio, seconds
from benchmarks.memory import peak_of
from benchmarks.report import Column, Row

MEASURES = (
    Column("gmacs", "GMACs", "{:.2f}"),
    Column("images_per_s", "images/s", "{:.2f}"),
    Column("ratio", "speed", "{:.2f}x ({low:.2f} to {high:.2f})"),
    Column("mac_ratio", "cost", "{:.2f}x"),
    Column("efficiency", "efficiency", "{:.2f}"),
    Column("peak_mib", "peak MiB", "{:.1f}"),
    Column("page_faults", "page faults", "{:.0f}"),
)
"""Columns of all tables of speed. "speed" and "cost" are ratios to the first row: how many times as
fast, and how many times fewer multiply-accumulates; "efficiency" is speed / cost."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A model at a setting, to be timed for one row."""

    labels: Row
    """Values of the row that identify it, such as method and degree."""
    gmacs: float
    """Multiply-accumulates for one image, in 1e9."""
    runner: Runner
    """Does a pass over a batch."""


@torch.no_grad()
def compare(contenders: Sequence[Contender], *, batch: int, repeats: int, device: str) -> list[Row]:
    """Time contenders in turns, and compare them with the first one.

    Args:
        contenders: The contenders, in the order of the rows.
        batch: Images in one pass.
        repeats: Number of rounds.
        device: Device of the contenders.

    Returns:
        One row per contender.
    """
    runners = {number: each.runner for number, each in enumerate(contenders)}
    turns = alternate(runners, repeats=repeats, device=device)
    base = contenders[0], turns[0]
    return [
        speed_row((each, turns[number]), base, batch=batch, device=device)
        for number, each in enumerate(contenders)
    ]


@torch.no_grad()
def speed_row(
    own: tuple[Contender, Sequence[Turn]],
    base: tuple[Contender, Sequence[Turn]],
    *,
    batch: int,
    device: str,
) -> Row:
    """The row of a contender compared with the base: labels, the keys of `MEASURES`, seconds."""
    contender, turns = own
    speed, cost = ratio(base[1], turns), base[0].gmacs / contender.gmacs
    peak_mib = None
    if contender.runner.seen:
        contender.runner.prepare()
        peak_mib = peak_of(contender.runner.call, device).whole / 2**20
    labels = ", ".join(str(value) for value in contender.labels.values())
    print(f"{labels}: {speed.median:.2f}x of {cost:.2f}x", file=sys.stderr)
    return contender.labels | {
        "gmacs": contender.gmacs,
        "images_per_s": batch / seconds(turns),
        **speed.as_row("ratio"),
        "mac_ratio": cost,
        "efficiency": speed.median / cost,
        "peak_mib": peak_mib,
        "page_faults": page_faults(turns),
        "seconds": [turn.seconds for turn in turns],
    }
