"""The interface of decoders."""

from abc import ABC, abstractmethod

from torch import nn

from tokendial.shape import ViTShape


class DecoderConfig(ABC):
    """Settings of a decoder. Subclasses are registered frozen dataclasses."""

    num_classes: int
    """Number of logit maps: the number of classes, or 1 for a binary mask."""

    @abstractmethod
    def build(self, vit: ViTShape) -> nn.Module:
        """Make the module that runs the decoder on a backbone of this shape.

        Returns:
            A module that maps the feature map [B, D, H, W] after the final norm to logits
            [B, num_classes, h, w]. The decoder chooses h and w.

        Raises:
            ValueError: If the settings do not fit the backbone.
        """
