"""Rows of speed: images per second, and how much of what the cost promises is there."""

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
"""Speed and cost are ratios over the first row: how many times as fast, how many times less."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One row to be: a model at a setting."""

    labels: Row
    """What it is."""
    gmacs: float
    """Multiply-accumulates of one image, in 1e9."""
    runner: Runner
    """A pass over a batch."""


@torch.no_grad()
def compare(contenders: Sequence[Contender], *, batch: int, repeats: int, device: str) -> list[Row]:
    """Let contenders take turns; the first one is what the others are compared with.

    Args:
        contenders: As they come in the table.
        batch: Images in a pass.
        repeats: Rounds that count.
        device: What they run on.
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
    """Labels, the keys of `MEASURES`, and the seconds of every turn, of a contender beside one."""
    contender, turns = own
    speed, cost = ratio(base[1], turns), base[0].gmacs / contender.gmacs
    peak_mib = None
    if contender.runner.seen:
        contender.runner.prepare()
        peak_mib = peak_of(contender.runner.call, device).whole / 2**20
    told = ", ".join(str(value) for value in contender.labels.values())
    print(f"{told}: {speed.median:.2f}x of {cost:.2f}x", file=sys.stderr)
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
