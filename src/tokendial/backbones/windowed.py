"""Encoders with attention in windows: SAM's and ViTDet's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokendial.backbones.anatomy import pair
from tokendial.shape import ViTShape

WINDOWED: dict[str, tuple[str, str, Callable[[Any, Tensor], Tensor]]] = {
    "SamVisionEncoder": (
        "transformers", "layers", lambda vit, images: vit(images).last_hidden_state,
    ),
    "SamHQVisionEncoder": (
        "transformers", "layers", lambda vit, images: vit(images).last_hidden_state,
    ),
    "VitDetModel": (
        "transformers", "encoder.layer", lambda vit, images: vit(images).last_hidden_state,
    ),
    "VitDetBackbone": (
        "transformers", "encoder.layer", lambda vit, images: vit(images).feature_maps[-1],
    ),
    "VisionTransformerSAM": ("timm", "blocks", lambda vit, images: vit.forward_features(images)),
}  # fmt: skip
"""The library of each class, the path of its blocks, which have their FFN as `mlp`, and how it
gives a feature map."""


@dataclass(frozen=True)
class WindowedEncoder:
    """An encoder with attention in windows, whose FFNs read all tokens of an image."""

    vit: nn.Module
    """The encoder."""
    ffns: Sequence[nn.Module]
    """The FFN of each block, in order."""
    shape: ViTShape
    """Sizes of the encoder."""
    input_shape: tuple[int, int, int]
    """Shape of an image of the configured size, [C, H, W]."""

    @classmethod
    def of(cls, vit: Any) -> "WindowedEncoder | None":
        """The parts of an encoder; None if `vit` is something else."""
        library, path, _ = WINDOWED.get(type(vit).__name__, ("", "", None))
        if not library or type(vit).__module__.partition(".")[0] != library:
            return None
        blocks: Any = vit.get_submodule(path)
        if library == "timm":
            patch, size = vit.patch_embed.patch_size, vit.patch_embed.img_size
            channels, width = vit.patch_embed.proj.in_channels, vit.embed_dim
        else:
            patch, size = pair(vit.config.patch_size), pair(vit.config.image_size)
            channels, width = vit.config.num_channels, vit.config.hidden_size
        return cls(
            vit=vit,
            ffns=[block.mlp for block in blocks],
            shape=ViTShape(
                depth=len(blocks),
                embed_dim=width,
                num_prefix_tokens=0,
                num_patches=(size[0] // patch[0]) * (size[1] // patch[1]),
                has_class_token=False,
            ),
            input_shape=(channels, *size),
        )

    def feature_map(self, images: Tensor) -> Tensor:
        """The feature map [B, D, rows, columns] of images of the configured size; SAM's is that
        after its neck."""
        _, _, give_map = WINDOWED[type(self.vit).__name__]
        return give_map(self.vit, images)
