"""Signals that ask a run to stop: Ctrl-C, and the SIGTERM of schedulers and containers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True)
class StopRequest:
    """Whether this process has been asked to stop."""

    asked: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals in place of dying of them, while the block runs."""
    request = StopRequest()

    def ask(signum: int, frame: FrameType | None) -> None:
        request.asked = True

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(worker: int) -> None:
    """Make a loading process deaf to the signals; its parent ends it.

    They often go to the whole process group, and a run whose loading processes die cannot finish
    the update at hand.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
