"""Dense Adapter, AdaptFormer, LoRA and a linear probe with EViT, at equal parameters, real images.

    python -m benchmarks evidence_dense_adapter --jobs 2

The shipped small ViT is frozen, and EViT removes 30 % of its tokens at layers 4, 7 and 10. It is
fine-tuned for three tasks on crowded scenes: how many sneakers are there, where is the bag, which
kind of item is there three times. The learning rate of each method is chosen on the first task,
with a seed that is not used again. Then every task is trained with three seeds, which change
scenes, heads and order. The table shows the accuracy after the last epoch, as mean and standard
deviation over seeds. This is small-scale evidence that the method works. It does not show which
accuracy to expect on large data sets.

Runs are written to --out; the same command continues an interrupted one. Each run has one thread.
Results go to benchmarks/results/evidence_dense_adapter_HARDWARE_DATE.json.
"""

import argparse
import statistics
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.evidence_real.common import run_tokendial
from benchmarks.report import write_json
from tokendial.runs import Run

# Widths for equal numbers of parameters: 69.2 k, 68.3 k and 69.1 k; linear trains the head only.
METHODS = {
    "Dense Adapter": "{name: dense_adapter, dim: 16}",
    "AdaptFormer": "{name: adaptformer, dim: 29}",
    "LoRA": "{name: lora, rank: 15}",
    "linear": "{name: linear}",
}
RATES = (1e-3, 3e-3, 1e-2)
TASKS = ("count", "where", "which")
SEEDS = (0, 1, 2)
SEED_FOR_RATES = 100


@dataclass(frozen=True)
class Training:
    """One run: a method, a task, a seed and a learning rate."""

    method: str
    task: str
    seed: int
    lr: float

    def accuracy(self, out: Path, epochs: int) -> float:
        """Train or resume the run, and return its accuracy after the last epoch."""
        name = f"{self.method}-{self.task}-{self.seed}-{self.lr:g}".lower().replace(" ", "_")
        run_tokendial(
            *("train", "demo", f"output={out / name}", f"seed={self.seed}"),
            *(f"adapt={METHODS[self.method]}", f"data.task={self.task}", "data.val_size=2000"),
            *(f"train.lr={self.lr}", f"train.epochs={epochs}", "train.checkpoint_every=1000"),
        )
        found = float(Run(out / name).metrics()[-1]["val_accuracy"])
        print(f"{name}: {found:.2%}", flush=True)
        return found


def main(arguments: list[str]) -> None:
    """Choose the rates, train, print the table, and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks evidence_dense_adapter", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evidence_dense_adapter"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    options = parser.parse_args(arguments)

    def trained(runs: Iterable[Training]) -> dict[Training, float]:
        wanted = list(runs)
        with ThreadPoolExecutor(options.jobs) as pool:
            found = pool.map(lambda run: run.accuracy(options.out, options.epochs), wanted)
            return dict(zip(wanted, found, strict=True))

    tried = trained(
        Training(method, TASKS[0], SEED_FOR_RATES, lr) for method in METHODS for lr in RATES
    )
    best = {
        method: max((run for run in tried if run.method == method), key=lambda run: tried[run]).lr
        for method in METHODS
    }
    found = trained(
        Training(method, task, seed, best[method])
        for seed in SEEDS
        for task in TASKS
        for method in METHODS
    )
    rows = []
    print(f"| method | learning rate | {' | '.join(TASKS)} | mean |")
    print("|---" * (len(TASKS) + 3) + "|")
    for method in METHODS:
        scores = {
            task: [found[Training(method, task, seed, best[method])] for seed in SEEDS]
            for task in TASKS
        }
        scores["mean"] = [statistics.mean(some) for some in zip(*scores.values(), strict=True)]
        rows.append({"method": method, "lr": best[method], "accuracy": scores})
        cells = (
            f"{statistics.mean(some):.1%} ± {statistics.stdev(some):.1%}"
            for some in scores.values()
        )
        print(f"| {method} | {best[method]:g} | {' | '.join(cells)} |")
    rates = [{"method": run.method, "lr": run.lr, "accuracy": tried[run]} for run in tried]
    write_json("evidence_dense_adapter", {"batch": 50} | {"rows": rows, "rates": rates})
