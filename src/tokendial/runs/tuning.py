"""The fastest way to run a run's model within a loss: schedules, runtimes, precisions, cascades."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.cascade import Cascade, choose_thresholds
from tokendial.compensate import Compensator
from tokendial.measure import Interval, mean_difference
from tokendial.model.dial import InferenceModel
from tokendial.model.dial_vit import DialViT
from tokendial.runs.cascade import time_cascade
from tokendial.runs.compensated import load_compensated, load_to_compensate
from tokendial.runs.degrees import spread_degrees
from tokendial.runs.derived_run import write_derived_run
from tokendial.runs.evaluate import evaluate_loader, first_images, main_score, validation_set
from tokendial.runs.fit import fit_run
from tokendial.runs.run import Run
from tokendial.runs.stored_logits import collect_logits, right_answers, scores_of
from tokendial.runs.ways import BASE, RUNTIMES, Schedule, StartedRuntimes, Way
from tokendial.runtimes import Runtime
from tokendial.tasks import Classification, Task, VideoClassification

TUNED_FILE = "tuned.json"
"""File in the folder of a tuned model: what was tried, and how to run the best of it."""
_DEGREES = 7
_TIMED = 20
"""Batches that a cascade is timed on."""
_FITTING = 0.3
"""Share of the time that the search of schedules may take."""
_MORE_IN = 2
"""Number of runtimes, the fastest ones, in which fitted schedules and compensators are tried."""


@dataclass(frozen=True, slots=True)
class TunedRow:
    """One way to run a model, measured and evaluated."""

    way: Way
    """The way."""
    speedup: float
    """How many times as fast it is as degree 0 in PyTorch and float32."""
    score: float
    """The run's main metric on the validation set."""
    lost: float
    """What it loses of that at degree 0 in PyTorch and float32."""
    accuracy_lost: Interval | None
    """Accuracy lost, paired by image; None unless the task is classification with one label."""

    @property
    def most_lost(self) -> float:
        """What is lost of the main metric or of the accuracy, whichever lost more. Another metric
        alone can rise while many answers change, if the classes are not balanced."""
        return max(self.lost, self.accuracy_lost.value if self.accuracy_lost else self.lost)


@dataclass(frozen=True, slots=True)
class TunedRun:
    """The result of a tuning."""

    metric: str
    """Name of the main metric."""
    base_score: float
    """The main metric at degree 0 in PyTorch and float32."""
    rows: list[TunedRow]
    """All ways that were evaluated, from the fastest on."""
    best: TunedRow | None
    """The chosen one; None: nothing reaches what was asked for."""
    notes: list[str]
    """What could not be tried, and why."""


