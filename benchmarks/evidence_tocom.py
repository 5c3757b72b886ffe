"""Accuracy that ToCom recovers when a model runs at another degree than its own, on real images.

    python -m benchmarks evidence_tocom --jobs 2

For each of two reduction methods, ToMe and EViT in every layer, one compensator is trained for the
shipped small ViT, on its pre-training scenes and without labels. Then AdaptFormer fine-tunes the
ViT for three other tasks on crowded scenes: how many sneakers are there, where is the bag, which
kind of item is there three times. It does so at degree 0, at half and at the full degree of each
dial, with three seeds, which change scenes, heads and order. Every model then runs at each of the
three degrees, without and with the compensator, which was trained for none of the three tasks.

The gap is the accuracy of the model that was trained at the degree it runs at, minus the accuracy
of the model that was trained at another degree. "recovered" is the fraction of the gap that the
compensator closes. The compensator's scale is chosen among five values on 200 scenes outside of the
test set, as in the paper. The ablations train the compensator in other ways. This is small-scale
evidence that the method works. It does not show which accuracy to expect on large data sets.

Needs Debian's package dataset-fashion-mnist. Runs are written to --out; the same command continues
an interrupted one. Each run has one thread. Results go to
benchmarks/results/evidence_tocom_HARDWARE_DATE.json.
"""

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokendial as td
from benchmarks.evidence_real.common import run_tokendial
from benchmarks.report import write_json
from tokendial.atomic import atomic_write
from tokendial.methods import to_json
from tokendial.runs import Run
from tokendial.runs.evaluate import evaluate_loader
from tokendial.runs.loaders import eval_loader

DIALS: dict[str, td.ToMe | td.EViT] = {"tome": td.ToMe(r=16), "evit": td.EViT(r=6)}
# Epochs and learning rate. Pre-training had no task about where an item is.
TASKS = {"count": (3, 5e-3), "where": (5, 1e-2), "which": (3, 5e-3)}
SEEDS = (0, 1, 2)
TEST, SEARCH, SEARCH_SEED = 1000, 200, 1000
# Some of the paper's scales, as fractions of the scale in training.
SHARES = (0.2, 0.5, 0.8, 1.0, 1.2)
TOCOM = {"name": "tocom", "rank": 4, "scale": 1.0, "dropout": 0.0}
ABLATIONS: dict[str, dict[str, Any]] = {
    # As many parameters as the 16 steps of ToMe's dial have together.
    "shared pair": {"compensate": TOCOM | {"shared": True, "rank": 64}},
    "classification loss": {"loss": "classification"},
    "no inversion": {"compensate": TOCOM | {"inversion": False}},
    "s = 0.1": {"compensate": TOCOM | {"scale": 0.1}},
    "h = 1": {"compensate": TOCOM | {"rank": 1}},
    "h = 8": {"compensate": TOCOM | {"rank": 8}},
}


def command(kind: str, recipe: str, settings: dict[str, Any]) -> None:
    """Run a command of Tokendial; it resumes an interrupted run."""
    run_tokendial(kind, recipe, *(f"{name}={json.dumps(v)}" for name, v in settings.items()))
    print(settings["output"], flush=True)


@dataclass(frozen=True)
class FineTunedModel:
    """A model fine-tuned for a task. Models trained at degree 0 have no dial."""

    task: str
    seed: int
    dial: str | None
    source: int

    def folder(self, out: Path) -> Path:
        """The folder of its run."""
        return out / "-".join(map(str, (self.task, self.seed, self.dial or "none", self.source)))

    def train(self, options: argparse.Namespace) -> None:
        """Fine-tune the model."""
        command("train", "demo", self.settings(options))

    def settings(self, options: argparse.Namespace) -> dict[str, Any]:
        """Settings of its training."""
        epochs, lr = TASKS[self.task]
        return {
            "output": str(self.folder(options.out)),
            "seed": self.seed,
            "reduce": to_json("reduce", DIALS[self.dial]) if self.dial else None,
            "adapt": {"name": "adaptformer", "dim": 16},
            "data.task": self.task,
            "data.train_size": options.scenes,
            "data.val_size": 100,
            "train.degree": self.source,
            "train.epochs": epochs,
            "train.lr": lr,
        }


