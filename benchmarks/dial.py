"""Time of one turn of the dial with a compensator merged into the weights.

    python benchmarks/dial.py --model deit_base_patch16_224

Degrees are drawn at random; the forward pass at the same degree is timed beside them, and costs are
counted with and without the compensator. Results go to
benchmarks/results/dial_MODEL_HARDWARE_DATE.json.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import timm
import torch
from speed import hardware, write_result

import tokendial as td


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_base_patch16_224")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    vit = timm.create_model(options.model).eval().to(options.device)
    model = td.wrap(vit, reduce=td.ToMe(r=options.steps))
    macs = [model.cost(degree).macs for degree in range(options.steps + 1)]
    plugin = td.Compensator.for_model(model, td.ToCom(rank=options.rank)).to(options.device)
    plugin.attach(model)
    extra = [model.cost(degree).macs - n for degree, n in enumerate(macs)]
    image = torch.randn(1, 3, *model.anatomy.image_size, device=options.device)
    draw = random.Random(0)
    turns, forwards = [], []
    for _ in range(options.turns):
        degree = draw.randint(0, options.steps)
        turns.append(milliseconds(lambda to=degree: model.set_degree(to), options.device))
        forwards.append(milliseconds(lambda: model(image), options.device))
    rows = {
        "turn_ms": statistics.median(turns),
        "slowest_turn_ms": max(turns),
        "forward_of_one_image_ms": statistics.median(forwards),
        "extra_macs": max(extra),
    }
    print(f"{options.model}, rank {options.rank}, {hardware(options.device)}: {rows}")
    write_result(f"dial_{options.model}", options.device, 1, {"rows": rows})


if __name__ == "__main__":
    main()
