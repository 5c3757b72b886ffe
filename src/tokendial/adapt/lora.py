"""LoRA on linear layers of the backbone, by the PEFT library.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
https://arxiv.org/abs/2106.09685. Departure: timm computes query, key and value in one layer `qkv`,
so by default one pair of low-rank matrices acts on all three. At equal rank it has as many
parameters as the paper's two pairs on query and value (4 * D * rank per layer).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokendial.adapt.base import AdapterConfig
from tokendial.adapt.peft import PEFTLayers
from tokendial.checks import check_count, check_dropout, check_positive, check_target_modules
from tokendial.extras import check_installed
from tokendial.methods import register
from tokendial.shape import ViTShape

if TYPE_CHECKING:
    import peft


@register("adapt", "lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig):
    """LoRA: learn low-rank updates of linear layers of the backbone."""

    rank: int = 8
    """Rank of each update."""
    alpha: float = 8.0
    """Scale of the updates, above 0: each update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability of dropout on the input of each update in training, in [0, 1)."""
    target_modules: tuple[str, ...] = ("qkv",)
    """Linear layers to update, each by the last part of its name: qkv, proj, fc1 or fc2 in timm's
    ViTs."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        check_count("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_dropout("dropout", self.dropout)
        check_target_modules(self.target_modules)

    def build(self, vit: ViTShape) -> "LoRAAdapter":
        """Make the adapter; PEFT makes the weights when it is installed."""
        return LoRAAdapter(self)

    def peft_config(self) -> "peft.LoraConfig":
        """Return the same settings as PEFT's own config."""
        check_installed("LoRA", "peft")
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT multiplies by it, any number
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
        )


class LoRAAdapter(PEFTLayers):
    """Runs LoRA, by PEFT's layers."""

    def __init__(self, config: LoRA) -> None:
        super().__init__(config.peft_config(), config.target_modules)
        self.is_additive = True
