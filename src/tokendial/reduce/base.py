"""What every token-reduction method provides."""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, D embed_dim.

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
    """Settings of a reduction method; subclasses are registered frozen dataclasses."""

    @abstractmethod
    def build(self, vit: ViTShape) -> "Reducer":
        """Make the module that runs.

        Raises:
            ValueError: If the settings do not fit the backbone.
        """


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `tokendial.calibrate` measured of a dial whose shares of tokens depend on values."""

    thresholds: tuple[float, ...]
    """For degree 1, 2, ...: logit that a token has to exceed."""
    shares: tuple[float, ...]
    """For degree 1, 2, ...: share of the patch tokens that did."""


class Reducer(nn.Module, ABC):
    """Runs a reduction method: before a block, between its attention and FFN, or around its FFN.

    A method overrides the one hook that it needs; none is called at degree 0. Token counts follow
    from (layer, degree, number of tokens) alone, never from values, so that each degree compiles
    and exports as one graph; methods that cannot promise that say so.
    """

    needs: frozenset[str] = frozenset()
    """By-products of attention that `group` and `around_ffn` read."""
    tracks_size: bool = False
    """Whether tokens count the patches they stand for."""
    keeps_grid: bool = False
    """Whether every token leaves every block, so that adapters find the whole patch grid."""
    also_runs: frozenset[str] = frozenset()
    """Which optional `TrainingPasses` the method's `losses` read: "complete", "teacher"."""
    proportional_attention: bool = False
    """Whether token sizes weigh keys in attention."""
    degrees: tuple[int, ...]
    """Degrees that the dial offers, from 0 (no reduction) up, cheaper and cheaper."""
    degree: int
    """The degree that the settings describe."""
    calibration: Calibration | None = None
    """Saved with the model; None: nothing was measured, or nothing has to be."""

    @abstractmethod
    def acts(self, layer: int, degree: int) -> bool:
        """Whether the method reduces in `layer` (counted from 1), after its attention."""

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Tokens that enter `layer`; called in every layer."""
        return tokens

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """The reduction of `tokens` after attention of `layer`; None: nothing to do."""
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
            ffn: The FFN with its norm and scale, of [..., D].

        Returns:
            The tokens with the FFN's output added where it ran, [B, N, D], and which tokens were
            processed, [B, N] (None: all).
        """
        return None

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Losses of the method, weighted, to be added to the task's loss of the student."""
        return {}

    def at_step(self, step: int, steps_per_epoch: int) -> None:
        """Told before each step of training how many were done, for methods with a schedule."""


def init_linears(module: nn.Module) -> None:
    """Draw the weights of all linear layers inside as ViTs do: deviation 0.02, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's softmax from the teacher's, mean over rows."""
    return F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )


DIAL_RATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


def dial_of(rate: float) -> tuple[tuple[float, ...], int]:
    """Rates 1, 0.9, ... 0.1 with `rate` sorted in, and its position: the degrees of a share."""
    rates = tuple(sorted({1.0, float(rate), *DIAL_RATES}, reverse=True))
    return rates, rates.index(float(rate))


def num_kept_tokens(num_patches: int, keep_rate: float) -> int:
    """Number of patch tokens left at `keep_rate`, rounded up and never below one.

    Example:
        >>> num_kept_tokens(196, 0.7)
        138
    """
    # The epsilon absorbs binary rounding: 0.07 * 100 is 7.000000000000001, not 7.
    return max(1, math.ceil(keep_rate * num_patches - 1e-9))


def best_tokens(scores_BL: Tensor, count: int, num_prefix_tokens: int) -> Tensor:
    """Indices of the prefix tokens and then the best patch tokens, best first.

    Args:
        scores_BL: One score per patch token.
        count: Patch tokens to name; a Python int, so that shapes are static.
        num_prefix_tokens: Leading tokens that are always named.

    Returns:
        [B, num_prefix_tokens + count].
    """
    prefix = torch.arange(num_prefix_tokens, device=scores_BL.device).expand(scores_BL.shape[0], -1)
    best = scores_BL.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.cat([prefix, num_prefix_tokens + best], dim=1)
