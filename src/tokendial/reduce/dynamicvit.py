"""DynamicViT: before a few layers, small networks score the patch tokens and the best are kept.

Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
NeurIPS 2021, https://arxiv.org/abs/2106.02034, and the authors' code: counts are relative to the
number of patches of the image; kept tokens stand in descending order of score; training removes no
token but masks dropped ones out of attention, and uses masked attention from the first layer on.

Departure: where a predictor keeps no token, their mean feature is zero (the authors' code divides
by zero).
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, D embed_dim.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.checks import (
    check_choice,
    check_fraction,
    check_layers,
    check_layers_exist,
    check_not_negative,
)
from tokendial.methods import register
from tokendial.passes import TrainingPasses
from tokendial.reduce.base import (
    Reducer,
    ReducerConfig,
    best_tokens,
    init_linears,
    kl_divergence,
    make_rate_dial,
)
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


@register("reduce", "dynamicvit")
@dataclass(frozen=True, kw_only=True)
class DynamicViT(ReducerConfig):
    """DynamicViT: before the i-th of `layers`, keep the fraction keep_rate ** i of all patches."""

    keep_rate: float | Sequence[float] = 0.7
    """Fraction of the present patch tokens that each layer of `layers` keeps, in (0, 1]; or a list:
    for each layer of `layers` the fraction of all patches, falling. With a list the dial is off or
    on."""
    layers: tuple[int, ...] = (4, 7, 10)
    """Layers before which tokens are dropped, counted from 1, in rising order."""
    ratio_weight: float = 2.0
    """Weight of the training loss that pulls the fractions of kept tokens to their targets; at
    least 0."""
    distill_weight: float = 0.5
    """Weight of the distillation of logits and of tokens from `train.teacher`, at least 0. Without
    a teacher it has no effect."""
    ratio_over: Literal["image", "batch"] = "image"
    """Whether that loss compares the fraction of each image with the target, or the mean fraction
    of the batch (an option of the authors' code)."""
    token_loss: str = "mse"
    """Loss for the distillation of tokens: "mse" is the mean squared error of their features, "kl"
    the divergence of the softmax over their features."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check_layers(self.layers)
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers must rise, got {self.layers}.")
        self._freeze_keep_rate()
        check_choice("ratio_over", self.ratio_over, ("image", "batch"))
        check_not_negative("ratio_weight", self.ratio_weight)
        check_not_negative("distill_weight", self.distill_weight)
        check_choice("token_loss", self.token_loss, ("mse", "kl"))

    def _freeze_keep_rate(self) -> None:
        if not isinstance(self.keep_rate, list | tuple):
            check_fraction("keep_rate", self.keep_rate)
            return
        rates = tuple(self.keep_rate)
        for rate in rates:
            check_fraction("keep_rate", rate)
        if len(rates) != len(self.layers) or list(rates) != sorted(rates, reverse=True):
            raise ValueError(
                f"keep_rate must have one falling entry for each of the {len(self.layers)} layers, "
                f"got {list(rates)}."
            )
        object.__setattr__(self, "keep_rate", rates)

    def build(self, vit: ViTShape) -> "DynamicViTReducer":
        """Make the predictors. Raises a ValueError if a layer does not exist."""
        return DynamicViTReducer(self, vit)


class KeepPredictor(nn.Module):
    """Scores patch tokens by their own features and the mean feature of the kept tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.outside = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x_BLD: Tensor, kept_BL: Tensor) -> Tensor:
        """Return log-probabilities [B, L, 2]: keep the token (index 0), drop it (index 1).

        Args:
            x_BLD: The patch tokens.
            kept_BL: 1 for tokens that earlier predictors kept, 0 for the others.
        """
        local, shared = self.inside(x_BLD).chunk(2, dim=-1)
        kept_BL1 = kept_BL.to(shared.dtype).unsqueeze(-1)
        count = kept_BL1.sum(1, keepdim=True).clamp(min=1)
        mean = (shared * kept_BL1).sum(1, keepdim=True) / count
        scores: Tensor = self.outside(torch.cat([local, mean.expand_as(shared)], dim=-1))
        return scores


