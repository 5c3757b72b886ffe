"""Video models on timm's VisionTransformer: frame by frame with a pooling head, and VideoMAE."""

# Shape legend: B batch, T frames, D embed_dim.

from dataclasses import replace

from torch import Tensor

from tokendial.backbones.timm_vit import TimmViT
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


class TimmFrames(TimmViT):
    """An image model whose head pools the frames of a clip. Each frame is one row of the batch."""

    @property
    def frames(self) -> int:
        return int(self.vit.head.frames)

    @property
    def head_reads_prefix_only(self) -> bool:
        return False  # its head reads all tokens, whatever the image model's head did

    def embed(self, images_B3HW: Tensor) -> Tokens:
        check_clips(images_B3HW, self.frames)
        return super().embed(images_B3HW.flatten(0, 1))

    def classify(self, tokens: Tokens) -> Tensor:
        x = self.vit.head_drop(self.norm(tokens.x))
        return self.vit.head(x, tokens.size)  # type: ignore[no-any-return]


class TimmTubelets(TimmViT):
    """A model that embeds tubelets. All tokens of a clip attend to each other."""

    @property
    def frames(self) -> int:
        return int(self.vit.patch_embed.frames)

    @property
    def shape(self) -> ViTShape:
        return replace(super().shape, num_grids=self.time_steps)

    @property
    def time_steps(self) -> int:
        return self.frames // int(self.vit.patch_embed.tubelet)

    def embed(self, images_B3HW: Tensor) -> Tokens:
        check_clips(images_B3HW, self.frames)
        if images_B3HW.shape[0] == 0:  # len() would fix the batch size of exported files
            return self.embed_none(images_B3HW)
        return replace(super().embed(images_B3HW), grids=self.time_steps)


def check_clips(clips_BT3HW: Tensor, frames: int) -> None:
    """Raise a ValueError unless the tensor holds clips of `frames` frames."""
    if clips_BT3HW.ndim != 5 or clips_BT3HW.shape[1] != frames:
        raise ValueError(
            f"clips must be [batch, {frames} frames, 3, height, width], got "
            f"{list(clips_BT3HW.shape)}."
        )
