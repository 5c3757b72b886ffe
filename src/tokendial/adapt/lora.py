"""LoRA on linear layers of the backbone, by the PEFT library.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
https://arxiv.org/abs/2106.09685. timm keeps query, key and value in one layer `qkv`; at equal rank
LoRA on it has the parameters of separate pairs on query and value (4 * D * rank per layer).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokendial.adapt.base import AdapterConfig
from tokendial.adapt.peft import PEFTLayers
from tokendial.extras import check_installed
from tokendial.methods import register
from tokendial.shape import ViTShape

if TYPE_CHECKING:
    import peft


@register("adapt", "lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig):
    """Low-rank updates of linear layers."""

    rank: int = 8
    """Rank of each update."""
    alpha: float = 8.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of the update, in [0, 1)."""
    target_modules: tuple[str, ...] = ("qkv",)
    """Endings of the names of the layers: qkv, proj, fc1, fc2."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank}.")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        if not self.target_modules:
            raise ValueError("target_modules must name at least one layer, got none.")

    def build(self, vit: ViTShape) -> "LoRAAdapter":
        """Make the module."""
        return LoRAAdapter(self)

    def peft_config(self) -> "peft.LoraConfig":
        """The same settings as PEFT's own config."""
        check_installed("LoRA", "peft")
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT multiplies by it, any number
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
        )


class LoRAAdapter(PEFTLayers):
    """Runs LoRA."""

    def __init__(self, config: LoRA) -> None:
        super().__init__(config.peft_config(), config.target_modules)
        self.adds = True