@dataclass(frozen=True)
class Question:
    """A measurement to make: the accuracy of a model at a degree, without or with a compensator."""

    fine_tuned_model: FineTunedModel
    dial: str
    target: int
    compensator: str | None = None

    def answer(self, out: Path) -> dict[str, float]:
        """Accuracy on the test scenes, and the scale chosen for the compensator."""
        run_name = self.fine_tuned_model.folder(out).name
        name = f"{run_name}-at-{self.dial}-{self.target}-{self.compensator}.json"
        path = out / "answers" / name.replace(" ", "_")
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            found = self._measured(out)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(found))
        return dict(json.loads(path.read_text()))

    def _measured(self, out: Path) -> dict[str, float]:
        run = Run(self.fine_tuned_model.folder(out))
        model, scale = self.load(out)
        found = {} if scale is None else {"scale": scale}
        test = batches(run.folder, self.fine_tuned_model.seed, TEST)
        return found | {"accuracy": evaluate_loader(model, test, run.task())["accuracy"]}

    def load(self, out: Path) -> tuple[td.DialViT, float | None]:
        """The model at the degree, and the scale chosen for its compensator, if it has one."""
        torch.set_num_threads(1)
        fine_tuned_model, scale = self.fine_tuned_model, None
        run = Run(fine_tuned_model.folder(out))
        model = td.load(run.last, reduce=DIALS[self.dial])
        if self.compensator:
            folder = compensator_folder(out, self.dial, self.compensator)
            compensator = td.Compensator.from_pretrained(folder / "last")
            model.set_degree(fine_tuned_model.source)
            compensator.attach(model, fine_tuned_model.source)
            compensator.search_scale(
                model,
                batches(run.folder, SEARCH_SEED + fine_tuned_model.seed, SEARCH),
                self.target,
                [share * compensator.config.scale for share in SHARES],
            )
            scale = compensator.scale
        model.set_degree(self.target)
        return model, scale


