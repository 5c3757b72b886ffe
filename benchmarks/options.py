"""Options that several benchmarks share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.report import RESULTS

Value = TypeVar("Value")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUICK = {"model": "vit_tiny_patch16_224", "img_size": 64}
"""Defaults of --quick: a small model."""


def comma_separated(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """An argparse type for values separated by commas."""

    def values(text: str) -> list[Value]:
        return [kind(part) for part in text.split(",")]

    values.__name__ = f"list of {kind.__name__}"  # argparse shows it in its errors
    return values


def options(
    name: str,
    doc: str | None,
    *,
    repeats: int | None = None,
    quick: str = "one round of a small model",
) -> argparse.ArgumentParser:
    """A parser with the shared options. Without `repeats` there is no option for rounds."""
    first, _, rest = (doc or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="device: cpu (the default) or cuda")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="number of rounds")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {RESULTS})")
    return parser


def add_model(parser: argparse.ArgumentParser, *, default: str = "vit_base_patch16_224") -> None:
    """Add the options for a timm model and its image size."""
    parser.add_argument("--model", default=default, help="name of a timm model")
    parser.add_argument("--img-size", type=int, help="image size in pixels (default: the model's)")


def parse_options(
    parser: argparse.ArgumentParser, arguments: list[str], **quick: object
) -> argparse.Namespace:
    """Parse the options. --quick sets one round and the values of `quick` as new defaults."""
    if "--quick" in arguments:
        known = vars(parser.parse_args(arguments))
        small = {"repeats": 1} | {name: QUICK[name] for name in QUICK if name in known} | quick
        parser.set_defaults(**small)
    return parser.parse_args(arguments)
