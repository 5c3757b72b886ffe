"""VideoMAE's ViT as a timm model, with tubelets, fixed or learnt positions and average pooling.

Source: Tong et al., "VideoMAE", NeurIPS 2022, https://arxiv.org/abs/2203.12602, and its code. Its
keys have no bias; here the bias is zero, which gives the same attention.
"""

# Shape legend: B clips, T frames, N tokens, D embed_dim.

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TubeletEmbed(nn.Module):
    """Embeds a clip as tubelets (one patch in several consecutive frames) with positions."""

    positions: Tensor

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        frames: int,
        tubelet: int,
        learnt_positions: bool = False,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Create the convolution and the position table; timm passes the arguments.

        Raises:
            ValueError: If `frames` is not a multiple of `tubelet`, or `dynamic_img_pad` is set.
        """
        super().__init__()
        if frames < 1 or tubelet < 1 or frames % tubelet:
            raise ValueError(f"frames must be a multiple of tubelet ({tubelet}), got {frames}.")
        if dynamic_img_pad:
            raise ValueError("dynamic_img_pad must be False for tubelets, got True.")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = height, width
        self.patch_size, self.frames, self.tubelet = (patch_size, patch_size), frames, tubelet
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = frames // tubelet * self.grid_size[0] * self.grid_size[1]
        cut = (tubelet, *self.patch_size)
        self.proj = nn.Conv3d(
            in_chans, embed_dim, cut, stride=cut, bias=bias, device=device, dtype=dtype
        )
        table = sine_positions(self.num_patches, embed_dim).to(device, dtype)
        if learnt_positions:
            self.positions = nn.Parameter(table)
        else:
            self.register_buffer("positions", table, persistent=False)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of patches in a frame of this size."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, clips_BT3HW: Tensor) -> Tensor:
        """Return tokens [B, N, D] with positions, ordered by time, row and column."""
        tubelets: Tensor = self.proj(clips_BT3HW.transpose(1, 2))
        return tubelets.flatten(2).transpose(1, 2) + self.positions


def sine_positions(num_positions: int, embed_dim: int) -> Tensor:
    """Fixed positions [1, N, D] of "Attention Is All You Need": sines and cosines alternate."""
    channel = torch.arange(embed_dim, dtype=torch.float64)
    rate = 10_000.0 ** (-2 * (channel // 2) / embed_dim)
    angle = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1) * rate
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos())
    return table.float().unsqueeze(0)


# register_model of timm looks up this table by its name.
default_cfgs = generate_default_cfgs(
    {
        f"videomae_{size}_patch16_224": {
            "input_size": (3, 224, 224),
            "num_classes": 400,
            "mean": _MEAN,
            "std": _STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for size in ("small", "base", "large", "huge")
    }
)


def _create(name: str, pretrained: bool, sizes: dict[str, int], kwargs: dict[str, Any]) -> Any:
    tubelets = {"frames": kwargs.pop("frames", 16), "tubelet": kwargs.pop("tubelet", 2)}
    tubelets["learnt_positions"] = kwargs.pop("learnt_positions", False)
    fixed = {
        "embed_layer": partial(TubeletEmbed, **tubelets),
        "pos_embed": "none",
        "class_token": False,
        "global_pool": "avg",
    }
    return build_model_with_cfg(VisionTransformer, name, pretrained, **(sizes | kwargs | fixed))


@register_model
def videomae_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """VideoMAE ViT-S: 16 frames in tubelets of 2."""
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("videomae_small_patch16_224", pretrained, sizes, kwargs)


@register_model
def videomae_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """VideoMAE ViT-B: 16 frames in tubelets of 2."""
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("videomae_base_patch16_224", pretrained, sizes, kwargs)


@register_model
def videomae_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """VideoMAE ViT-L: 16 frames in tubelets of 2."""
    sizes = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("videomae_large_patch16_224", pretrained, sizes, kwargs)


@register_model
def videomae_huge_patch16_224(pretrained: bool = False, **kwargs: Any) -> Any:
    """VideoMAE ViT-H: 16 frames in tubelets of 2."""
    sizes = {"patch_size": 16, "embed_dim": 1280, "depth": 32, "num_heads": 16}
    return _create("videomae_huge_patch16_224", pretrained, sizes, kwargs)


_ADAPTFORMER = re.compile(r"(blocks\.\d+)\.(fc[12]\..+)")
_ONLY_IN_PRETRAINING = ("decoder", "encoder_to_decoder", "mask_token")


def filter_videomae(
    state: Mapping[str, Tensor], vit: Any, left_out: Counter[str]
) -> dict[str, Tensor]:
    """Convert a VideoMAE checkpoint to timm's names.

    Args:
        state: Tensors of VideoMAE's own code (pre-trained or fine-tuned), of AdaptFormer's code, or
            of transformers' VideoMAE.
        vit: The model to load into. A pre-trained file has no norm after pooling, so the model's
            own one is used.
        left_out: Counter that is raised for each tensor that only pre-training needs.

    Raises:
        ValueError: If the checkpoint has learnt positions, and the model does not.
    """
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(_ONLY_IN_PRETRAINING):
            left_out[name.split(".")[0]] += 1
        elif name == "pos_embed" and isinstance(vit.patch_embed.positions, nn.Parameter):
            named["patch_embed.positions"] = value
        elif name == "pos_embed":
            _check_fixed(value)
        else:
            named[_ADAPTFORMER.sub(r"\1.mlp.\2", name)] = value
    if "head.weight" not in named and "fc_norm.weight" not in named:
        # A pre-trained file has its last norm before pooling; only pre-training uses it.
        for part, value in vit.fc_norm.state_dict().items():
            left_out["norm"] += named.pop(f"norm.{part}", None) is not None
            named[f"fc_norm.{part}"] = value
    return named


def _check_fixed(positions: Tensor) -> None:
    """Raise a ValueError unless positions are the fixed sines and cosines of the model."""
    fixed = sine_positions(*positions.shape[1:]) if positions.ndim == 3 else positions.new_zeros(())
    if fixed.shape != positions.shape or not torch.allclose(positions.float(), fixed, atol=1e-2):
        raise ValueError(
            "its positions (pos_embed) were learnt, those of this model are fixed: create it with "
            "learnt_positions=True (in a recipe: model.args.learnt_positions)"
        )
