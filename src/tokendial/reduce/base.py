"""The interface of token-reduction methods, and functions that several of them share.

A method consists of a config (`ReducerConfig`), which users write down, and a module (`Reducer`),
which the config builds for a backbone.
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, D embed_dim, K patch tokens
# that are selected.

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.attention import ByProducts
from tokendial.passes import TrainingPasses
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


class ReducerConfig(ABC):
    """Settings of a token-reduction method. Subclasses are registered frozen dataclasses."""

    @abstractmethod
    def build(self, vit: ViTShape) -> "Reducer":
        """Make the module that runs the method in a backbone of this shape.

        Raises:
            ValueError: If the settings do not fit the backbone.
        """


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds that `tokendial.calibrate` found, and the fractions that it measured with them."""

    thresholds: tuple[float, ...]
    """Threshold of the logits at degree 1, 2, ...; the FFN processes tokens with a logit above."""
    shares: tuple[float, ...]
    """Fraction of the patch tokens that the FFN processed at degree 1, 2, ..., in [0, 1]."""


class Reducer(nn.Module, ABC):
    """Runs a token-reduction method: before a block, between attention and FFN, or around the FFN.

    A method overrides the one hook that it needs. At degree 0 no hook is called. The number of
    tokens depends on layer, degree and the number of tokens before, never on their values, so that
    each degree compiles and exports as one graph. Methods that cannot promise this (DyT and DAR by
    threshold) say so.
    """

    needs: frozenset[str] = frozenset()
    """Names of the `ByProducts` of attention that `group` and `around_ffn` read."""
    tracks_size: bool = False
    """Whether each token counts the patches that it stands for (`Tokens.size`)."""
    keeps_grid: bool = False
    """Whether all tokens leave every block, so that adapters can read the complete patch grid."""
    reads_grid: bool = False
    """Whether the method itself needs the complete patch grid in every block."""
    reads_grid_shape: bool = False
    """Whether the method reads how many rows and columns of patches the image has
    (`Tokens.grid`)."""
    protects: bool = True
    """Whether the method can leave chosen patches alone: it reduces what follows the prefix tokens,
    wherever it stands, or reads `Tokens.protected`."""
    protects_in_place: bool = False
    """Whether protected patches stay in their grid, and `Tokens.protected` says which they are."""
    extra_passes: frozenset[str] = frozenset()
    """Optional passes of `TrainingPasses` that `losses` reads: "complete", "teacher"."""
    proportional_attention: bool = False
    """Whether attention adds the logarithm of the token sizes to the logits of the keys."""
    degrees: tuple[int, ...]
    """Degrees that the dial offers: 0 (no reduction), then 1, 2, ..., each cheaper."""
    degree: int
    """Degree that the settings describe. A wrapped model starts at it."""
    calibration: Calibration | None = None
    """Result of `tokendial.calibrate`, saved with the model. None before calibration, and for
    methods without thresholds."""
    trained_degrees: tuple[int, ...] | None = None
    """Degrees between which the model was trained at once (`train.degrees` of a recipe), saved with
    the model. None: it was trained at one degree."""

    @abstractmethod
    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether `group` or `around_ffn` reduces tokens in `layer` (counted from 1)."""

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Return the tokens that enter `layer`; called in every layer."""
        return tokens

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Return the reduction after the attention of `layer`, or None if nothing is reduced."""
        return None

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None] | None:
        """Run the FFN of `layer` on fewer tokens; None: the model runs it on all tokens.

        Args:
            layer: The block, counted from 1.
            degree: The degree of the dial.
            tokens: The tokens that enter the FFN.
            attended: Output and by-products of attention.
            ffn: The FFN with its norm and layer scale; maps [..., D] to [..., D].

        Returns:
            The tokens [B, N, D], with the FFN's output added where it ran, and a mask [B, N] that
            is 1 where it ran (None: everywhere).
        """
        return None

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Return the method's weighted losses by name; training adds them to the task's loss."""
        return {}

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Receive the number of finished training steps before each step, for schedules."""


def init_linears(module: nn.Module) -> None:
    """Initialise all linear layers in `module` as ViTs do: weights by std 0.02, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(teacher || student) of softmax distributions, mean over rows.

    Args:
        student: Logits [M, K] that learn.
        teacher: Logits [M, K] to learn from.
    """
    return F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )


DIAL_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Keep rates that a dial of keep rates offers besides 1 and the configured rate."""


def make_rate_dial(rate: float) -> tuple[tuple[float, ...], int]:
    """Return the keep rate of each degree of a dial, and the degree of `rate`.

    The rates are 1, 0.9, ..., 0.1 in falling order, with `rate` inserted if it is another one.

    Example:
        >>> make_rate_dial(0.85)
        ((1.0, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1), 2)
    """
    rates = tuple(sorted({1.0, float(rate), *DIAL_RATES}, reverse=True))
    return rates, rates.index(float(rate))


SCORES: dict[str, str] = {
    "class": "class_attention",
    "mean": "mean_attention",
    "shift": "shift",
}
"""By-product of attention that each score of a token is."""


def token_scores(score: str, attended: ByProducts, num_prefix_tokens: int) -> Tensor:
    """Scores [B, L] of the patch tokens by one of `SCORES`."""
    scores = getattr(attended, SCORES[score])
    assert isinstance(scores, Tensor)
    return scores[:, num_prefix_tokens:]


def check_score(score: str, vit: ViTShape, method: str) -> None:
    """Raise a ValueError if a method is to score tokens by a class token that is not there."""
    if score == "class" and not vit.has_class_token:
        raise ValueError(
            f"{method} with score='class' needs a backbone with a class token, and this one has "
            "none: use score='mean', score='shift', or ToMe."
        )


def num_kept_tokens(num_patches: int, keep_rate: float) -> int:
    """Number of patch tokens left at `keep_rate`, rounded up and never below one.

    Example:
        >>> num_kept_tokens(196, 0.7)
        138
    """
    # The epsilon absorbs binary rounding: 0.07 * 100 is 7.000000000000001, not 7.
    return max(1, math.ceil(keep_rate * num_patches - 1e-9))


def best_tokens(scores_BL: Tensor, count: int, num_prefix_tokens: int) -> Tensor:
    """Indices of the prefix tokens, followed by the patch tokens with the highest scores.

    Args:
        scores_BL: One score per patch token.
        count: Number of patch tokens to select. A Python int, so that shapes are static.
        num_prefix_tokens: Number of leading tokens that are always included.

    Returns:
        [B, num_prefix_tokens + count], the patch tokens in falling order of their scores.
    """
    prefix = torch.arange(num_prefix_tokens, device=scores_BL.device).expand(scores_BL.shape[0], -1)
    best = scores_BL.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.cat([prefix, num_prefix_tokens + best], dim=1)
