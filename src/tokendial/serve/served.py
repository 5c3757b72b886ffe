"""What is served: models that compute in a process of their own, and can be exchanged."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokendial.serve.apart import Apart, GoneError, Order
from tokendial.serve.controller import Rules
from tokendial.serve.costs import Costs, measured_costs
from tokendial.serve.facts import Facts, revision_of
from tokendial.serve.models import load_models
from tokendial.serve.settings import Settings
from tokendial.serve.token_view import TokenView
from tokendial.train.runs import Run

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Served:
    """Runs as models of one backbone.

    `run`, `view` and `measured` are for one thread at a time, that of the engine once it runs; the
    rest is for any.
    """

    def __init__(self, runs: Mapping[str, Run], settings: Settings) -> None:
        """Load them.

        Args:
            runs: By the names that they are served under.
            settings: Compensator, speed, threads and the largest batch.

        Raises:
            ValueError: If `load_models` cannot load them.
        """
        load = partial(
            load_models,
            runs,
            compensator=Path(settings.compensator) if settings.compensator else None,
            speed=settings.speed,
        )
        self._runs = runs
        self._order = Order(load, settings.max_batch, settings.threads)
        self._models, self._closed = Apart(self._order), False

    @property
    def facts(self) -> Facts:
        """What is known of the models."""
        return self._models.facts

    def run(self, name: str, degree: int, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each image."""
        return self._asked(lambda models: models.run(name, degree, images))

    def view(self, name: str, degree: int, image: Tensor) -> tuple[TokenView, str]:
        """The tokens of an image [3, H, W], and what the model sees of it: a PNG in base64."""
        return self._asked(lambda models: models.view(name, degree, image))

    def measured(self, rules: Rules, degrees: Sequence[int]) -> Costs:
        """How long batches take here, on random images."""
        draw = torch.Generator().manual_seed(0)
        image = torch.randn(self.facts.input_shape, generator=draw)

        def seconds(name: str, degree: int, images: int) -> float:
            began = time.perf_counter()
            self.run(name, degree, [image] * images)
            return time.perf_counter() - began

        names, within = self.facts.names, rules.slo_s / 2
        return measured_costs(seconds, names, degrees, most=rules.max_batch, within_s=within)

    def reload(self, between_batches: Callable[[Callable[[], None]], Future[None]]) -> list[str]:
        """Read runs that have changed on disk since, while the old ones go on answering.

        For that time the models are in memory twice.

        Args:
            between_batches: `Engine.call`.

        Returns:
            Names of those that have changed.

        Raises:
            ValueError: If one cannot be read any more, or is another kind of model now; everything
                stays as it was.
        """
        old = self.facts
        changed = [n for n, run in self._runs.items() if revision_of(run) != old.revision(n)]
        if changed:
            fresh = self._started_anew()
            try:
                between_batches(lambda: self._exchange(fresh)).result()
            except BaseException:
                fresh.close()
                raise
        return changed

    def close(self) -> None:
        """End the process; nothing can be run any more."""
        self._closed = True
        self._models.close()

    def _asked(self, ask: Callable[[Apart], T]) -> T:
        """What models answer; a new process is asked if the old one was lost with the question."""
        try:
            return ask(self._models)
        except GoneError as error:  # the system may have taken its memory
            if self._closed:
                raise
            _log.error("%s Starting another one.", error)
            self._exchange(self._started_anew())
            return ask(self._models)

    def _started_anew(self) -> Apart:
        fresh = Apart(self._order)
        for name in self._runs:
            if _outside(fresh.facts, name) != _outside(self.facts, name):
                fresh.close()
                raise ValueError(f"{name} is another kind of model now: restart the server.")
        return fresh

    def _exchange(self, fresh: Apart) -> None:
        self._models, old = fresh, self._models
        old.close()


def _outside(facts: Facts, name: str) -> tuple[Any, ...]:
    """What clients and waiting requests rely on."""
    return facts.kind(name), facts.classes(name), facts.input_shape, facts.degrees
