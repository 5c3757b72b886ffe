"""DyT: a dispatcher in each layer decides which tokens the FFN processes.

Source: Zhao et al., "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation",
NeurIPS 2024, https://arxiv.org/abs/2403.11808, and the authors' code: the dispatcher reads the
un-normalised tokens after attention, class tokens are always processed, the adapter beside the FFN
(AdaptFormer) sees every token. Departure: at inference the FFN really skips the others, where the
code computes all and multiplies by the mask.
"""

# Shape legend: B batch, L patch tokens, D embed_dim.

from dataclasses import dataclass

from torch import Tensor, nn

from tokendial.checks import check_share
from tokendial.methods import register
from tokendial.passes import TrainingPasses
from tokendial.reduce.base import divergence, init_linears
from tokendial.reduce.select import SelectConfig, Selector, selected_patches
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("reduce", "dyt")
@dataclass(frozen=True, kw_only=True)
class DyT(SelectConfig):
    """Process about `target_ratio` of the patch tokens in each FFN; goes with `AdaptFormer`."""

    minimal_ratio: float | None = None
    """Floor under the decision on every token, see `rate_loss`; None: no floor."""
    minimal_weight: float = 1.0
    """Weight of the floor in the loss."""
    complete: bool = True
    """Also train the model that processes every token, and make it the student's teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimal_ratio is not None:
            check_share("minimal_ratio", self.minimal_ratio)

    def build(self, vit: ViTShape) -> "DyTReducer":
        """Make the dispatchers."""
        return DyTReducer(self, vit)


class DyTReducer(Selector):
    """Runs DyT: one linear dispatcher per layer, D + 1 parameters."""

    config: DyT

    def __init__(self, config: DyT, vit: ViTShape) -> None:
        super().__init__(config, vit)
        self.also_runs = frozenset({"complete"} if config.complete else ())
        self.dispatchers = nn.ModuleList(nn.Linear(vit.embed_dim, 1) for _ in range(vit.depth))
        init_linears(self)

    def logits(self, layer: int, tokens: Tokens) -> Tensor:
        """The dispatcher's logits of the patch tokens."""
        patches = tokens.x[:, tokens.prefix :]
        return self.dispatchers[layer - 1](patches).squeeze(-1)  # type: ignore[no-any-return]

    def losses(self, passes: TrainingPasses) -> dict[str, Tensor]:
        """The share of tokens, the complete model's task loss, and its distillation."""
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
            losses["distilled"] = divergence(student.logits, complete.logits.detach())
        return losses


def rate_loss(
    selected_BL: Tensor, target: float, *, minimal: float = 0.0, minimal_weight: float = 0.0
) -> Tensor:
    """Squared distance between the share of selected tokens, over everything, and the target.

    Args:
        selected_BL: Decisions [B, depth, L].
        target: The share that is wanted.
        minimal: Floor under each single decision.
        minimal_weight: Weight of what is missing to the floor, summed over all decisions as in the
            authors' code.

    Source:
        DyT, section 3.2 (equation of the rate loss); the authors' code for the floor.
    """
    loss = (selected_BL.mean() - target) ** 2
    if minimal_weight > 0:
        loss = loss + minimal_weight * (minimal - selected_BL).clamp(min=0).sum()
    return loss
