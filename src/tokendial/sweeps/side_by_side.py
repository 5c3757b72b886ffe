"""Many runs, one after the other or side by side, shared with other processes by locks.

Each run has a log beside its folder, and the process that trains it holds a lock on that log. The
operating system releases the lock when its owner dies, however it dies, so none is ever stale. A
process that was started for a run has the log as its output and keeps the lock by that, also when
the process that started it is gone.
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

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Planned:
    """A run that is to be trained."""

    name: str
    """What it is called in tables and messages."""
    settings: dict[str, str]
    """What sets it apart: values as in YAML, by field."""
    recipe: Recipe
    """Of the run; `output` is its folder."""

    @property
    def run(self) -> Run:
        """Its folder."""
        return Run(self.recipe.output)

    @property
    def log(self) -> Path:
        """The file beside the folder that takes its output, or the traceback of its error."""
        return Path(f"{self.recipe.output}.log")


class _Process:
    """A run in a process of its own."""

    def __init__(
        self, planned: Planned, log: TextIO, recipes: Path, environment: dict[str, str]
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
        # The lock is its own from now on.
        log.close()

    def ended(self) -> bool:
        """Whether it has come to its end."""
        return self._process.poll() is not None

    def error(self) -> str | None:
        """Of one that has ended: what went wrong, in one line."""
        code = self._process.returncode
        if code == 0:
            return None
        if code < 0:
            return f"killed by signal {-code} ({signal.Signals(-code).name})"
        return _last_line(self.planned.log).removeprefix("error: ") or f"exit code {code}"

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        self._process.terminate()


def _train_here(planned: Planned, log: TextIO, *, quiet: bool) -> str | None:
    """Train in this process; what went wrong, in one line."""
    try:
        train(planned.recipe, quiet=quiet)
    except InterruptedRunError:
        raise
    except Exception as error:  # whatever it is, the other runs are to be trained
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
    runs: Sequence[Planned], *, jobs: int | None = None, quiet: bool = False
) -> dict[str, str]:
    """Train what is not finished yet, as `train` does; what others train is waited for.

    Any number of processes and machines that share the folders may do this at the same time.

    Args:
        runs: What is to be trained.
        jobs: How many to train side by side, each in a process of its own and on one GPU (in
            turn, if there are more than GPUs). None: as many as there are GPUs; without any, one
            after the other in this process.
        quiet: Print nothing.

    Returns:
        What went wrong, by name; all other runs are finished.

    Raises:
        ValueError: If jobs is not positive, or this process is one of several of a launcher.
        InterruptedRunError: If the process was asked to stop; the runs have checkpoints.
    """
    gpus = _gpus()
    jobs = max(1, len(gpus)) if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs must be positive, got {jobs}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("jobs: start this without a launcher, it starts its processes itself.")
    left, errors = list(runs), dict[str, str]()
    running: dict[int, _Process] = {}
    waiting = False
    with stop_requests() as stop, tempfile.TemporaryDirectory() as recipes:
        try:
            while left or running:
                for slot, process in [*running.items()]:
                    if process.ended():
                        del running[slot]
                        _note(process.planned, process.error(), errors, quiet=quiet)
                if stop.asked:
                    raise InterruptedRunError
                free = [slot for slot in range(jobs) if slot not in running]
                taken = _take(left, errors) if free else None
                if taken is None:
                    if left and not running and not waiting and not quiet:
                        print(f"waiting for {len(left)} that others train", flush=True)
                    waiting = not running
                    if left or running:
                        time.sleep(_POLL_S)
                    continue
                waiting = False
                planned, log = taken
                if not quiet:
                    print(f"{planned.name}: training, {len(left)} left", flush=True)
                if jobs == 1 and not gpus:
                    _note(planned, _train_here(planned, log, quiet=quiet), errors, quiet=quiet)
                else:
                    environment = _environment(free[0], jobs, gpus)
                    running[free[0]] = _Process(planned, log, Path(recipes), environment)
        finally:
            for process in running.values():
                process.stop()
            while not all(process.ended() for process in running.values()):
                time.sleep(_POLL_S)
    return errors


def _note(planned: Planned, error: str | None, errors: dict[str, str], *, quiet: bool) -> None:
    if error is not None:
        errors[planned.name] = error
    if not quiet:
        print(f"{planned.name}: {error or 'finished'}", flush=True)


def _take(left: list[Planned], errors: dict[str, str]) -> tuple[Planned, TextIO] | None:
    """The first run that nobody trains, and its lock.

    Those that are finished leave the list, and those that diverged: they would do so again.
    """
    for planned in [*left]:
        log = _lock(planned.log)
        if log is None:
            continue
        left.remove(planned)
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
    """The file, ours alone until it is released or its last holder dies; None: another's."""
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

    # Closing is not enough: a process that loads images may have the file, too.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def _environment(slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """What a process gets of the machine: one GPU, and its share of the cores."""
    share = str(max(1, (os.cpu_count() or 1) // jobs))
    given = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
    return given | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})
