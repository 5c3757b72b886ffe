"""The cascade in the server: which images get a second answer at a better degree, and when.

An image whose first answer is unsure may wait here. It has an answer already, so it is the first
thing that is given up when time is short: it never delays a request or raises the degree.
"""

import logging
import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tokendial.cascade import CascadeStages, largest_share, smallest_share
from tokendial.serve.scheduling.controller import BatchPlan
from tokendial.serve.scheduling.cost_model import CostModel
from tokendial.serve.scheduling.requests import Batch, QueuedRequest

_log = logging.getLogger(__name__)
_RECENT = 1000
"""Number of latest answers of a stage by which it is judged."""
_LOOK_EVERY = 100
"""Number of first answers between two looks at the share of unsure ones."""
_CERTAINTY = 0.999
"""Confidence with which the share of unsure answers must lie outside of the calibrated interval to
count as another one: it is looked at often."""

Verdict = Literal["sure", "unsure", "sent on"]
"""On an answer. "unsure": there is no time for a second one."""


@dataclass(frozen=True, slots=True)
class UnsureImage:
    """An image that waits for a second answer."""

    request: QueuedRequest
    """Its request."""
    index: int
    """Its index in the request's images."""
    degree: int
    """Degree of the second answer."""


@dataclass(frozen=True, slots=True)
class CascadeStatus:
    """State of the cascade at one moment."""

    sent_on: int
    """Number of images that were given a second answer since the start."""
    share: float
    """The second dial: share of the unsure images that there is time to send on, the least sure
    ones first."""
    unsure: float | None
    """Share of unsure ones among the last first answers; None if there were too few."""
    drifted: bool
    """Whether that share lies outside of the calibrated interval, so that the images are others
    than those of the calibration and its bound says nothing about them."""


