"""What every token-reduction method provides."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tokendial.attention import Attended
from tokendial.tokens import Grouping, Tokens


@dataclass(frozen=True, slots=True)
class ViTShape:
    """The numbers of a backbone that methods need when they are built."""

    depth: int
    """Number of blocks."""
    embed_dim: int
    """Width of a token."""
    num_prefix_tokens: int
    """Class, distillation and register tokens."""
    num_patches: int
    """Patch tokens at the backbone's configured image size."""
    has_class_token: bool
    """Whether the first token is a class token."""


class ReducerConfig(ABC):
    """Settings of a reduction method; subclasses are registered frozen dataclasses."""

    @abstractmethod
    def build(self, vit: ViTShape) -> "Reducer":
        """Make the module that runs.

        Raises:
            ValueError: If the settings do not fit the backbone.
        """


class Reducer(nn.Module, ABC):
    """Runs a reduction method between attention and FFN.

    Token counts follow from (layer, degree, number of tokens) alone, never from values, so that
    each degree compiles and exports as one graph.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """By-products of attention that `group` reads."""
    tracks_size: ClassVar[bool] = False
    """Whether tokens count the patches they stand for."""
    proportional_attention: bool = False
    """Whether token sizes weigh keys in attention."""
    degrees: tuple[int, ...]
    """Degrees that the dial offers, from 0 (no reduction) up, cheaper and cheaper."""
    degree: int
    """The degree that the settings describe."""

    @abstractmethod
    def acts(self, layer: int, degree: int) -> bool:
        """Whether `group` may reduce in `layer` (counted from 1), so that it gets its needs."""

    @abstractmethod
    def group(self, layer: int, degree: int, tokens: Tokens, attended: Attended) -> Grouping | None:
        """The reduction of `tokens` after attention of `layer`; None: nothing to do."""


def check_layers(layers: tuple[int, ...], depth: int) -> None:
    """Raise a ValueError unless every layer exists in a model of `depth` blocks."""
    if bad := [layer for layer in layers if layer > depth]:
        raise ValueError(f"layers must lie in [1, {depth}] (counted from 1), got {bad[0]}.")
