"""Two reductions in one model, such as merging between attention and FFN, and an FFN on few tokens.

The methods have to act at different places of a block: before it (DynamicViT), between attention
and FFN (ToMe, PiToMe, EViT, PruneMerge, LearntMetric), or around the FFN (DyT, FFNMerge).

Source: Sparse-Tuning's table IV combines DyT with ToMe. That later methods see the tokens that
earlier ones left, and keys that follow their tokens, is our reading.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tokendial.attention import ByProducts
from tokendial.methods import from_json, register
from tokendial.passes import TrainingPasses
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens

_PLACES = {
    "before_block": "before a block",
    "group": "between attention and FFN",
    "around_ffn": "around the FFN",
}


@register("reduce", "stack")
@dataclass(frozen=True, kw_only=True)
class Stack(ReducerConfig):
    """Run several reduction methods in one model; they must act at different places of a block."""

    methods: Sequence[Any]
    """The methods, such as `[ToMe(r=8), DyT()]`, or their plain-JSON forms; at least two."""
    dial: Sequence[Sequence[int]] | None = None
    """Degree of each method at degree 1, 2, ... of the stack, such as `[[4, 5], [8, 5]]`. None: the
    dial is that of the first method, and the others stay at the degree of their settings."""

    def __post_init__(self) -> None:
        methods = self.methods if isinstance(self.methods, list | tuple) else ()
        read = tuple(from_json("reduce", m) if isinstance(m, dict) else m for m in methods)
        if len(read) < 2 or not all(
            isinstance(m, ReducerConfig) and not isinstance(m, Stack) for m in read
        ):
            raise ValueError(f"methods must be two or more reduction methods, got {self.methods}.")
        object.__setattr__(self, "methods", read)
        if self.dial is None:
            return
        rows = [tuple(row) if isinstance(row, list | tuple) else () for row in self.dial]
        if not rows or any(
            len(row) != len(read) or any(type(degree) is not int for degree in row) for row in rows
        ):
            raise ValueError(
                f"dial must list a degree for each of the {len(read)} methods, for degree 1, 2, "
                f"..., got {self.dial}."
            )
        object.__setattr__(self, "dial", tuple(rows))

    def build(self, vit: ViTShape) -> "StackReducer":
        """Make the modules.

        Raises:
            ValueError: If a method does not fit the backbone, two act at the same place, one needs
                the grid of patches and another does not keep it, or a degree does not exist.
        """
        return StackReducer(self, vit)


class StackReducer(Reducer):
    """Runs several methods at one degree of a common dial."""

    def __init__(self, config: Stack, vit: ViTShape) -> None:
        super().__init__()
        self.methods = nn.ModuleList(method.build(vit) for method in config.methods)
        names = [type(method).__name__ for method in config.methods]
        self._number_at = self._places(names)
        reducers = self._reducers
        self.needs = frozenset().union(*(method.needs for method in reducers))
        self.extra_passes = frozenset().union(*(method.extra_passes for method in reducers))
        self.tracks_size = any(method.tracks_size for method in reducers)
        self.keeps_grid = all(method.keeps_grid for method in reducers)
        self.reads_grid_shape = any(method.reads_grid_shape for method in reducers)
        self.proportional_attention = any(m.proportional_attention for m in reducers)
        # Patches that are marked in place would be moved by the methods that drop and merge.
        self.protects = all(m.protects and not m.protects_in_place for m in reducers)
        first, others = reducers[0], reducers[1:]
        if config.dial is None:
            self.degrees, self.degree = first.degrees, first.degree
            rows = [(degree, *(method.degree for method in others)) for degree in first.degrees[1:]]
        else:
            self.degrees, self.degree = tuple(range(len(config.dial) + 1)), 1
            rows = [tuple(row) for row in config.dial]
            for name, method, column in zip(names, reducers, zip(*rows, strict=True), strict=True):
                if wrong := [degree for degree in column if degree not in method.degrees]:
                    raise ValueError(
                        f"dial: {name} has the degrees 0 to {method.degrees[-1]}, got {wrong[0]}."
                    )
        self.table = [(0,) * len(reducers), *rows]

    @property
    def _reducers(self) -> list[Reducer]:
        return list(self.methods)  # type: ignore[arg-type]  # a ModuleList names no type

    def _places(self, names: Sequence[str]) -> dict[str, int]:
        """The number of the method that acts at each place; a ValueError if methods collide."""
        numbers: dict[str, int] = {}
        for number, (name, method) in enumerate(zip(names, self._reducers, strict=True)):
            for place, words in _PLACES.items():
                if getattr(type(method), place) is getattr(Reducer, place):
                    continue
                if place in numbers:
                    raise ValueError(
                        f"methods: {names[numbers[place]]} and {name} both act {words}, so they "
                        "cannot be stacked."
                    )
                numbers[place] = number
            shrinking = [n for n, m in zip(names, self._reducers, strict=True) if not m.keeps_grid]
            if method.reads_grid and shrinking:
                raise ValueError(
                    f"methods: {name} reads the grid of patches, which {shrinking[0]} does not "
                    "keep."
                )
        return numbers

    def _at(self, degree: int, layer: int, place: str) -> tuple[Reducer, int] | None:
        """The method that acts in a layer at a place, and its degree; None: none does."""
        if (number := self._number_at.get(place)) is None:
            return None
        method, own = self._reducers[number], self.table[degree][number]
        return (method, own) if own and method.reduces_in(layer, own) else None

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether any of the methods reduces in `layer`."""
        return any(self._at(degree, layer, place) for place in ("group", "around_ffn"))

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Let the methods prepare the tokens."""
        for method, own in zip(self._reducers, self.table[degree], strict=True):
            if own:
                tokens = method.before_block(layer, own, tokens)
        return tokens

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Let the method between attention and FFN group the tokens."""
        acting = self._at(degree, layer, "group")
        if acting is None:
            return None
        method, own = acting
        grouping = method.group(layer, own, tokens, attended)
        follows = self._at(degree, layer, "around_ffn")
        if grouping is not None and follows is not None and follows[0].needs:
            attended.reduced = _follow(grouping, attended, follows[0].needs, tokens.size)
        return grouping

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None] | None:
        """Let the method around the FFN run it on the tokens that are left."""
        acting = self._at(degree, layer, "around_ffn")
        if acting is None:
            return None
        method, own = acting
        return method.around_ffn(layer, own, tokens, attended.reduced or attended, ffn)

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Return the losses of all methods, with the name of the method before theirs."""
        losses: dict[str, Tensor] = {}
        for method, own in zip(self._reducers, self.table[passes.student.degree], strict=True):
            seen = replace(passes, student=replace(passes.student, degree=own))
            name = type(method).__name__.removesuffix("Reducer").lower()
            losses |= {f"{name}_{key}": loss for key, loss in method.losses(seen).items()}
        return losses

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Pass the step on to the methods."""
        for method in self._reducers:
            method.at_step(step, steps_per_epoch)


def _follow(
    grouping: Grouping, attended: ByProducts, names: frozenset[str], size_BN: Tensor | None
) -> ByProducts:
    """By-products [B, N, C] of the tokens after a reduction, merged as their features are."""
    weight = size_BN if grouping.weight is None else grouping.weight
    followed = ByProducts()
    for name in names:
        setattr(followed, name, grouping.merge(getattr(attended, name), weight))
    return followed
