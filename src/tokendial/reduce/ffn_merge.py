"""FFN-only merging: tokens merge before each FFN and part again after it.

Source: Jie et al., "Token Compensator", ECCV 2024, https://arxiv.org/abs/2408.06798, segmentation
experiment: attention sees every token, the FFN fewer, and each member of a group receives the
group's output. The paper does not say whether the residual is merged as well; here it is not, so
that it keeps its full detail (the cost is the same).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.methods import register
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.reduce.tome import check_matching, matched, most_merged
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("reduce", "ffn_merge")
@dataclass(frozen=True, kw_only=True)
class FFNMerge(ReducerConfig):
    """Merge `r` tokens before each FFN only: for dense prediction, which needs every position."""

    r: int = 256
    """Tokens that merge before each FFN."""
    step: int = 1
    """Tokens from one degree of the dial to the next; `r` is a multiple of it. 32 gives a ViT/16 at
    512 x 512 pixels 16 degrees: as many as a compensator has in the paper."""
    matching: Literal["bipartite", "random"] = "bipartite"
    """As in ToMe."""
    stride: int = 2
    """As in ToMe: one token in `stride` absorbs, so that up to (stride - 1) / stride can merge."""
    seed: int = 0
    """Seed of random matching."""

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 0:
            raise ValueError(f"r must be an integer of at least 0, got {self.r}.")
        if type(self.step) is not int or self.step < 1 or self.r % self.step:
            raise ValueError(
                f"step must be an integer of at least 1 that divides r ({self.r}), got {self.step}."
            )
        check_matching(self.matching, self.stride, self.seed)

    def build(self, vit: ViTShape) -> "FFNMergeReducer":
        """Make the module."""
        return FFNMergeReducer(self, vit)


class FFNMergeReducer(Reducer):
    """Runs FFN-only merging; degree d merges d times `step` tokens."""

    needs = frozenset({"mean_keys"})
    keeps_grid = True

    def __init__(self, config: FFNMerge, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        most = most_merged(vit.num_patches, config.stride)
        self.degrees = tuple(range(most // config.step + 1))
        self.degree = config.r // config.step

    def acts(self, layer: int, degree: int) -> bool:
        """In every layer."""
        return True

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Merge along the keys of this layer, run the FFN, and copy its output back."""
        assert attended.mean_keys is not None
        config = self.config
        grouping = matched(
            attended.mean_keys,
            degree * config.step,
            tokens.prefix,
            matching=config.matching,
            stride=config.stride,
            seed=(config.seed, layer),
        )
        if grouping is None:
            return tokens.x + ffn(tokens.x), None
        return tokens.x + grouping.unmerge(ffn(grouping.merge(tokens.x))), None
