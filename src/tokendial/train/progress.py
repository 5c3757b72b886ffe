"""What a training run shows while it works: a bar in a terminal, lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 30.0


class Display:
    """Shows loss, share of hits, images per second and remaining time."""

    def __init__(self, console: Console, total: int, done: int, *, shows: str, quiet: bool) -> None:
        self.console, self.total, self.shows, self.quiet = console, total, shows, quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=total, completed=done)
        self._start = self._last_line = time.monotonic()
        self._first, self._images = done, 0

    def update(self, epoch: int, done: int, images: int, loss: float, hits: float) -> None:
        """Show the state after update `done`, which took `images` images."""
        self._images += images
        now = time.monotonic()
        speed = self._images / max(now - self._start, 1e-9)
        text = f"epoch {epoch} loss {loss:.4f} {self.shows} {hits:.1%} {speed:.0f} images/s"
        self.bar.update(self.task, completed=done, description=text)
        if (
            not self.quiet
            and not self.console.is_terminal
            and now - self._last_line > _LINE_EVERY_S
        ):
            self._last_line = now
            left = (now - self._start) / (done - self._first) * (self.total - done)
            self.console.print(f"{text} update {done}/{self.total}, {left / 60:.1f} min left")

    def note(self, text: str) -> None:
        """Print a line."""
        if not self.quiet:
            self.bar.console.print(text, highlight=False)


@contextmanager
def display(total: int, done: int, *, shows: str, quiet: bool) -> Iterator[Display]:
    """Show progress while the block runs."""
    shown = Display(Console(), total, done, shows=shows, quiet=quiet)
    with shown.bar:
        yield shown
