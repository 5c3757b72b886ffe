"""Progress of long work on the terminal: a bar, or lines where there is no terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class ProgressBar:
    """Shows how much is done and the time left. Without a terminal: a line every half minute."""

    def __init__(self, console: Console, *, done: int = 0, quiet: bool = False) -> None:
        """Set up the bar.

        Args:
            console: Where to show it.
            done: Steps that were finished before, as in a resumed run. The estimate of the time
                left does not count them.
            quiet: Whether to show nothing.
        """
        self.console, self.quiet = console, quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=None, completed=done)
        self._start = self._last_line = time.monotonic()
        self._done_before = done

    def update(self, done: int, total: int, text: str) -> None:
        """Show `text`, and that `done` of `total` steps are finished."""
        now = time.monotonic()
        self.bar.update(self.task, completed=done, total=total, description=text)
        if self.quiet or self.console.is_terminal or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        seconds_per_step = (now - self._start) / max(done - self._done_before, 1)
        minutes_left = seconds_per_step * (total - done) / 60
        self.console.print(f"{text} {done}/{total}, {minutes_left:.1f} min left", highlight=False)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.quiet:
            self.bar.console.print(text, highlight=False)


@contextmanager
def progress_bar(console: Console, *, done: int = 0, quiet: bool = False) -> Iterator[ProgressBar]:
    """Show a `ProgressBar` while the block runs."""
    shown = ProgressBar(console, done=done, quiet=quiet)
    with shown.bar:
        yield shown