def tune_run(
    run: Run,
    *,
    speedup: float = 1.0,
    max_loss: float = 0.01,
    out: Path | None = None,
    compensator: str | Path | None = None,
    batch_size: int = 8,
    minutes: float = 15.0,
    note: Callable[[str], None] = lambda text: None,
) -> TunedRun:
    """Find the fastest way to run a run's best model on this machine's CPU within a loss; save it.

    Tried are: the degrees of the dial, fitted schedules of the same costs, a compensator if there
    is one, the installed runtimes in each of their precisions, and cascades to degree 0. All are
    timed in turns, and evaluated from the fastest on until one is within the loss. The faster ones
    are then tried as cascades.

    Args:
        run: A run. Cascades are tried for those that classify images.
        speedup: How many times as fast as degree 0 in PyTorch and float32 it has to be at least.
        max_loss: How much of the main metric, and of the accuracy, may be lost: 0.01 for one point.
        out: Folder for the tuned model; None: "tuned" in the folder of the run.
        compensator: Folder of a compensator to try. The tuned model is saved without it. None:
            none.
        batch_size: Images per forward pass, for times and metrics.
        minutes: Time after which nothing new is started.
        note: Called with a line of text when a stage begins.

    Returns:
        What was tried. If there is a best way, its model is in `out`, which can be used like a run,
        with the cascade and with `tuned.json`.

    Raises:
        ValueError: If a number is out of range, the compensator does not fit the run, or `out`
            holds other files.
    """
    out = out or run.folder / "tuned"
    _check(speedup, max_loss, out)
    begin, notes = time.monotonic(), list[str]()

    def time_is_up() -> bool:
        return time.monotonic() - begin > 60 * minutes

    bridged = load_compensated(run, compensator).eval() if compensator else None
    plugin = Compensator.from_pretrained(compensator) if compensator else None
    model = (load_to_compensate(run, plugin) if plugin else run.model()).eval()
    trained = model.degree
    task, loader = validation_set(run, model, batch_size)
    example = first_images(loader, model, batch_size)
    degrees = spread_degrees(model, _DEGREES)
    base = Way("own", BASE, (0,))
    with tempfile.TemporaryDirectory() as folder:
        runtimes = StartedRuntimes(example, Path(folder), time_is_up, note, notes)
        runtimes.start("own", model, degrees, RUNTIMES)
        ways = [Way("own", r, (d,)) for _, r in runtimes.started for d in degrees]
        note(f"measuring {len(ways)} ways in turns")
        seconds = runtimes.measure(ways)
        fastest = sorted(
            {way.runtime for way in ways},
            key=lambda r: sum(seconds[w] for w in ways if w.runtime == r),
        )[:_MORE_IN]
        if bridged is not None:
            reached = sorted({*degrees} & {*bridged.degrees})
            runtimes.start("compensated", bridged, reached, fastest)
            # A compensator costs nothing.
            seconds |= {
                replace(way, schedule="compensated"): seconds[way]
                for way in ways
                if ("compensated", way.runtime) in runtimes.started and way.degrees[0] in reached
            }
        note("searching schedules")
        try:
            fitted = _fitted(run, model, degrees, Path(folder, "fit"), minutes * _FITTING)
            runtimes.start("fitted", fitted, list(fitted.degrees), fastest)
            ways = [
                Way("fitted", r, (d,))
                for s, r in runtimes.started
                if s == "fitted"
                for d in fitted.degrees
                if d
            ]
            note(f"measuring {len(ways)} more")
            again = runtimes.measure([base, *ways])
            seconds |= {way: again[way] * seconds[base] / again[base] for way in ways}
        except ValueError as error:
            notes.append(f"fitted schedules: {error}")
            fitted = model
        batches = torch.split(first_images(loader, model, _TIMED * batch_size), batch_size)
        trial = _Trial(task, loader, runtimes.started, seconds, base, batches)
        rows = _evaluate(trial, speedup, max_loss, time_is_up, note, notes)
    fits = [row for row in rows if row.most_lost <= max_loss and row.speedup >= speedup]
    best = max(fits, key=lambda row: row.speedup, default=None)
    rows.sort(key=lambda row: -row.speedup)
    found = TunedRun(trial.metric, trial.base.score, rows, best, notes)
    if best is not None:
        tuned = fitted if best.way.schedule == "fitted" else model
        compensated = best.way.schedule == "compensated"
        # A compensator leads from the degree that a run says it was trained at.
        degree = trained if compensated else best.way.degrees[0]
        cascade = trial.cascades.get(best.way)
        _write(run, tuned, degree, cascade, found, out, compensator if compensated else None)
    return found


def _check(speedup: float, max_loss: float, out: Path) -> None:
    """Raise a ValueError unless `tune_run` can do what it is asked for."""
    for name, value in (("speedup", speedup), ("max_loss", max_loss)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value}.")
    if out.exists() and not (out / TUNED_FILE).exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and holds no tuned model.")


def _fitted(
    run: Run, model: DialViT, degrees: Sequence[int], folder: Path, minutes: float
) -> DialViT:
    """The model with schedules that cost as much as degrees of its own."""
    # At the highest degree nothing is left to choose. A search for every second of the others has
    # twice the time for each.
    between = [degree for degree in degrees if 0 < degree < model.degrees[-1]]
    gmacs = [model.cost(degree).gmacs for degree in between[len(between) > 1 :: 2]]
    fit_run(run, folder, {"gmacs": gmacs}, device="cpu", minutes=minutes)
    return Run(folder).model().eval()


