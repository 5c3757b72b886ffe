"""PYRA: ToMe, with tokens that are adjusted by learnt weights before they merge.

Source: Xiong et al., "PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient Task
Adaptation", ECCV 2024, https://arxiv.org/abs/2403.09192, section 3, and the authors' code: the
weights are made from the normalised sum of each pair, weighted by token sizes.

Departure: any number of prefix tokens is protected.
"""

# Shape legend: B batch, N tokens, D embed_dim, S pairs that merge.

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokendial.attention import ByProducts
from tokendial.methods import register
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.reduce.schedules import PerLayer, freeze_removal, make_schedule_dial
from tokendial.reduce.tome import bipartite_matching, max_merged
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens, take


@register("reduce", "pyra")
@dataclass(frozen=True, kw_only=True)
class PYRA(ReducerConfig):
    """PYRA: merge `r` pairs of tokens in each layer, as ToMe, after learnt weights adjust them."""

    r: int | Sequence[int | float] = 16
    """Tokens that each layer merges: one number for all layers, or a list with one entry per layer
    (missing last layers merge none; a float is a share of the image's patches). The dial lowers
    these numbers: at degree d no layer merges more than d."""
    proportional_attention: bool = True
    """Whether attention adds the logarithm of the token sizes to its logits."""

    def __post_init__(self) -> None:
        r = freeze_removal(self.r)
        if isinstance(r, tuple) and not isinstance(r, PerLayer):
            raise ValueError(f"r must be one number or one list, got {self.r!r}.")
        object.__setattr__(self, "r", r)

    def build(self, vit: ViTShape) -> "PYRAReducer":
        """Make the weights. Raises a ValueError if a list is longer than the model is deep."""
        return PYRAReducer(self, vit)


class PYRAReducer(Reducer):
    """Runs PYRA, with r + 3 D parameters in each layer that merges.

    At degree d a layer merges d tokens, or its number of the settings if that is smaller. The
    weights of the most similar pairs serve all degrees. New weights change no token.
    """

    needs = frozenset({"mean_keys"})
    tracks_size = True

    def __init__(self, config: PYRA, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.proportional_attention = config.proportional_attention
        r = freeze_removal(config.r)
        lists = PerLayer([r] * vit.depth) if isinstance(r, int) else r
        self.schedule = make_schedule_dial(lists, vit, max_merged)[1]
        self.degree = max(self.schedule)
        self.degrees = tuple(range(self.degree + 1))
        self.modulations = nn.ModuleDict(
            {
                str(layer): Modulation(count, vit.embed_dim)
                for layer, count in enumerate(self.schedule, start=1)
                if count
            }
        )

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether `layer` merges tokens."""
        return min(degree, self.schedule[layer - 1]) > 0

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Match the tokens by the similarity of their keys in this layer."""
        assert attended.mean_keys is not None
        pairs = bipartite_matching(
            attended.mean_keys,
            min(degree, self.schedule[layer - 1]),
            num_prefix_tokens=tokens.prefix,
        )
        if pairs is None:
            return None
        modulate = self.modulations[str(layer)]
        return ModulatedGrouping(
            pairs.keep, pairs.src, pairs.dst, pairs.num_tokens, modulate=modulate
        )


class Modulation(nn.Module):
    """Adjusts the tokens of a layer that are about to be absorbed."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        # One factor per pair makes a weight for each channel, one per channel a weight per pair.
        self.of_pairs = nn.Parameter(torch.empty(count, 1))
        self.of_channels = nn.Parameter(torch.zeros(1, dim))
        self.norm = nn.LayerNorm(dim)
        nn.init.kaiming_uniform_(self.of_pairs, a=5**0.5)

    def forward(self, absorbed_BSD: Tensor, absorbing_BSD: Tensor) -> Tensor:
        """Return the absorbed tokens, adjusted.

        Args:
            absorbed_BSD: Tokens times their sizes, the most similar pair first.
            absorbing_BSD: The tokens that absorb them, times their sizes.

        Source:
            PYRA, equations 6 to 9; the authors' code for factor 2 and the order.
        """
        pairs_BSD = self.norm(absorbed_BSD + absorbing_BSD)
        of_pairs = self.of_pairs[: pairs_BSD.shape[1]]
        channel_B1D = 2 * torch.sigmoid(of_pairs.mT @ pairs_BSD)
        pair_BS1 = 2 * torch.sigmoid(pairs_BSD @ self.of_channels.mT) - 1
        return absorbed_BSD + absorbed_BSD * channel_B1D * pair_BS1


@dataclass(slots=True)
class ModulatedGrouping(Grouping):
    """A reduction that adjusts the absorbed tokens' features before they merge."""

    modulate: Callable[[Tensor, Tensor], Tensor] = None  # type: ignore[assignment]
    """Adjusts the absorbed tokens, given them and those that absorb them, both times their sizes.
    Always given; its place behind fields with defaults needs one."""

    def merge_each(
        self, features: Sequence[Tensor], weight_BN: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Adjust the first of the features, those of the tokens, and merge all of them."""
        x_BND, *others = features
        if weight_BN is None:
            weight_BN = x_BND.new_ones(x_BND.shape[:2])
        weight_BN1 = weight_BN.unsqueeze(-1)
        weighted_BND = x_BND * weight_BN1
        absorbing = self.keep.gather(1, self.dst)
        adjusted = self.modulate(take(weighted_BND, self.src), take(weighted_BND, absorbing))
        adjusted = (adjusted / take(weight_BN1, self.src)).to(x_BND.dtype)
        index = self.src.unsqueeze(-1).expand_as(adjusted)
        changed_BND = x_BND.scatter(1, index, adjusted)
        # A dataclass with slots is made anew, so `super()` would not find it.
        return Grouping.merge_each(self, [changed_BND, *others], weight_BN)
