"""Count the Python calls in one block of a ViT with ToMe and Dense Adapter.

Run `python -m tools.count_block_calls`. It prints two numbers, with their parts, and exits with 1
if either is above the limit:

* calls: how often a function of Tokendial is called (comprehensions count as calls),
* functions: how many different Python functions run, those of PyTorch and timm included.

Both are counted by `sys.setprofile` in a block in the middle of a small ViT, in evaluation and
without gradients. Calls into C, such as tensor operators, do not count.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import timm
import torch

import tokendial as td

LIMIT = 60
LAYER = 6
"""The block that is counted, from 1: late enough for all long connections of the adapter."""
_PACKAGE = str(Path(td.__file__).parent)


def count_calls(layer: int = LAYER) -> Counter[tuple[str, str]]:
    """Calls of Python functions in one block, by (file, function)."""
    vit = timm.create_model("vit_tiny_patch16_224")
    model = td.wrap(vit, reduce=td.ToMe(r=8), adapt=td.DenseAdapter(dim=32)).eval()
    calls: Counter[tuple[str, str]] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls[frame.f_code.co_filename, frame.f_code.co_qualname] += 1

    with torch.no_grad():
        steps = model.steps(torch.zeros(1, 3, 224, 224))
        for _ in range(layer - 1):
            next(steps)
        sys.setprofile(count)
        try:
            next(steps)
        finally:
            sys.setprofile(None)
    return calls


def main() -> int:
    """Print the counts; 1 if one is above the limit."""
    calls = count_calls()
    own = {place: number for place, number in calls.items() if place[0].startswith(_PACKAGE)}
    for (file, function), number in sorted(own.items()):
        print(f"{number:4}  {Path(file).relative_to(_PACKAGE)}  {function}")
    for (file, function), _ in sorted(calls.items() - own.items()):
        print(f"      {'/'.join(Path(file).parts[-3:])}  {function}")
    counts = {"calls of Tokendial's functions": sum(own.values()), "functions": len(calls)}
    for what, number in counts.items():
        print(f"{number:4}  {what} (at most {LIMIT})")
    return int(max(counts.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
