"""Signals that ask a run to stop: Ctrl-C, a closed terminal, job schedulers, containers."""

import atexit
import multiprocessing.util  # its own exit handler has to be registered before ours
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Windows has only the first two. SIGHUP: closed terminal; SIGQUIT: Ctrl-\; SIGXCPU: CPU time limit.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@dataclass(slots=True, eq=False)
class StopRequest:
    """Says whether this process has been asked to stop."""

    requested: bool = False
    """Whether a signal has arrived."""


_open_requests: list[StopRequest] = []


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record stop signals while the block runs, instead of ending the process.

    A signal reaches all nested blocks, such as a run in a sweep, and blocks that begin later inside
    of them. Under `nohup`, closing the terminal is ignored.
    """
    request = StopRequest(requested=any(outer.requested for outer in _open_requests))

    def ask(signum: int, frame: FrameType | None) -> None:
        for each in _open_requests:
            each.requested = True

    _open_requests.append(request)
    handled = [number for number in _SIGNALS if not _under_nohup(number)]
    before = {number: signal.signal(number, ask) for number in handled}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _open_requests.remove(request)


def _under_nohup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


def ignore_stop_signals(worker: int) -> None:
    """Ignore stop signals in a data loading process; its parent ends it.

    Signals often go to the whole process group. A run whose loading processes die could not finish
    its current update.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_loading_processes() -> None:
    """Kill the data loading processes that are left when Python ends, for instance after an error.

    Without this, multiprocessing would ask them to terminate, which they ignore, and wait forever.
    """
    if hasattr(signal, "SIGCHLD"):  # not on Windows; torch's handler would report a crash
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
