"""What is served: models that compute in processes of their own, and can be exchanged."""

import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.runs.device import default_device
from tokendial.runs.run import Run
from tokendial.serve.scheduling.controller import Rules
from tokendial.serve.scheduling.costs import Costs, measured_costs
from tokendial.serve.scheduling.engine import LostError
from tokendial.serve.scheduling.scheduler import Refused
from tokendial.serve.settings import Settings
from tokendial.serve.workers.apart import Loaded, Order
from tokendial.serve.workers.facts import Facts, revision_of
from tokendial.serve.workers.kept import Kept, Links, laid_out
from tokendial.serve.workers.models import Models, load_models
from tokendial.serve.workers.supervisor import Supervisor
from tokendial.serve.workers.token_view import TokenView

_VIEW_S = 20.0
"""For a view of tokens, which is not measured beforehand."""


class Served:
    """Runs as models of one backbone.

    `run`, `view` and `measured` are for one thread at a time, that of the engine once it runs; the
    rest is for any.
    """

    def __init__(self, runs: Mapping[str, Run], settings: Settings) -> None:
        """Load them.

        Args:
            runs: By the names that they are served under.
            settings: Compensator, speed, threads, the largest batch, and whether to keep a spare
                process.

        Raises:
            ValueError: If `load_models` cannot load them.
        """
        self._runs, self._settings = runs, settings
        self._reloading = threading.Lock()
        order, again, self._kept = self._orders()
        try:
            self._supervisor = Supervisor(
                partial(Loaded, order), partial(Loaded, again), spare=_with_spare(settings)
            )
        except LostError as error:
            _close(self._kept)
            raise ValueError(f"the models cannot be loaded: {error}") from None
        except BaseException:
            _close(self._kept)
            raise

    @property
    def facts(self) -> Facts:
        """What is known of the models."""
        return self._supervisor.facts

    @property
    def missing_s(self) -> float:
        """Seconds for which there has been no process that computes; 0: there is one."""
        return self._supervisor.missing_s

    def run(
        self, name: str, degree: int, images: Sequence[Tensor], within_s: float | None = None
    ) -> list[Tensor]:
        """Logits of each image.

        Args:
            name: Of the model.
            degree: Of the dial.
            images: [3, H, W] each.
            within_s: After which the process that has them is given up; None: it may take its time.

        Raises:
            LostError: If the process was lost with them; it is being replaced.
            Refused: If none can be had for a while.
        """
        process = self._supervisor.process()
        try:
            return process.run(name, degree, images, within_s)
        except LostError:
            self._supervisor.lost(process)
            raise

    def view(self, name: str, degree: int, image: Tensor) -> tuple[TokenView, str]:
        """The tokens of an image [3, H, W], and what the model sees of it: a PNG in base64."""
        process = self._supervisor.process()
        try:
            return process.view(name, degree, image, _VIEW_S)
        except LostError as error:
            self._supervisor.lost(process)
            raise Refused("lost", str(error), 1.0) from None

    def seconds(self, name: str, degree: int, images: int) -> float:
        """What a batch takes, of one random image several times.

        Raises:
            ValueError: If the process that had it is lost.
        """
        draw = torch.Generator().manual_seed(0)
        image = torch.randn(self.facts.input_shape, generator=draw)
        began = time.perf_counter()
        try:
            self.run(name, degree, [image] * images)
        except LostError as error:
            raise ValueError(
                f"{name}: {images} images at degree {degree} cannot be run: {error} If memory is "
                "short, reduce max_batch."
            ) from None
        return time.perf_counter() - began

    def measured(self, rules: Rules, degrees: Sequence[int]) -> Costs:
        """How long batches take here."""
        names, within = self.facts.names, rules.slo_s / 2
        return measured_costs(self.seconds, names, degrees, most=rules.max_batch, within_s=within)

    def reload(self, between_batches: Callable[[Callable[[], None]], Future[None]]) -> list[str]:
        """Read runs that have changed on disk since, while the old ones go on answering.

        For that time the models are in memory twice. Who asks meanwhile waits, and looks again.

        Args:
            between_batches: `Engine.call`.

        Returns:
            Names of those that have changed.

        Raises:
            ValueError: If one cannot be read any more, or is another kind of model now; everything
                stays as it was.
        """
        with self._reloading:
            old = self.facts
            changed = [n for n, run in self._runs.items() if revision_of(run) != old.revision(n)]
            if changed:
                self._exchange(between_batches)
            return changed

    def close(self) -> None:
        """End the processes; nothing can be run any more."""
        self._supervisor.close()
        _close(self._kept)

    def _exchange(self, between_batches: Callable[[Callable[[], None]], Future[None]]) -> None:
        order, again, kept = self._orders()
        try:
            loaded, process = self._supervisor.start(partial(Loaded, order))
        except BaseException:
            _close(kept)
            raise
        try:
            for name in self._runs:
                if _outside(loaded.facts, name) != _outside(self.facts, name):
                    raise ValueError(f"{name} is another kind of model now: restart the server.")
            exchange = partial(self._supervisor.exchange, partial(Loaded, again), loaded, process)
            between_batches(exchange).result()
        except BaseException:
            process.kill()
            loaded.close()
            _close(kept)
            raise
        self._kept, old = kept, self._kept
        _close(old)

    def _orders(self) -> tuple[Order, Order, list[Kept]]:
        """To load what lies in the folders now, and to load the same later."""
        settings = self._settings
        folders = [run.folder for run in self._runs.values()]
        compensator = Path(settings.compensator) if settings.compensator else None
        if compensator:
            folders.append(compensator)
        kept = [Kept(folder) for folder in folders]
        links = [files.links for files in kept]
        now = partial(load_models, self._runs, compensator=compensator)
        again = partial(_load_again, tuple(self._runs), folders, links)
        rest = settings.speed, settings.max_batch, settings.threads
        return Order(now, *rest), Order(again, *rest), kept


def _load_again(names: Sequence[str], folders: Sequence[Path], links: Sequence[Links]) -> Models:
    """Load runs, and perhaps a compensator, from files that were kept."""
    with tempfile.TemporaryDirectory() as made:
        found = [
            laid_out(kept, folder, Path(made) / str(number))
            for number, (folder, kept) in enumerate(zip(folders, links, strict=True))
        ]
        runs = {name: Run(folder) for name, folder in zip(names, found, strict=False)}
        return load_models(runs, compensator=found[len(names)] if found[len(names) :] else None)


def _close(kept: Sequence[Kept]) -> None:
    for files in kept:
        files.close()


def _with_spare(settings: Settings) -> bool:
    """Whether a process that computes takes long to be made ready."""
    return settings.spare and (bool(settings.speed) or default_device() != "cpu")


def _outside(facts: Facts, name: str) -> tuple[Any, ...]:
    """What clients and waiting requests rely on."""
    return facts.kind(name), facts.classes(name), facts.input_shape, facts.degrees