class _Trial:
    """Evaluates ways on the validation set, each of them once."""

    def __init__(
        self,
        task: Task,
        loader: DataLoader[Any],
        started: Mapping[tuple[Schedule, Runtime], InferenceModel],
        seconds: dict[Way, float],
        base: Way,
        batches: Sequence[Tensor],
    ) -> None:
        self.task, self.loader, self.started, self.seconds = task, loader, started, seconds
        self.batches = batches
        """Batches that cascades are timed on."""
        self.metric = ""
        self.logits: dict[Way, Tensor] = {}
        """Logits [N, K] of ways that were evaluated, if the task is classification."""
        self.labels = torch.empty(0)
        self.cascades: dict[Way, Cascade] = {}
        """Calibrated cascades."""
        self.base = TunedRow(base, 1.0, 0.0, 0.0, None)
        """Degree 0 in PyTorch and float32."""
        self.base = self.row(base)

    def speedup(self, way: Way) -> float:
        """How many times as fast a way of one degree is as the base."""
        return self.seconds[self.base.way] / self.seconds[way]

    def row(self, way: Way) -> TunedRow:
        """Evaluate a way of one degree."""
        if way == self.base.way and self.metric:  # it was the first
            return self.base
        model, degree = self.started[way.schedule, way.runtime], way.degrees[0]
        if not isinstance(self.task, Classification):
            model.set_degree(degree)
            scores = evaluate_loader(model, self.loader, self.task)
            return self._row(way, self.speedup(way), scores, None)
        logits, self.labels = collect_logits(model, [degree], self.loader, self.task)
        self.logits[way] = logits[degree]
        return self._classified(way, self.speedup(way), logits[degree])

    def cascade_row(self, cheap: Way, max_loss: float, least: float) -> TunedRow | None:
        """Evaluate the cascade from a way to degree 0 in the same runtime.

        Args:
            cheap: The way of its first stage.
            max_loss: Largest share of lost answers.
            least: Speed-up that it has to exceed; None is returned if the times of its degrees and
                the share that is sent on say that it cannot.

        Raises:
            ValueError: If there are too few images to calibrate it.
        """
        assert isinstance(self.task, Classification)
        whole = replace(cheap, schedule="own", degrees=(0,))
        if whole not in self.logits:
            self.row(whole)
        way = replace(cheap, degrees=(*cheap.degrees, 0))
        cascade = Cascade(
            self.started[way.schedule, way.runtime],
            way.degrees,
            multi_label=self.task.multi_label,
        )
        both = torch.stack([self.logits[cheap], self.logits[whole]])
        observations = cascade.compare(list(both), self.labels, "lost")
        cascade.calibration = found = choose_thresholds(observations, "lost", max_loss)
        self.cascades[way] = cascade
        stages = observations.stage_of(found.thresholds)
        expected = self.seconds[cheap] + float(stages.float().mean()) * self.seconds[whole]
        if self.seconds[self.base.way] / expected <= least:
            return None
        ours, its = (sum(each.times) for each in time_cascade(cascade, [0], self.batches))
        seconds = self.seconds[whole] * ours / its
        logits = both[stages, torch.arange(len(stages))]
        return self._classified(way, self.seconds[self.base.way] / seconds, logits)

    def _classified(self, way: Way, speedup: float, logits: Tensor) -> TunedRow:
        assert isinstance(self.task, Classification)
        scores = scores_of(self.task, logits, self.labels)
        lost = None
        if not self.task.multi_label and self.base.way in self.logits:
            base_right, right = (
                right_answers(self.task, each, self.labels)
                for each in (self.logits[self.base.way], logits)
            )
            lost = mean_difference(base_right, right)
        return self._row(way, speedup, scores, lost)

    def _row(
        self, way: Way, speedup: float, scores: dict[str, float], lost: Interval | None
    ) -> TunedRow:
        self.metric, score = next(iter(scores)), main_score(scores)
        base_score = score if way == self.base.way else self.base.score
        return TunedRow(way, speedup, score, base_score - score, lost)


def _evaluate(
    trial: _Trial,
    speedup: float,
    max_loss: float,
    time_is_up: Callable[[], bool],
    note: Callable[[str], None],
    notes: list[str],
) -> list[TunedRow]:
    """Evaluate ways from the fastest on until one is within the loss, then faster cascades."""
    rows: list[TunedRow] = []
    for way in sorted(trial.seconds, key=trial.seconds.__getitem__):
        if trial.speedup(way) < speedup or (rows and rows[-1].most_lost <= max_loss):
            break
        if time_is_up():
            notes.append(f"not evaluated for want of time: {way} and slower ones")
            break
        note(f"evaluating {way}")
        rows.append(trial.row(way))
    classifies_images = isinstance(trial.task, Classification) and not isinstance(
        trial.task, VideoClassification
    )
    if not classifies_images or not max_loss:
        return rows
    # The last way is the fastest one within the loss, if any is: a cascade has to be faster.
    least = rows[-1].speedup if rows and rows[-1].most_lost <= max_loss else speedup
    for row in list(rows):
        if row.most_lost <= max_loss or not row.way.degrees[0] or time_is_up():
            continue
        if row.way.schedule == "compensated":  # its own degree 0 would have to be the second stage
            continue
        note(f"calibrating a cascade from {row.way}")
        try:
            if (found := trial.cascade_row(row.way, max_loss, least)) is not None:
                rows.append(found)
        except ValueError as error:
            notes.append(f"cascades: {error}")
            break
    return rows


def _write(
    run: Run,
    model: DialViT,
    degree: int,
    cascade: Cascade | None,
    found: TunedRun,
    out: Path,
    compensator: str | Path | None,
) -> None:
    """Save the chosen model as a run, with its cascade and with what was tried."""
    assert found.best is not None
    way = found.best.way
    model.set_degree(degree)
    record = {
        "runtime": way.runtime.name,
        "precision": way.runtime.precision,
        "degrees": list(way.degrees),
        "compensator": str(compensator) if compensator else None,
        "metric": found.metric,
        "base": found.base_score,
        "tried": [
            {"way": str(row.way), "speedup": row.speedup, found.metric: row.score}
            for row in found.rows
        ],
        "left out": found.notes,
    }
    files = {TUNED_FILE: json.dumps(record, indent=2) + "\n"}
    write_derived_run(model, run, out, degree=degree, files=files)
    written = Run(out)
    written.cascade_file.unlink(missing_ok=True)
    if cascade is not None:
        cascade.save(written.cascade_file, revision=written.revision())
