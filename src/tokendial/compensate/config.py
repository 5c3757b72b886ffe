"""Settings of ToCom."""

from dataclasses import dataclass

from tokendial.checks import check_count
from tokendial.methods import register


@register("compensate", "tocom")
@dataclass(frozen=True, kw_only=True)
class ToCom:
    """Settings of a Token Compensator (ToCom).

    Source:
        Jie et al., "Token Compensator: Altering Inference Cost of Vision Transformer without
        Re-Tuning", ECCV 2024, https://arxiv.org/abs/2408.06798.
    """

    rank: int = 2
    """Rank of the low-rank pair that bridges one step of the dial."""
    scale: float = 0.1
    """Factor on the weight difference in training; also at inference, until `search_scale` sets
    another one."""
    dropout: float = 0.1
    """Dropout rate between the two matrices of a pair, in training, in [0, 1)."""
    shared: bool = False
    """Ablation: use one pair for all steps, added on the way up and subtracted on the way down."""
    inversion: bool = True
    """Use the negative of a step's pair on the way down. False is an ablation: steps down have
    pairs of their own."""

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.shared and not self.inversion:
            raise ValueError("inversion must be true with shared, got false.")