class SecondAnswers:
    """Decides which images get a second answer, and holds them until they run.

    `share` is the second dial. The controller sets it to the share of the unsure images for which
    the load leaves time; the least sure ones come first.
    """

    def __init__(self, stages: Callable[[], CascadeStages]) -> None:
        """Create an empty queue.

        Args:
            stages: Returns the calibrated stages of the cascade. Degrees must not change between
                calls; thresholds may.
        """
        self._stages = stages
        self.share = 1.0
        self.sent_on = 0
        self.drifted = False
        self._waiting: list[UnsureImage] = []
        self._first = deque[bool](maxlen=_RECENT)
        """Whether each of the last first answers was unsure."""
        self._unsure: dict[int, deque[float]] = {
            degree: deque(maxlen=_RECENT) for degree in self.degrees[:-1]
        }
        """How sure each stage was of its last unsure answers."""
        self._watched = 0

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of the stages, the cheapest first."""
        return self._stages().degrees

    @property
    def status(self) -> CascadeStatus:
        """The present state."""
        enough = len(self._first) >= _LOOK_EVERY
        unsure = sum(self._first) / len(self._first) if enough else None
        return CascadeStatus(self.sent_on, self.share, unsure, self.drifted)

    def may_follow(self, degree: int) -> bool:
        """Whether a second answer may follow one at this degree."""
        return degree in self.degrees[:-1]

    def judge(self, batch: Batch, sure: Sequence[float], now: float) -> list[Verdict]:
        """Decide for each image of a batch that has run whether it gets a second answer.

        Args:
            batch: The batch. Requests that asked for its degree are not looked at.
            sure: How sure the model is of each answer; infinity: the image has no second answer.
                May be empty if `may_follow` says that none has.
            now: The time.
        """
        if not self.may_follow(batch.degree):
            return ["sure"] * len(batch.parts)
        stages = self._stages()
        stage = stages.degrees.index(batch.degree)
        verdicts: list[Verdict] = []
        for (request, index), of_image in zip(batch.parts, sure, strict=True):
            if request.degree is not None or math.isinf(of_image):
                verdicts.append("sure")
                continue
            unsure = of_image < stages.thresholds[stage]
            if stage == 0:
                self._first.append(unsure)
                self._watch(stages)
            verdicts.append("unsure" if unsure else "sure")
            if unsure:
                self._unsure[batch.degree].append(of_image)
                if of_image <= self._limit(batch.degree) and now < request.deadline:
                    waiting = UnsureImage(request, index, stages.degrees[stage + 1])
                    insort(self._waiting, waiting, key=lambda image: image.request.deadline)
                    verdicts[-1] = "sent on"
        return verdicts

    def turn(self, spare: float, images_per_s: float, name: str, plan: BatchPlan) -> None:
        """Set the second dial.

        Args:
            spare: Fraction of the time that the requests leave.
            images_per_s: Images that arrive per second.
            name: Name of the model.
            plan: Expected times.
        """
        stages = self._stages()
        assert stages.calibration is not None
        reached = stages.calibration.sent_on
        unsure = self.status.unsure
        excess = unsure / reached[0] if unsure is not None and reached[0] else 1.0
        wanted = images_per_s * sum(
            excess * share * plan[name, degree].seconds_per_image
            for degree, share in zip(stages.degrees[1:], reached, strict=True)
        )
        self.share = min(1.0, max(0.0, spare) / wanted) if wanted > 0 else 1.0

    def drop_late(self, start: float, costs: CostModel) -> None:
        """Let images keep their answer whose second one would be late.

        Args:
            start: Earliest time at which a second answer can be computed.
            costs: Predicts times.
        """
        remaining = []
        for waiting in self._waiting:
            request = waiting.request
            if request.owner.done():
                continue
            if start + costs.upper_bound(request.name, waiting.degree, 1) > request.deadline:
                request.owner.keep_answer(waiting.index)
                continue
            remaining.append(waiting)
        self._waiting = remaining

    def take(
        self,
        now: float,
        costs: CostModel,
        plan: BatchPlan,
        *,
        idle: bool,
        allowed_s: Callable[[], float],
    ) -> tuple[UnsureImage, ...]:
        """Take the images that are to run now, all at one degree.

        They wait for more of their kind unless the machine is idle, a batch is full, or the first
        deadline would suffer.

        Args:
            now: The time.
            costs: Predicts times.
            plan: Largest batches.
            idle: Whether no request waits.
            allowed_s: Returns the seconds that a batch may take without making requests late.
        """
        if not self._waiting:
            return ()
        head = self._waiting[0]
        name, degree = head.request.name, head.degree
        largest = plan[name, degree].images
        found = [waiting for waiting in self._waiting if waiting.degree == degree][:largest]
        left_s = head.request.deadline - now
        before_s = plan[name, self.degrees[0]].upper_bound
        urgent = before_s + costs.upper_bound(name, degree, len(found)) > left_s
        if not (idle or urgent or len(found) == largest):
            return ()
        allowed = min(left_s, allowed_s())
        while found and costs.upper_bound(name, degree, len(found)) > allowed:
            found = found[: len(found) // 2]
        self._waiting = [waiting for waiting in self._waiting if waiting not in found]
        self.sent_on += len(found)
        return tuple(found)

    def _limit(self, degree: int) -> float:
        """How sure an unsure answer may be to be sent on: a quantile of the last ones."""
        if self.share >= 1:
            return math.inf
        recent = sorted(self._unsure[degree])
        count = math.ceil(self.share * len(recent))
        return recent[count - 1] if count else -math.inf

    def _watch(self, stages: CascadeStages) -> None:
        """Compare the share of unsure answers with the calibration, and log when that changes."""
        self._watched += 1
        if self._watched % _LOOK_EVERY:
            return
        assert stages.calibration is not None
        low, high = stages.calibration.sent_on_range[0]
        unsure, seen = sum(self._first), len(self._first)
        drifted = (
            smallest_share(unsure, seen, _CERTAINTY) > high
            or largest_share(unsure, seen, _CERTAINTY) < low
        )
        if drifted != self.drifted:
            _log.warning(
                "cascade: of the last %d images, %.1f %% are unsure at degree %d; the calibration "
                "expects %.1f to %.1f %%. %s",
                *(seen, 100 * unsure / seen, stages.degrees[0], 100 * low, 100 * high),
                "Its bound says nothing about such images."
                if drifted
                else "They are like those of the calibration again.",
            )
        self.drifted = drifted
