"""Options that commands have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.report import RESULTS

Value = TypeVar("Value")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUICK = {"model": "vit_tiny_patch16_224", "img_size": 64}
"""A small model for --quick."""


def listed(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Values with commas between them."""

    def values(text: str) -> list[Value]:
        return [kind(part) for part in text.split(",")]

    values.__name__ = f"list of {kind.__name__}"  # argparse names it where a value is wrong
    return values


def options(
    name: str,
    doc: str | None,
    *,
    repeats: int | None = None,
    quick: str = "one round of a small model",
) -> argparse.ArgumentParser:
    """A parser of a command that times something; without `repeats`, once."""
    first, _, rest = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="rounds that count")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {RESULTS})")
    return parser


def add_model(parser: argparse.ArgumentParser, *, default: str = "vit_base_patch16_224") -> None:
    """Which model of timm, and at which size."""
    parser.add_argument("--model", default=default, help="a name of timm")
    parser.add_argument("--img-size", type=int, help="pixels (default: those of the model)")


def parsed(
    parser: argparse.ArgumentParser, arguments: list[str], **quick: object
) -> argparse.Namespace:
    """The options; with --quick, one round and the values of `quick`, unless they are given."""
    if "--quick" in arguments:
        known = vars(parser.parse_args(arguments))
        small = {"repeats": 1} | {name: QUICK[name] for name in QUICK if name in known} | quick
        parser.set_defaults(**small)
    return parser.parse_args(arguments)
