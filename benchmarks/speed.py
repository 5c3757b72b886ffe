"""Speed of the dial against plain timm, measured side by side in one run.

    python benchmarks/speed.py --model vit_base_patch16_224 --batch 8 --dtype fp32,bf16

Plain timm and every setting take turns, so that a busy machine slows all of them alike; the ratio
is that of the medians. Results go to benchmarks/results/MODEL_HARDWARE_DATE.json.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import tokendial as td

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settings(name: str, degrees: list[int]) -> dict[str, Callable[[], nn.Module]]:
    """A model for every column of the table, all with the same random weights."""
    vit = timm.create_model(name).eval()

    def tome(r: int) -> nn.Module:
        return td.wrap(vit, reduce=td.ToMe(r=r)).eval()

    made: dict[str, Callable[[], nn.Module]] = {"timm": lambda: vit}
    for r in degrees:
        made[f"ToMe r={r}"] = lambda r=r: tome(r)
    made["EViT keep 0.7"] = lambda: td.wrap(vit, reduce=td.EViT(keep_rate=0.7)).eval()
    return made


def timed(model: nn.Module, images: Tensor) -> float:
    """Seconds of one forward pass."""
    start = time.perf_counter()
    model(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(
    models: dict[str, nn.Module], images: Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """Median and spread of the seconds of every model, and the ratio of the first one's to it."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            taken = timed(model, images)
            if turn:  # the first turn warms up
                seconds[name].append(taken)
    base = statistics.median(seconds[next(iter(models))])
    return {
        name: {
            "median_ms": 1000 * statistics.median(values),
            "min_ms": 1000 * min(values),
            "max_ms": 1000 * max(values),
            "speedup": base / statistics.median(values),
        }
        for name, values in seconds.items()
    }


def hardware(device: str) -> str:
    """Name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-")
    return f"{platform.machine()}-{torch.get_num_threads()}threads"


def write_result(name: str, device: str, batch: int, rows: dict[str, object]) -> None:
    """Write rows to results/NAME_HARDWARE_DATE.json, with how they were made."""
    result = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(device),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "batch": batch,
    }
    date = datetime.datetime.now(tz=datetime.UTC).strftime("%Y%m%d")
    path = Path(__file__).parent / "results" / f"{name}_{hardware(device)}_{date}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result | rows, indent=2) + "\n")
    print(f"wrote {path}")


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--degrees", default="0,8,16")
    parser.add_argument("--dtype", default="fp32,bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    degrees = [int(degree) for degree in options.degrees.split(",")]
    makers = settings(options.model, degrees)
    result: dict[str, object] = {}
    for dtype in options.dtype.split(","):
        models = {n: make().to(options.device, DTYPES[dtype]) for n, make in makers.items()}
        size = timm.create_model(options.model).patch_embed.img_size
        images = torch.randn(options.batch, 3, *size, device=options.device, dtype=DTYPES[dtype])
        result[dtype] = rows = measure(models, images, options.repeats)
        print(f"{options.model}, batch {options.batch}, {dtype}, {hardware(options.device)}")
        for name, row in rows.items():
            spread = f"{row['min_ms']:.0f} to {row['max_ms']:.0f}"
            ratio = row["speedup"]
            print(f"  {name:14} {row['median_ms']:8.1f} ms ({spread})  {ratio:.2f}x")
    write_result(options.model, options.device, options.batch, result)


if __name__ == "__main__":
    main()
