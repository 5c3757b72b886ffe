"""What every decoder provides."""

from abc import ABC, abstractmethod

from torch import nn

from tokendial.shape import ViTShape


class DecoderConfig(ABC):
    """Settings of a decoder; subclasses are registered frozen dataclasses."""

    num_classes: int
    """Logit maps: one for a binary mask."""

    @abstractmethod
    def build(self, vit: ViTShape) -> nn.Module:
        """Make the module: from the feature map [B, D, H, W] after the final norm to logits
        [B, num_classes, h, w], at a resolution of its own.

        Raises:
            ValueError: If the settings do not fit the backbone.
        """


def check_counts(**counts: int) -> None:
    """Raise a ValueError unless every number is an integer of at least 1."""
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {count!r}.")


def check_dropout(dropout: float) -> None:
    """Raise a ValueError unless it lies in [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
