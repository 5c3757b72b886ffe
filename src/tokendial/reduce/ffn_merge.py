"""FFN-only merging: tokens merge before each FFN and are restored after it.

Source: Jie et al., "Token Compensator", ECCV 2024, https://arxiv.org/abs/2408.06798, segmentation
experiment: attention reads all tokens, the FFN reads the merged tokens, and each token of a group
receives the group's output. The paper does not say whether the residual is merged too. Here it is
not merged, so that it keeps its full detail; the cost is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokendial.attention import ByProducts
from tokendial.checks import check_count
from tokendial.methods import register
from tokendial.reduce.base import Reducer, ReducerConfig
from tokendial.reduce.tome import check_matching, match_tokens, max_merged
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("reduce", "ffn_merge")
@dataclass(frozen=True, kw_only=True)
class FFNMerge(ReducerConfig):
    """FFN-only merging: merge `r` tokens for each FFN; for tasks that need every position."""

    r: int = 256
    """Number of tokens that are merged before each FFN and restored after it."""
    step: int = 1
    """Number of tokens from one degree of the dial to the next; it must divide `r`. With 32, a
    ViT/16 at 512 x 512 pixels has 16 degrees above 0, as many as a compensator in the paper."""
    matching: Literal["bipartite", "random"] = "bipartite"
    """How pairs are chosen: "bipartite" merges the most similar pairs of two fixed sets of
    positions; "random" (a baseline) merges tokens at random positions."""
    stride: int = 2
    """One token in `stride` absorbs others, so up to (stride - 1) / stride of the tokens can merge.
    At least 2; "random" matching needs 2."""
    seed: int = 0
    """Seed that draws the positions for "random" matching."""

    def __post_init__(self) -> None:
        check_count("r", self.r, at_least=0)
        check_count("step", self.step)
        if self.r % self.step:
            raise ValueError(f"step must divide r ({self.r}), got {self.step}.")
        check_matching(self.matching, self.stride, self.seed)

    def build(self, vit: ViTShape) -> "FFNMergeReducer":
        """Make the module."""
        return FFNMergeReducer(self, vit)


class FFNMergeReducer(Reducer):
    """Runs FFN-only merging. Degree d merges d * `step` tokens."""

    needs = frozenset({"mean_keys"})
    keeps_grid = True

    def __init__(self, config: FFNMerge, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        limit = max_merged(vit.num_patches, config.stride)
        self.degrees = tuple(range(limit // config.step + 1))
        self.degree = config.r // config.step

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Return True: tokens merge in every layer."""
        return True

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Merge tokens with similar keys, run the FFN, and copy its output to all merged tokens."""
        assert attended.mean_keys is not None
        out = self.run_merged(layer, degree, tokens.x, attended.mean_keys, tokens.prefix, ffn)
        return tokens.x + out, None

    def run_merged(
        self,
        layer: int,
        degree: int,
        x_BND: Tensor,
        metric_BNC: Tensor,
        num_prefix_tokens: int,
        ffn: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Merge tokens, run the FFN, and copy its output to all merged tokens, [B, N, D].

        Args:
            layer: The block, counted from 1.
            degree: The degree of the dial.
            x_BND: The tokens that merge.
            metric_BNC: Features whose cosine says which of them are similar.
            num_prefix_tokens: Leading tokens that do not merge.
            ffn: Maps [..., D] to [..., D].
        """
        config = self.config
        grouping = match_tokens(
            metric_BNC,
            degree * config.step,
            num_prefix_tokens,
            matching=config.matching,
            stride=config.stride,
            seed=(config.seed, layer),
        )
        if grouping is None:
            return ffn(x_BND)
        return grouping.unmerge(ffn(grouping.merge(x_BND)))
