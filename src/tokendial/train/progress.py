"""What is shown while work goes on: a bar in a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 30.0


class Bar:
    """How much is done and how long the rest takes; a line every half minute without a terminal."""

    def __init__(self, console: Console, *, done: int = 0, quiet: bool = False) -> None:
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
        self._first = done

    def update(self, done: int, total: int, text: str) -> None:
        """Show that `done` of `total` parts are done, behind `text`."""
        now = time.monotonic()
        self.bar.update(self.task, completed=done, total=total, description=text)
        if self.quiet or self.console.is_terminal or now - self._last_line < _LINE_EVERY_S:
            return
        self._last_line = now
        left = (now - self._start) / max(done - self._first, 1) * (total - done)
        self.console.print(f"{text} {done}/{total}, {left / 60:.1f} min left", highlight=False)

    def note(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            self.bar.console.print(text, highlight=False)


@contextmanager
def bar(console: Console, *, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """Show progress while the block runs."""
    shown = Bar(console, done=done, quiet=quiet)
    with shown.bar:
        yield shown


class Display:
    """What a training run shows: loss, share of hits, images per second, time that is left."""

    def __init__(self, shown: Bar, total: int, *, shows: str) -> None:
        self.bar, self.total, self.shows = shown, total, shows
        self._start, self._images = time.monotonic(), 0

    def update(self, epoch: int, done: int, images: int, loss: float, hits: float) -> None:
        """Show the state after update `done`, which took `images` images."""
        self._images += images
        speed = self._images / max(time.monotonic() - self._start, 1e-9)
        text = f"epoch {epoch} loss {loss:.4f} {self.shows} {hits:.1%} {speed:.0f} images/s"
        self.bar.update(done, self.total, text)

    def note(self, text: str) -> None:
        """Print a line."""
        self.bar.note(text)


@contextmanager
def display(total: int, done: int, *, shows: str, quiet: bool) -> Iterator[Display]:
    """Show the progress of a training run while the block runs."""
    with bar(Console(), done=done, quiet=quiet) as shown:
        yield Display(shown, total, shows=shows)
