"""Signals that ask a run to stop: from the keyboard, a closed terminal, schedulers, containers."""

import atexit
import multiprocessing.util  # its own exit handler has to be registered before ours
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Windows has the first two. The others: a closed terminal, Ctrl-\, a limit on processor time.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


@dataclass(slots=True, eq=False)
class StopRequest:
    """Whether this process has been asked to stop."""

    asked: bool = False


_open: list[StopRequest] = []


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals in place of dying of them, while the block runs.

    Of blocks inside each other, as of a run in a sweep, all are told; also those that begin later.
    A closed terminal is no matter to what `nohup` has started.
    """
    request = StopRequest(asked=any(outer.asked for outer in _open))

    def ask(signum: int, frame: FrameType | None) -> None:
        for each in _open:
            each.asked = True

    _open.append(request)
    heard = [number for number in _SIGNALS if not _under_nohup(number)]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _open.remove(request)


def _under_nohup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


def leave_signals_to_the_parent(worker: int) -> None:
    """Make a loading process deaf to the signals; its parent ends it.

    They often go to the whole process group, and a run whose loading processes die cannot finish
    the update at hand.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_loading_processes() -> None:
    """Kill what still loads when Python ends, after an error for instance.

    Without this, multiprocessing would ask the deaf processes to terminate and wait for ever.
    """
    if hasattr(signal, "SIGCHLD"):  # not on Windows; torch's handler would call the end a crash
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
