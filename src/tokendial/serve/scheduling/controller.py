"""Which degree the dial should be at: a pure function of what was observed.

Requests have deadlines. What waits, and what is likely to come until then, has to fit into the time
until then; the lowest degree at which it does is the most accurate one that can be afforded.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tokendial.serve.scheduling.costs import Costs, Point

_SHORTEST_S = 0.001
Group = tuple[str, int | None]
"""A model by its name, and the degree that requests ask for (None: the dial's)."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the controller may do, and what for."""

    slo_s: float
    """Service-level objective: seconds from the arrival of a request to its answer."""
    degrees: tuple[int, ...]
    """Degrees that the dial may take, rising; the last one is the floor of accuracy."""
    max_batch: int = 32
    """Images in a batch, at most."""
    turn_up_at: float = 0.9
    """Pressure above which the dial goes up."""
    turn_down_at: float = 0.75
    """Pressure that a lower degree has to stay below for the dial to go down to it."""
    calm_s: float = 2.0
    """For how many seconds."""

    def __post_init__(self) -> None:
        if self.slo_s <= 0:
            raise ValueError(f"slo_s must be above 0, got {self.slo_s}.")
        if not self.degrees or list(self.degrees) != sorted(set(self.degrees)):
            raise ValueError(f"degrees must rise, got {self.degrees}.")
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}.")
        if not 0 < self.turn_down_at <= self.turn_up_at:
            raise ValueError(
                f"turn_down_at must lie in (0, turn_up_at = {self.turn_up_at}], "
                f"got {self.turn_down_at}."
            )


@dataclass(frozen=True, slots=True)
class Observed:
    """What the controller is told."""

    now: float
    """Seconds on any clock."""
    arrivals_per_s: Mapping[Group, float]
    """Images that were asked for lately, refused ones included."""
    waiting: Sequence[tuple[Group, int, float]] = ()
    """Images that wait, with the seconds that are left for them, rising."""
    patient: Collection[Group] = ()
    """Those of whom none had to be answered within the objective lately."""


@dataclass(frozen=True, slots=True)
class Full:
    """The largest batch of a model at a degree that goes with the objective."""

    images: int
    seconds: float
    """It takes, in the mean."""
    cautious: float
    """It takes at most, nearly always."""
    in_time: bool
    """Whether at least one image is."""

    @property
    def each(self) -> float:
        """Seconds of an image."""
        return self.seconds / self.images


Plan = Mapping[Point, Full]


@dataclass(frozen=True, slots=True)
class Dial:
    """Where the dial is, and what the controller remembers."""

    degree: int
    """Degree of requests that name none."""
    needed: tuple[tuple[float, int], ...] = ()
    """When which degree was the lowest that would do, falling; what lower ones followed is kept."""


def turned(dial: Dial, seen: Observed, plan: Plan, rules: Rules) -> Dial:
    """The dial as it should be now.

    It goes up at once, as far as needed, and down to the highest degree that was needed in the last
    `rules.calm_s` seconds. For going down, more room is asked for than for staying
    (`turn_down_at`), so that it does not flap.
    """
    lowest = _lowest(rules.turn_down_at, seen, plan, rules)
    since = seen.now - rules.calm_s
    recent = [(at, degree) for at, degree in dial.needed if at > since and degree > lowest]
    needed = (*recent, (seen.now, lowest))
    degree = min(dial.degree, needed[0][1])
    if pressure(degree, seen, plan, rules) > rules.turn_up_at:
        degree = max(degree, _lowest(rules.turn_up_at, seen, plan, rules))
    return Dial(degree, needed)


def pressure(degree: int, seen: Observed, plan: Plan, rules: Rules) -> float:
    """Share of the time that is needed, with the dial at `degree`; above 1: deadlines are missed.

    The larger of two: what arrives, in the long run, and what waits, until its deadlines (the most
    that the first so many of them ask for). What arrives from now on has later ones, so the two do
    not add up. Infinite where one image alone takes longer than the objective and is not given
    more time.
    """
    full = {
        group: plan[group[0], degree if group[1] is None else group[1]]
        for group in (*seen.arrivals_per_s, *(group for group, _, _ in seen.waiting))
    }
    hurried = full.keys() - set(seen.patient)
    if any(group[1] is None and not full[group].in_time for group in hurried):
        return math.inf
    load = sum(full[group].each * rate for group, rate in seen.arrivals_per_s.items())
    work = needed = 0.0
    for group, images, left in seen.waiting:
        work += full[group].each * images
        needed = max(needed, work / max(left, _SHORTEST_S))
    return max(load, needed)


def planned(costs: Costs, rules: Rules) -> Plan:
    """The full batch of every model at every degree that was measured.

    Who comes just after a batch has begun waits for it and then for their own, so two of them have
    to fit into the objective. Sizes grow by halves, up to the largest one allowed.
    """
    plan = {}
    for name, degree in costs.points:
        images = 1
        while images < rules.max_batch:
            larger = min(images + max(1, images // 2), rules.max_batch)
            if 2 * costs.cautious(name, degree, larger) > rules.slo_s:
                break
            images = larger
        cautious = costs.cautious(name, degree, images)
        plan[name, degree] = Full(
            images, costs.seconds(name, degree, images), cautious, cautious <= rules.slo_s
        )
    return plan


def _lowest(limit: float, seen: Observed, plan: Plan, rules: Rules) -> int:
    """The lowest degree with a pressure of at most `limit`; the one with least if none has."""
    pressures = {}
    for degree in rules.degrees:
        pressures[degree] = pressure(degree, seen, plan, rules)
        if pressures[degree] <= limit:
            return degree
    return min(pressures, key=lambda degree: (pressures[degree], -degree))
