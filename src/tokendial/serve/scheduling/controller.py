"""The controller of the dial: a pure function from observed load to the degree.

Each request has a deadline. Images that wait, and images that are likely to arrive, must fit into
the time until their deadlines. The controller takes the lowest, and so the most accurate, degree at
which they fit.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tokendial.serve.scheduling.cost_model import CostModel, ModelDegree

_MIN_TIME_LEFT_S = 0.001
"""Smallest time to a deadline that the controller divides by."""
RequestGroup = tuple[str, int | None]
"""Requests that may share a batch: the model's name and the degree that they ask for. None means
the degree of the dial."""


@dataclass(frozen=True, slots=True)
class ControllerRules:
    """Settings of the controller."""

    slo_s: float
    """Latency objective: seconds from the arrival of a request to its answer."""
    degrees: tuple[int, ...]
    """Degrees that the dial may take, in rising order. The last one is the least accurate."""
    max_batch: int = 32
    """Maximum number of images in a batch."""
    raise_above: float = 0.9
    """The degree is raised when the pressure exceeds this value."""
    lower_below: float = 0.75
    """The degree is lowered only if the pressure at the lower degree stays below this value."""
    lower_after_s: float = 2.0
    """Seconds for which the lower degree must have been sufficient before the dial goes down."""

    def __post_init__(self) -> None:
        if self.slo_s <= 0:
            raise ValueError(f"slo_s must be above 0, got {self.slo_s}.")
        if not self.degrees or list(self.degrees) != sorted(set(self.degrees)):
            raise ValueError(f"degrees must rise, got {self.degrees}.")
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}.")
        if not 0 < self.lower_below <= self.raise_above:
            raise ValueError(
                f"lower_below must lie in (0, raise_above = {self.raise_above}], "
                f"got {self.lower_below}."
            )


@dataclass(frozen=True, slots=True)
class Observation:
    """The load at one moment, as the controller sees it."""

    now: float
    """Time of the observation in seconds, on any clock."""
    arrivals_per_s: Mapping[RequestGroup, float]
    """Images that arrived per second lately, including refused ones."""
    waiting: Sequence[tuple[RequestGroup, int, float]] = ()
    """Waiting images: (group, number of images, seconds to their deadline), deadlines rising."""
    patient: Collection[RequestGroup] = ()
    """Groups whose recent requests all allowed more time than the latency objective."""


@dataclass(frozen=True, slots=True)
class LargestBatch:
    """The largest batch of one model at one degree that is compatible with the objective."""

    images: int
    """Number of images in the batch."""
    seconds: float
    """Expected seconds of the batch."""
    upper_bound: float
    """Seconds that the batch will almost certainly not exceed."""
    in_time: bool
    """Whether a batch of one image meets the objective."""

    @property
    def seconds_per_image(self) -> float:
        """Expected seconds per image in this batch."""
        return self.seconds / self.images


BatchPlan = Mapping[ModelDegree, LargestBatch]
"""The largest batch for every model and degree."""


@dataclass(frozen=True, slots=True)
class DialState:
    """The position of the dial and the controller's memory."""

    degree: int
    """Degree of requests that ask for no degree."""
    sufficient: tuple[tuple[float, int], ...] = ()
    """(time, lowest sufficient degree) pairs of the last seconds, times rising, degrees strictly
    falling: a monotonic queue for the sliding maximum, which is the first pair's degree."""


def next_dial(
    dial: DialState, load: Observation, plan: BatchPlan, rules: ControllerRules
) -> DialState:
    """Return the state of the dial after one observation.

    The degree rises at once, as far as necessary. It falls to the highest degree that was
    necessary during the last `rules.lower_after_s` seconds. Lowering demands more spare time
    (`lower_below`) than staying (`raise_above`); the gap keeps the dial from oscillating.
    """
    lowest = _lowest_sufficient(rules.lower_below, load, plan, rules)
    # Monotonic queue: pairs that are too old leave in front. Pairs whose degree is not above the
    # new one leave at the back, because they can never be the maximum of the window again.
    since = load.now - rules.lower_after_s
    recent = [(at, degree) for at, degree in dial.sufficient if at > since and degree > lowest]
    sufficient = (*recent, (load.now, lowest))
    degree = min(dial.degree, sufficient[0][1])
    if pressure(degree, load, plan, rules) > rules.raise_above:
        degree = max(degree, _lowest_sufficient(rules.raise_above, load, plan, rules))
    return DialState(degree, sufficient)


def pressure(degree: int, load: Observation, plan: BatchPlan, rules: ControllerRules) -> float:
    """Fraction of the available time that the load needs with the dial at `degree`.

    Above 1, deadlines are missed. It is the larger one of two fractions:

    - long run: seconds of work that arrive per second;
    - short run: for each waiting deadline, the work that is due by then, divided by the time left.

    New arrivals have later deadlines than the waiting images, so the two do not add up. The result
    is infinite where a single image takes longer than the objective and its requests allow no more
    time.
    """
    batches = {
        group: plan[group[0], degree if group[1] is None else group[1]]
        for group in (*load.arrivals_per_s, *(group for group, _, _ in load.waiting))
    }
    hurried = batches.keys() - set(load.patient)
    if any(group[1] is None and not batches[group].in_time for group in hurried):
        return math.inf
    long_run = sum(
        batches[group].seconds_per_image * rate for group, rate in load.arrivals_per_s.items()
    )
    work = short_run = 0.0
    for group, images, time_left in load.waiting:
        work += batches[group].seconds_per_image * images
        short_run = max(short_run, work / max(time_left, _MIN_TIME_LEFT_S))
    return max(long_run, short_run)


def plan_batches(costs: CostModel, rules: ControllerRules) -> BatchPlan:
    """Choose the largest batch of every model at every measured degree.

    A request that arrives just after a batch has started waits for that batch and then for its
    own. So two batches must fit into the objective. Sizes grow by one half, up to the maximum.
    """
    plan = {}
    for name, degree in costs.points:
        images = 1
        while images < rules.max_batch:
            larger = min(images + max(1, images // 2), rules.max_batch)
            if 2 * costs.upper_bound(name, degree, larger) > rules.slo_s:
                break
            images = larger
        upper_bound = costs.upper_bound(name, degree, images)
        plan[name, degree] = LargestBatch(
            images, costs.seconds(name, degree, images), upper_bound, upper_bound <= rules.slo_s
        )
    return plan


def _lowest_sufficient(
    limit: float, load: Observation, plan: BatchPlan, rules: ControllerRules
) -> int:
    """Lowest degree with a pressure of at most `limit`; if there is none, the one with least."""
    pressures = {}
    for degree in rules.degrees:
        pressures[degree] = pressure(degree, load, plan, rules)
        if pressures[degree] <= limit:
            return degree
    return min(pressures, key=lambda degree: (pressures[degree], -degree))
