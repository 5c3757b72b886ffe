"""DyT: a linear dispatcher in each layer selects the tokens that the FFN processes.

Source: Zhao et al., "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation",
NeurIPS 2024, https://arxiv.org/abs/2403.11808, and the authors' code: the dispatcher reads the
un-normalised tokens after attention; class tokens are always processed; the adapter beside the FFN
(AdaptFormer) reads all tokens. Departure: at inference the FFN does not compute the other tokens
(the authors' code computes all tokens and multiplies by the mask).
"""

# Shape legend: B batch, L patch tokens, D embed_dim.

from dataclasses import dataclass

from torch import Tensor, nn

from tokendial.checks import check_fraction, check_not_negative
from tokendial.methods import register
from tokendial.passes import TrainingPasses
from tokendial.reduce.base import init_linears, kl_divergence
from tokendial.reduce.select import SelectConfig, Selector, selected_patches
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("reduce", "dyt")
@dataclass(frozen=True, kw_only=True)
class DyT(SelectConfig):
    """DyT: each FFN processes the fraction `target_ratio` of patches; use with `AdaptFormer`."""

    minimal_ratio: float | None = None
    """Lower bound on the decision for each token, in (0, 1]; training penalises decisions below it,
    see `rate_loss`. None: no bound."""
    minimal_weight: float = 1.0
    """Weight of that penalty in the loss, at least 0."""
    complete: bool = True
    """Whether training also runs the model at degree 0: on the task's loss, and as the teacher of
    the model at the trained degree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimal_ratio is not None:
            check_fraction("minimal_ratio", self.minimal_ratio)
        check_not_negative("minimal_weight", self.minimal_weight)

    def build(self, vit: ViTShape) -> "DyTReducer":
        """Make one dispatcher per layer."""
        return DyTReducer(self, vit)


class DyTReducer(Selector):
    """Runs DyT, with one linear dispatcher of D + 1 parameters per layer."""

    config: DyT

    def __init__(self, config: DyT, vit: ViTShape) -> None:
        super().__init__(config, vit)
        self.extra_passes = frozenset({"complete"} if config.complete else ())
        self.dispatchers = nn.ModuleList(nn.Linear(vit.embed_dim, 1) for _ in range(vit.depth))
        init_linears(self)

    def logits(self, layer: int, tokens: Tokens) -> Tensor:
        """Return the dispatcher's logits of the patch tokens."""
        patches = tokens.x[:, tokens.prefix :]
        return self.dispatchers[layer - 1](patches).squeeze(-1)  # type: ignore[no-any-return]

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """Return the losses: fraction of tokens; task loss at and distillation from degree 0."""
        config, student, complete = self.config, passes.student, passes.complete
        rate = rate_loss(
            selected_patches(student),
            self.rates[student.degree],
            minimal=config.minimal_ratio or 0.0,
            minimal_weight=config.minimal_weight if config.minimal_ratio else 0.0,
        )
        losses = {"rate": config.ratio_weight * rate}
        if complete is not None:
            losses["complete"] = passes.task_loss(complete.logits)
            losses["distilled"] = kl_divergence(student.logits, complete.logits.detach())
        return losses


def rate_loss(
    selected_BL: Tensor, target: float, *, minimal: float = 0.0, minimal_weight: float = 0.0
) -> Tensor:
    """Squared difference of the fraction of selected tokens in the batch and the target.

    Args:
        selected_BL: Decisions [B, ...] of all layers.
        target: The fraction to reach, in (0, 1].
        minimal: Lower bound on each decision.
        minimal_weight: Weight of the penalty max(0, minimal - decision), summed over all decisions
            as in the authors' code.

    Source:
        DyT, section 3.2 (equation of the rate loss); the authors' code for the lower bound.
    """
    loss = (selected_BL.mean() - target) ** 2
    if minimal_weight > 0:
        loss = loss + minimal_weight * (minimal - selected_BL).clamp(min=0).sum()
    return loss
