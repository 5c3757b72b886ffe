"""The search for NOAH's best subnet within a number of parameters, by evolution.

Source: Zhang, Zhou and Liu, "Neural Prompt Search", https://arxiv.org/abs/2206.04673, section 3.3,
and the authors' code. The first population is drawn at random. In each round the best subnets so
far are parents. A mutation changes how many blocks have prompts, LoRA or adapters: blocks are added
with drawn widths, or lose theirs. A crossover takes the prompts of one of two parents, and LoRA and
adapters likewise. The rest of the population is drawn at random. A subnet is never judged twice.

Departure: the last population counts; the authors' code judges it and chooses without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tokendial.adapt.noah import KINDS, NOAH, NOAHSupernet
from tokendial.checks import check_count, check_not_negative

_TRIES = 10
"""Attempts for each subnet that is wanted, as in the authors' code; a subnet that was judged before
or has too many parameters takes one."""
_RANDOM_TRIES = 1000
"""The same for random subnets, of which few may be small enough."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evolution:
    """Settings of the search; the defaults are those of the authors' code."""

    population: int = 50
    """Number of subnets that each round adds, at least 1."""
    parents: int = 10
    """Number of best subnets that are changed and combined, at least 1."""
    mutations: int = 25
    """Number of subnets of a round that are mutations of a parent, at most."""
    crossovers: int = 25
    """Number of subnets of a round that combine two parents, at most."""
    mutation_probability: float = 0.2
    """Probability that a mutation changes prompts, LoRA or adapters, each for itself; in [0, 1]."""
    depth_probability: float = 0.4
    """Probability that such a change draws a new number of blocks, in [0, 1]."""
    rounds: int = 20
    """Number of rounds after the first population, at least 0."""
    seed: int = 0
    """Seed of all random choices."""

    def __post_init__(self) -> None:
        for name in ("population", "parents"):
            check_count(name, getattr(self, name))
        for name in ("mutations", "crossovers", "rounds", "seed"):
            check_count(name, getattr(self, name), at_least=0)
        for name in ("mutation_probability", "depth_probability"):
            check_not_negative(name, value := getattr(self, name))
            if value > 1:
                raise ValueError(f"{name} must be at most 1, got {value}.")
        if self.mutations + self.crossovers > self.population:
            raise ValueError(
                f"population must be at least mutations + crossovers "
                f"({self.mutations + self.crossovers}), got {self.population}."
            )


@dataclass
class SubnetSearch:
    """Searches the best subnet. The same seed gives the same search."""

    supernet: NOAHSupernet
    """The widths to choose from."""
    depth: int
    """Number of blocks of the model."""
    num_parameters: Callable[[NOAH], int]
    """Counts the parameters of a subnet."""
    judge: Callable[[NOAH], float]
    """Gives the score of a subnet; higher is better."""
    max_parameters: int
    """Largest number of parameters that a subnet may have."""
    evolution: Evolution = field(default_factory=Evolution)
    """Settings of the search."""
    after_round: Callable[[int], object] = lambda number: None
    """Called with the number of each round when it is over, 0 for the first population."""
    scores: dict[NOAH, float] = field(default_factory=dict)
    """Score of every subnet that was judged."""

    def run(self) -> NOAH:
        """Find the subnet with the highest score; of equal ones the first.

        Raises:
            ValueError: If the smallest subnet has too many parameters.
        """
        smallest = self.supernet.draw(self.depth, min)
        if (least := self.num_parameters(smallest)) > self.max_parameters:
            raise ValueError(
                f"max_parameters must be at least {least}, which the smallest subnet has, got "
                f"{self.max_parameters}."
            )
        settings = self.evolution
        self.random = Random(settings.seed)
        if not self._add(settings.population, self._draw, _RANDOM_TRIES):
            self._add(1, lambda: smallest, 1)
        self.after_round(0)
        for number in range(1, settings.rounds + 1):
            parents = self.best(settings.parents)
            added = self._add(settings.mutations, lambda: self._mutate(parents), _TRIES)  # noqa: B023  # runs at once
            added += self._add(settings.crossovers, lambda: self._combine(parents), _TRIES)  # noqa: B023  # runs at once
            self._add(settings.population - added, self._draw, _RANDOM_TRIES)
            self.after_round(number)
        return self.best(1)[0]

    def best(self, count: int) -> list[NOAH]:
        """The subnets with the highest scores, the best one first."""
        return sorted(self.scores, key=lambda subnet: -self.scores[subnet])[:count]

    def _add(self, count: int, make: Callable[[], NOAH], tries: int) -> int:
        """Judge `count` new subnets, fewer if `make` gives no more. Returns how many were new."""
        before = len(self.scores)
        for _ in range(count * tries):
            if len(self.scores) - before == count:
                break
            subnet = make()
            if subnet not in self.scores and self.num_parameters(subnet) <= self.max_parameters:
                self.scores[subnet] = self.judge(subnet)
        return len(self.scores) - before

    def _draw(self) -> NOAH:
        return self.supernet.draw(self.depth, self.random.choice)

    def _mutate(self, parents: Sequence[NOAH]) -> NOAH:
        """A parent whose numbers of blocks may have changed."""
        widths = self.random.choice(parents).widths(self.depth)._asdict()
        settings = self.evolution
        for name, present in widths.items():
            if self.random.random() >= settings.mutation_probability:
                continue
            if self.random.random() >= settings.depth_probability:
                continue
            filled = self.random.choice(self.supernet.depths)
            kept = [width for width in present if width][:filled]
            options = getattr(self.supernet, name)
            new = [self.random.choice(options) for _ in range(filled - len(kept))]
            widths[name] = (*kept, *new, *[0] * (self.depth - filled))
        return self.supernet.subnet(widths)

    def _combine(self, parents: Sequence[NOAH]) -> NOAH:
        """Prompts, LoRA and adapters, each of one of two parents."""
        pair = [self.random.choice(parents).widths(self.depth) for _ in range(2)]
        return self.supernet.subnet(
            {name: getattr(self.random.choice(pair), name) for name in KINDS}
        )
