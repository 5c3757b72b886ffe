"""The fastest way to run a run's model within a loss: schedules, runtimes, precisions, cascades."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tokendial.cascade import Cascade
from tokendial.compensate import Compensator
from tokendial.model.dial_vit import DialViT
from tokendial.runs.compensated import load_compensated, load_to_compensate
from tokendial.runs.degrees import spread_degrees
from tokendial.runs.derived_run import write_derived_run
from tokendial.runs.evaluate import first_images, validation_set
from tokendial.runs.fit import fit_run
from tokendial.runs.run import Run
from tokendial.runs.training_images import calibration_images
from tokendial.runs.trial import Trial, TunedRow, evaluate_ways
from tokendial.runs.ways import BASE, RUNTIMES, StartedRuntimes, Way

"""File in the folder of a tuned model: what was tried, and how to run the best of it."""
_DEGREES = 7
_TIMED = 20
"""Batches that a cascade is timed on."""
_FITTING = 0.3
"""Share of the time that the search of schedules may take."""
_MORE_IN = 2
"""Number of runtimes, the fastest ones, in which fitted schedules and compensators are tried."""


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

    plugin = Compensator.from_pretrained(compensator) if compensator else None
    model = (load_to_compensate(run, plugin) if plugin else run.model()).eval()
    trained = model.degree
    bridged = load_compensated(run, compensator).eval() if compensator else None
    task, loader = validation_set(run, model, batch_size)
    example = first_images(loader, model, batch_size)
    degrees = spread_degrees(model, _DEGREES)
    base = Way("own", BASE, (0,))
    with tempfile.TemporaryDirectory() as folder:
        calibration = partial(calibration_images, run)
        runtimes = StartedRuntimes(example, calibration, Path(folder), time_is_up, note, notes)
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
        trial = Trial(task, loader, runtimes.started, seconds, base, batches)
        rows = evaluate_ways(trial, speedup, max_loss, time_is_up, note, notes)
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
    is_tuned = Run(out).tuned_file.exists()
    if out.exists() and not is_tuned and (out.is_file() or any(out.iterdir())):
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
    written = Run(out)
    files = {written.tuned_file.name: json.dumps(record, indent=2) + "\n"}
    write_derived_run(model, run, out, degree=degree, files=files)
    written.cascade_file.unlink(missing_ok=True)
    if cascade is not None:
        numerics = way.runtime.numerics
        cascade.save(written.cascade_file, revision=written.revision(), numerics=numerics)
