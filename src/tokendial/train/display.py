"""The display of a training run on the terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from tokendial.runs.progress import ProgressBar, progress_bar


class TrainingDisplay:
    """Shows the epoch, the loss, the training score and the images per second."""

    def __init__(self, bar: ProgressBar, updates: int, score_name: str) -> None:
        """Set up the display.

        Args:
            bar: The bar to show it in.
            updates: Updates of the whole run.
            score_name: Name of the score of training batches, such as "accuracy".
        """
        self.bar, self.updates, self.score_name = bar, updates, score_name
        self._start, self._images = time.monotonic(), 0

    def update(self, epoch: int, done: int, images: int, loss: float, score: float) -> None:
        """Show the state after an update.

        Args:
            epoch: Number of the epoch, counted from 1.
            done: Updates finished so far.
            images: Images in this update, of all processes together.
            loss: Mean loss of the update.
            score: Mean training score of the update, at most 1.
        """
        self._images += images
        speed = self._images / max(time.monotonic() - self._start, 1e-9)
        text = f"epoch {epoch} loss {loss:.4f} {self.score_name} {score:.1%} {speed:.0f} images/s"
        self.bar.update(done, self.updates, text)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.print(text)


@contextmanager
def training_display(
    updates: int, *, done: int, score_name: str, quiet: bool
) -> Iterator[TrainingDisplay]:
    """Show a `TrainingDisplay` while the block runs.

    Args:
        updates: Updates of the whole run.
        done: Updates that were finished before, in a resumed run.
        score_name: Name of the score of training batches, such as "accuracy".
        quiet: Whether to show nothing.
    """
    with progress_bar(Console(), done=done, quiet=quiet) as bar:
        yield TrainingDisplay(bar, updates, score_name)