class DynamicViTReducer(Reducer):
    """Runs DynamicViT.

    The degree is the position in the list of keep rates of `make_rate_dial`. With a list of keep
    rates degree 0 drops nothing, and degree 1 keeps the listed fractions.
    """

    learns_one_share = True
    extra_passes = frozenset({"teacher"})

    def __init__(self, config: DynamicViT, vit: ViTShape) -> None:
        super().__init__()
        check_layers_exist(config.layers, vit.depth)
        self.config = config
        stages = range(1, len(config.layers) + 1)
        if isinstance(config.keep_rate, Sequence):
            self.kept = [(1.0,) * len(config.layers), tuple(config.keep_rate)]
            self.degree = 1
        else:
            rates, self.degree = make_rate_dial(config.keep_rate)
            self.kept = [tuple(rate**stage for stage in stages) for rate in rates]
        self.degrees = tuple(range(len(self.kept)))
        self.predictors = nn.ModuleList(KeepPredictor(vit.embed_dim) for _ in config.layers)
        init_linears(self)

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Return False: tokens are dropped before the block, by `before_block`."""
        return False

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Drop tokens before the layers of `layers`; in training, mask them out of attention."""
        if self.training and tokens.policy is None:
            tokens = replace(tokens, policy=torch.ones_like(tokens.x[..., 0]))
        if layer not in self.config.layers:
            return tokens
        stage = self.config.layers.index(layer)
        patches = tokens.x[:, tokens.prefix :]
        if tokens.policy is not None:
            before = tokens.policy[:, tokens.prefix :]
            scores = self.predictors[stage](patches, before)
            # Gradients of the drawn decision are those of the soft decision (straight-through).
            drawn = F.gumbel_softmax(scores, hard=True)[..., 0] * before
            always, drawn = before[:, : tokens.num_protected], drawn[:, tokens.num_protected :]
            policy = torch.cat([tokens.policy[:, : tokens.prefix], always, drawn], dim=1)
            return replace(tokens, policy=policy)
        scores = self.predictors[stage](patches, torch.ones_like(patches[..., 0]))[..., 0]
        rows, columns = tokens.grid
        patches_at_first = tokens.grids * rows * columns - tokens.num_protected
        count = max(1, int(patches_at_first * self.kept[degree][stage]))
        # The predictor sees protected patches too; they are kept whatever it says.
        first = tokens.num_protected
        keep = best_tokens(scores[:, first:], count, tokens.prefix + first)
        return tokens.apply_grouping(Grouping.keep_only(keep, tokens.x.shape[1]))

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Return the loss on the fractions of kept tokens; with a teacher also distillation."""
        config, student, teacher = self.config, passes.student, passes.teacher
        targets = self.kept[student.degree]
        policies = [self._policy(student.tokens[layer - 1]) for layer in config.layers]
        over = 1 if config.ratio_over == "image" else (0, 1)
        shares = [
            policy.mean(dim=over) - target for policy, target in zip(policies, targets, strict=True)
        ]
        losses = {"ratio": config.ratio_weight * torch.stack(shares).square().mean()}
        if teacher is None or not config.distill_weight:
            return losses
        logits = kl_divergence(student.logits, teacher.logits)
        prefix = student.tokens[-1].prefix
        kept = policies[-1].detach() > 0.5
        tokens = token_distillation(
            student.features[:, prefix:][kept],
            teacher.features[:, prefix:][kept],
            config.token_loss,
        )
        return losses | {
            "distilled_logits": config.distill_weight * logits,
            "distilled_tokens": config.distill_weight * tokens,
        }

    @staticmethod
    def _policy(tokens: Tokens) -> Tensor:
        if tokens.policy is None:
            raise ValueError(
                "degree must be at least 1 in training, so that tokens are masked; got 0."
            )
        return tokens.policy[:, tokens.prefix :]


def token_distillation(student_KD: Tensor, teacher_KD: Tensor, kind: str) -> Tensor:
    """Distance of the kept tokens' features from the teacher's; 0 if no token is kept.

    Args:
        student_KD: Features of the student's kept tokens, of all images.
        teacher_KD: The teacher's features at the same positions.
        kind: "mse" or "kl", see `DynamicViT.token_loss`.

    Source:
        DynamicViT, equation 12; the authors' code for the mean squared error.
    """
    if not len(student_KD):
        return student_KD.sum()
    student_KD, teacher_KD = student_KD.float(), teacher_KD.float()
    if kind == "mse":
        return F.mse_loss(student_KD, teacher_KD)
    return kl_divergence(student_KD, teacher_KD)
