"""Time and peak memory of a training step, method by method, in one run.

    python benchmarks/training.py --batch 16 --rounds 2

Every measurement has a process of its own, so that one method's memory is not counted for the
next; the methods take turns, round after round. Memory is the peak of the process above what it
held before the model was built (on a GPU: what torch allocated). Results go to
benchmarks/results/training_MODEL_HARDWARE_DATE.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import timm
import torch
from speed import hardware, write_result

import tokendial as td
from tokendial.data.transforms import Augment
from tokendial.tasks.classification import Classification
from tokendial.train.objective import Objective

DENSE, PLAIN = td.DenseAdapter(dim=32), td.AdaptFormer(dim=64, scale=0.1)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapt": td.Full()},
    "full, recomputing": {"adapt": td.Full()},
    "linear": {"adapt": td.Linear()},
    "AdaptFormer": {"adapt": PLAIN},
    "LoRA": {"adapt": td.LoRA(rank=8)},
    "DyT": {"adapt": PLAIN, "reduce": td.DyT()},
    "Sparse-Tuning, EViT": {"adapt": DENSE, "reduce": td.EViT()},
    "Sparse-Tuning, ToMe": {"adapt": DENSE, "reduce": td.ToMe(r=16)},
    "Sparse-Tuning, DynamicViT": {"adapt": DENSE, "reduce": td.DynamicViT()},
}


def peak_mb(device: str) -> float:
    """Largest memory so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, and the peak of memory, of one method."""
    before = peak_mb(options.device)
    model = td.wrap(timm.create_model(options.model, num_classes=100), **METHODS[name])
    model.checkpoint_activations = "recomputing" in name
    task = Classification(100, multi_label=False, augment=Augment())
    objective = Objective(model, task).to(options.device).train()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-4)
    size = model.anatomy.image_size
    images = torch.randn(options.batch, 3, *size, device=options.device)
    targets = torch.randint(0, 100, (options.batch,), device=options.device)
    seconds = []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        loss, _ = objective(images, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:]),  # the first step makes the optimizer's state
        "memory_mb": peak_mb(options.device) - before,
        "trained_m": model.cost().trainable_params / 1e6,
    }


def main() -> None:
    """Measure, print, and write the result; with --only, measure one method in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(options.rounds):
        for name in METHODS:
            command = [sys.executable, *sys.argv, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = {
        name: {key: statistics.median(row[key] for row in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    full = rows["full"]
    print(f"{options.model}, batch {options.batch}, {hardware(options.device)}")
    print("| method | trained (M) | s / step | of full | memory (MB) | of full |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        time_share = row["seconds"] / full["seconds"]
        memory_share = row["memory_mb"] / full["memory_mb"]
        print(
            f"| {name} | {row['trained_m']:.2f} | {row['seconds']:.2f} | {time_share:.2f} | "
            f"{row['memory_mb']:.0f} | {memory_share:.2f} |"
        )
    write_result(f"training_{options.model}", options.device, options.batch, {"rows": rows})


if __name__ == "__main__":
    main()
