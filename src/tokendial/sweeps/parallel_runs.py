"""Training of many runs, one by one or in parallel, shared with other processes by locks.

Beside the folder of each run lies its log. The process that trains the run holds a lock on the log,
so that processes of several sweeps, even on several machines, never train the same run. The
operating system releases the lock when its owner ends, even if it is killed, so no lock outlives
its owner. A process that was started for a run has the log as its output. It keeps the lock in that
way, even after the process that started it has ended.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from tokendial.errors import error_message
from tokendial.runs.recipe import Recipe
from tokendial.runs.run import Run
from tokendial.signals import stop_requests
from tokendial.train.fine_tuning import train
from tokendial.train.loop import NOT_FINITE, InterruptedRunError

_SECONDS_BETWEEN_POLLS = 0.1


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run to be trained, as part of a sweep."""

    name: str
    """Name of the run: its folder below that of the sweep. Tables and messages use it."""
    settings: dict[str, str]
    """The swept fields of the run with their values, as JSON."""
    recipe: Recipe
    """Recipe of the run. Its `output` is the folder of the run."""

    @property
    def run(self) -> Run:
        """The run in its folder."""
        return Run(self.recipe.output)

    @property
    def log(self) -> Path:
        """The file beside the folder for the output of the run, or the traceback of its error."""
        return Path(f"{self.recipe.output}.log")


class _Process:
    """A run that is trained in a process of its own."""

    def __init__(
        self, planned: PlannedRun, log: TextIO, recipes: Path, environment: dict[str, str]
    ) -> None:
        self.planned = planned
        file = recipes / f"{len(list(recipes.iterdir()))}.yaml"
        file.write_text(planned.recipe.to_yaml())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokendial.cli", "train", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
        )
        # The new process has the file as its output, and so holds the lock from now on.
        log.close()

    def ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def error(self) -> str | None:
        """The error of a process that has ended, in one line; None if there was none."""
        code = self._process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        return _last_line(self.planned.log).removeprefix("error: ") or f"exit code {code}"

    def stop(self) -> None:
        """Ask the process to write a checkpoint and end."""
        self._process.terminate()


def _train_here(planned: PlannedRun, log: TextIO, *, quiet: bool) -> str | None:
    """Train a run in this process. Returns its error in one line; None if there was none."""
    try:
        train(planned.recipe, quiet=quiet)
    except InterruptedRunError:
        raise
    except (
        Exception
    ) as error:  # an error of any kind must not keep the other runs from being trained
        traceback.print_exc(file=log)
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        return kind + error_message(error)
    finally:
        _release(log)
    return None


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def run_all(
    runs: Sequence[PlannedRun], *, jobs: int | None = None, quiet: bool = False
) -> dict[str, str]:
    """Train all runs that are not finished, and wait for those that other processes train.

    Any number of processes, on machines that share the folders, may call this at the same time.

    Args:
        runs: The runs to train.
        jobs: Number of runs to train at the same time, each in a process of its own on one GPU;
            with more jobs than GPUs, jobs share GPUs. None means the number of GPUs. On a machine
            without GPUs, None or 1 means one run after the other, in this process.
        quiet: Whether to print nothing.

    Returns:
        Errors, one line each, by the name of the run. All other runs are finished.

    Raises:
        ValueError: If `jobs` is not positive, or a launcher started this process as one of several.
        InterruptedRunError: If a signal asked the process to stop. All runs have checkpoints.
    """
    gpus = _gpus()
    jobs = max(1, len(gpus)) if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs must be positive, got {jobs}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("jobs: start this without a launcher, it starts its processes itself.")
    remaining, errors = list(runs), dict[str, str]()
    running: dict[int, _Process] = {}
    waiting_printed = False
    with stop_requests() as stop, tempfile.TemporaryDirectory() as recipes:
        try:
            # `remaining` holds the runs that are neither finished nor trained here. A run that
            # another process trains stays in it until its lock is free: then it is finished, or
            # this process claims and resumes it.
            while remaining or running:
                for slot, process in [*running.items()]:
                    if process.ended():
                        del running[slot]
                        _record_end(process.planned, process.error(), errors, quiet=quiet)
                if stop.requested:
                    raise InterruptedRunError
                free = [slot for slot in range(jobs) if slot not in running]
                claimed = _claim_next(remaining, errors) if free else None
                if claimed is None:
                    if remaining and not running and not waiting_printed and not quiet:
                        print(f"waiting for {len(remaining)} that others train", flush=True)
                    waiting_printed = not running
                    if remaining or running:
                        time.sleep(_SECONDS_BETWEEN_POLLS)
                    continue
                waiting_printed = False
                planned, log = claimed
                if not quiet:
                    print(f"{planned.name}: training, {len(remaining)} left", flush=True)
                if jobs == 1 and not gpus:
                    _record_end(
                        planned, _train_here(planned, log, quiet=quiet), errors, quiet=quiet
                    )
                else:
                    environment = _environment(free[0], jobs, gpus)
                    running[free[0]] = _Process(planned, log, Path(recipes), environment)
        finally:
            for process in running.values():
                process.stop()
            while not all(process.ended() for process in running.values()):
                time.sleep(_SECONDS_BETWEEN_POLLS)
    return errors


def _record_end(
    planned: PlannedRun, error: str | None, errors: dict[str, str], *, quiet: bool
) -> None:
    """Note the error of a run that has ended, if any, and print how it ended."""
    if error is not None:
        errors[planned.name] = error
    if not quiet:
        print(f"{planned.name}: {error or 'finished'}", flush=True)


def _claim_next(
    remaining: list[PlannedRun], errors: dict[str, str]
) -> tuple[PlannedRun, TextIO] | None:
    """Lock the first remaining run that no process trains. Returns it with its locked log.

    Finished runs are removed from the list on the way, and so are runs that diverged, because they
    would diverge again.
    """
    for planned in [*remaining]:
        log = _lock(planned.log)
        if log is None:
            continue
        remaining.remove(planned)
        try:
            begun = planned.run.has_recipe(planned.recipe)
            _, diverged, update = _last_line(planned.log).partition(NOT_FINITE)
            if not begun or not (planned.run.finished or diverged):
                return planned, log
            if diverged:
                errors[planned.name] = diverged + update
        except ValueError as error:  # another run is in its folder
            errors[planned.name] = error_message(error)
        _release(log)
    return None


def _lock(path: Path) -> TextIO | None:
    """Open and lock a file. Returns None if another process has locked it."""
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _release(file: TextIO) -> None:
    import fcntl

    # Closing the file would not unlock it: processes that load images inherit it.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _gpus() -> list[str]:
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(number) for number in range(count)])[:count]


def _environment(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """Environment variables that give a process one GPU and its part of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    return variables | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