@functools.lru_cache(maxsize=2)
def batches(folder: Path, seed: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of scenes of a run's task that it was not trained on."""
    run = Run(folder)
    data = replace(run.recipe().data, val_size=size).build(seed)
    transform = run.task().eval_transform(run.model().anatomy)
    return list(eval_loader(data.val, transform, batch_size=100))


def train_compensator(
    dial: str, name: str, settings: dict[str, Any], options: argparse.Namespace
) -> None:
    """Train a compensator on the pre-training scenes."""
    common = {
        "output": str(compensator_folder(options.out, dial, name)),
        "reduce": to_json("reduce", DIALS[dial]),
        "steps": DIALS[dial].r,
        "compensate": TOCOM,
        "data.train_size": options.unlabelled,
    }
    command("compensate", "tocom_scenes", common | settings)


def compensator_folder(out: Path, dial: str, name: str) -> Path:
    """The folder of a compensator."""
    return out / f"{dial}-{name}".replace(" ", "_")


def answers(
    questions: Iterable[Question], options: argparse.Namespace
) -> dict[Question, dict[str, float]]:
    """The results of all measurements. Those made before are read from their files."""
    wanted = list(dict.fromkeys(questions))
    with ProcessPoolExecutor(options.jobs) as pool:
        found = pool.map(functools.partial(Question.answer, out=options.out), wanted)
        return dict(zip(wanted, found, strict=True))


def fine_tuned_model(task: str, seed: int, dial: str, source: int) -> FineTunedModel:
    """The model trained for a task at a source degree."""
    return FineTunedModel(task, seed, dial if source else None, source)


def degrees(dial: str) -> tuple[int, int, int]:
    """The three degrees of a dial: 0, half, and the highest."""
    return 0, DIALS[dial].r // 2, DIALS[dial].r


def questions(dial: str, ablations: Sequence[str]) -> list[Question]:
    """All measurements: every source at every target, without and with compensators."""
    found = []
    for task, seed in itertools.product(TASKS, SEEDS):
        for source, target in itertools.product(degrees(dial), repeat=2):
            names = [None] if source == target else [None, "ToCom"]
            if (source, target) in ablation_pairs(dial):
                names += ablations
            model = fine_tuned_model(task, seed, dial, source)
            found += [Question(model, dial, target, name) for name in names]
    return found


def ablation_pairs(dial: str) -> list[tuple[int, int]]:
    """The pairs of source and target that ablations are measured at."""
    none, _, top = degrees(dial)
    return [(none, top), (top, none)]


Answers = dict[Question, dict[str, float]]


def accuracies(
    found: Answers, dial: str, task: str, source: int, target: int, name: str | None = None
) -> list[float]:
    """Accuracies of all seeds, in percent."""
    asked = (
        Question(fine_tuned_model(task, seed, dial, source), dial, target, name) for seed in SEEDS
    )
    return [100 * found[question]["accuracy"] for question in asked]


def table(dial: str, found: Answers) -> list[dict[str, Any]]:
    """Print and return the gap and the recovered accuracy for every pair of degrees."""
    columns = ("degree 0", "mismatched", "compensated", "matched")
    print(f"\n| {dial} | task | {' | '.join(columns)} | gap | recovered |")
    print("|---" * (len(columns) + 4) + "|")
    rows = []
    for source, target in itertools.permutations(degrees(dial), 2):
        for task in TASKS:
            scores = (
                accuracies(found, dial, task, 0, 0),
                accuracies(found, dial, task, source, target),
                accuracies(found, dial, task, source, target, "ToCom"),
                accuracies(found, dial, task, target, target),
            )
            row = {"source": source, "target": target, "task": task}
            row |= dict(zip(columns, scores, strict=True))
            means = dict(zip(columns, map(statistics.mean, scores), strict=True))
            gap = means["matched"] - means["mismatched"]
            won = means["compensated"] - means["mismatched"]
            rows.append(row | {"gap": gap, "won": won})
            cells = (
                f"{statistics.mean(some):.1f} ± {statistics.stdev(some):.1f}" for some in scores
            )
            share = f"{won / gap:.0%}" if gap >= 1 else "-"
            print(f"| {source} → {target} | {task} | {' | '.join(cells)} | {gap:.1f} | {share} |")
    return rows


def ablation(dial: str, found: Answers) -> list[dict[str, Any]]:
    """Print and return the mean accuracy over tasks and seeds for each ablation."""
    pairs = ablation_pairs(dial)
    print(f"\n| {dial} | {' | '.join(f'{source} → {target}' for source, target in pairs)} |")
    print("|---" * (len(pairs) + 1) + "|")
    rows = []
    for name in (None, "ToCom", *ABLATIONS):
        means = [
            statistics.mean(
                statistics.mean(accuracies(found, dial, task, *pair, name)) for task in TASKS
            )
            for pair in pairs
        ]
        rows.append({"compensator": name} | dict(zip(map(str, pairs), means, strict=True)))
        print(f"| {name or 'none'} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return rows


def scenes_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The options of a benchmark that trains on scenes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=doc.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evidence_tocom"))
    parser.add_argument("--scenes", type=int, default=3000, help="Training scenes of each task.")
    parser.add_argument(
        "--unlabelled", type=int, default=20000, help="Training scenes of a compensator."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time.")
    return parser


def main(arguments: list[str]) -> None:
    """Train, measure, print the tables, and write the result."""
    parser = scenes_parser("evidence_tocom", __doc__)
    parser.add_argument("--ablate", nargs="*", choices=DIALS, default=["tome"])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    ablations = {dial: ABLATIONS if dial in options.ablate else {} for dial in DIALS}
    wanted = [q for dial in DIALS for q in questions(dial, list(ablations[dial]))]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [
            pool.submit(train_compensator, dial, name, settings, options)
            for dial in DIALS
            for name, settings in ({"ToCom": {}} | ablations[dial]).items()
        ]
        models = dict.fromkeys(question.fine_tuned_model for question in wanted)
        runs += [pool.submit(model.train, options) for model in models]
        for run in runs:
            run.result()
    found = answers(wanted, options)
    result = {
        "tables": {dial: table(dial, found) for dial in DIALS},
        "ablations": {dial: ablation(dial, found) for dial in options.ablate},
        "scenes": options.scenes,
        "unlabelled": options.unlabelled,
        "answers": [asdict(question) | answer for question, answer in found.items()],
    }
    write_json("evidence_tocom", {"batch": 50} | result)
