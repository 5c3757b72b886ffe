"""DynamicViT: small predictors score the patch tokens before a few layers; the best are kept.

Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
NeurIPS 2021, https://arxiv.org/abs/2106.02034, and the authors' code: counts are relative to the
image's first number of patches; kept tokens stand in descending order of score; in training
nothing leaves, dropped tokens are masked out of attention, in every layer and from the first on.
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, D embed_dim.

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.checks import check_choice, check_layers, check_own_layers, check_share
from tokendial.methods import register
from tokendial.passes import TrainingPasses
from tokendial.reduce.base import (
    Reducer,
    ReducerConfig,
    best_tokens,
    dial_of,
    divergence,
    init_linears,
)
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


@register("reduce", "dynamicvit")
@dataclass(frozen=True, kw_only=True)
class DynamicViT(ReducerConfig):
    """Before the i-th layer of `layers`, keep keep_rate ** i of the image's patch tokens."""

    keep_rate: float = 0.7
    """Share of the patch tokens that each step keeps, in (0, 1]."""
    layers: tuple[int, ...] = (4, 7, 10)
    """Layers before which tokens are dropped, counted from 1."""
    ratio_weight: float = 2.0
    """Weight of the loss that keeps the shares at their targets."""
    distill_weight: float = 0.5
    """Weight of the distillation of logits and of tokens, if there is a teacher."""
    token_loss: str = "mse"
    """Distillation of tokens: mean squared error ("mse"), or the divergence of their channels'
    softmax ("kl")."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check_own_layers(self.layers)
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"layers must rise, got {self.layers}.")
        check_share("keep_rate", self.keep_rate)
        for name in ("ratio_weight", "distill_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        check_choice("token_loss", self.token_loss, ("mse", "kl"))

    def build(self, vit: ViTShape) -> "DynamicViTReducer":
        """Make the predictors; raises a ValueError for a missing layer."""
        return DynamicViTReducer(self, vit)


class Predictor(nn.Module):
    """Scores patch tokens by their own features and the mean of those that are still kept."""

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
        """Log-probabilities [B, L, 2] of keeping (first) and dropping (second) each token."""
        local, shared = self.inside(x_BLD).chunk(2, dim=-1)
        kept_BL1 = kept_BL.to(shared.dtype).unsqueeze(-1)
        # Where none is kept the mean is zero; the authors' code divides by zero there.
        count = kept_BL1.sum(1, keepdim=True).clamp(min=1)
        mean = (shared * kept_BL1).sum(1, keepdim=True) / count
        scores: Tensor = self.outside(torch.cat([local, mean.expand_as(shared)], dim=-1))
        return scores


class DynamicViTReducer(Reducer):
    """Runs DynamicViT; the degree is the position in the list of keep rates 1, 0.9, ... 0.1."""

    also_runs = frozenset({"teacher"})

    def __init__(self, config: DynamicViT, vit: ViTShape) -> None:
        super().__init__()
        check_layers(config.layers, vit.depth)
        self.config = config
        self.rates, self.degree = dial_of(config.keep_rate)
        self.degrees = tuple(range(len(self.rates)))
        self.predictors = nn.ModuleList(Predictor(vit.embed_dim) for _ in config.layers)
        init_linears(self)

    def acts(self, layer: int, degree: int) -> bool:
        """Never after attention: it drops tokens before the block."""
        return False

    def before_block(self, layer: int, degree: int, tokens: Tokens) -> Tokens:
        """Drop tokens, or in training mask them out."""
        if self.training and tokens.policy is None:
            tokens = replace(tokens, policy=torch.ones_like(tokens.x[..., 0]))
        if layer not in self.config.layers:
            return tokens
        stage = self.config.layers.index(layer)
        patches = tokens.x[:, tokens.prefix :]
        if tokens.policy is not None:
            before = tokens.policy[:, tokens.prefix :]
            scores = self.predictors[stage](patches, before)
            # Gradients flow through the drawn decision as through the soft one.
            drawn = F.gumbel_softmax(scores, hard=True)[..., 0] * before
            policy = torch.cat([tokens.policy[:, : tokens.prefix], drawn], dim=1)
            return replace(tokens, policy=policy)
        scores = self.predictors[stage](patches, torch.ones_like(patches[..., 0]))[..., 0]
        rows, columns = tokens.grid
        patches_at_first = tokens.grids * rows * columns
        count = max(1, int(patches_at_first * self.rates[degree] ** (stage + 1)))
        keep = best_tokens(scores, count, tokens.prefix)
        return tokens.reduced(Grouping.keeping(keep, tokens.x.shape[1]))

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """The shares of tokens, and with a teacher the distillation of logits and tokens."""
        config, student, teacher = self.config, passes.student, passes.teacher
        rate = self.rates[student.degree]
        policies = [self._policy(student.tokens[layer - 1]) for layer in config.layers]
        shares = [policy.mean(dim=1) - rate ** (i + 1) for i, policy in enumerate(policies)]
        losses = {"ratio": config.ratio_weight * torch.stack(shares).square().mean()}
        if teacher is None or not config.distill_weight:
            return losses
        logits = divergence(student.logits, teacher.logits)
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
            raise ValueError("no tokens were masked: degree must be at least 1 in training, got 0.")
        return tokens.policy[:, tokens.prefix :]


def token_distillation(student_KD: Tensor, teacher_KD: Tensor, kind: str) -> Tensor:
    """Distance of the kept tokens' features from the teacher's; 0 if none is kept.

    Source:
        DynamicViT, equation 12; the authors' code for the mean squared error.
    """
    if not len(student_KD):
        return student_KD.sum()
    student_KD, teacher_KD = student_KD.float(), teacher_KD.float()
    if kind == "mse":
        return F.mse_loss(student_KD, teacher_KD)
    return divergence(student_KD, teacher_KD)
