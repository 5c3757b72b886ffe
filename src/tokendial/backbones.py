"""The one module that knows timm's Vision Transformer from inside: build, check, embed, pool."""

import difflib
import logging
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timm
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.patch_dropout import PatchDropout
from timm.models import load_state_dict
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from tokendial.reduce.base import ViTShape
from tokendial.tokens import Tokens

SHIPPED_NAME = "scenes_vit"
SHIPPED_ARGS: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 6,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
}
HEADS = ("head", "head_dist")
"""Names of timm's classification heads; the second is DeiT's distillation head."""

_SUPPORTED = (
    "timm's VisionTransformer built of the standard pre-norm Block: ViT, DeiT (also distilled), "
    "DeiT-III, DINO, DINOv2 with or without registers, MAE, AugReg, CLIP and SigLIP image towers"
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Which timm model, with which arguments and weights: all it takes to build it again."""

    name: str
    """timm's model name, or "scenes_vit" for the small model that is shipped."""
    weights: str | None = "pretrained"
    """"pretrained" (timm's, from the hub), "shipped", None (random), or a path: a state dict
    (.safetensors, .pth), or a folder with a fully fine-tuned model of ours."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the timm model, such as img_size, num_classes, drop_path_rate."""

    @classmethod
    def of(cls, vit: VisionTransformer) -> "Backbone":
        """Describe a timm model, as far as it knows itself.

        One that was built by its class instead of `timm.create_model` has no name; to load what was
        saved from it, the model has to be given again.
        """
        cfg: Any = getattr(vit, "pretrained_cfg", {"architecture": type(vit).__name__})
        tag = f".{cfg['tag']}" if cfg.get("tag") else ""
        # timm notes the arguments of create_model here; older releases do not, so the ones that
        # change shapes are read from the model itself.
        args = dict(getattr(vit, "_model_args", {})) | {
            "img_size": tuple(vit.patch_embed.img_size),
            "num_classes": vit.num_classes,
            "global_pool": vit.global_pool,
            "dynamic_img_size": vit.dynamic_img_size,
        }
        return cls(name=f"{cfg['architecture']}{tag}", args=args)

    def create(self) -> VisionTransformer:
        """Build the model and load its weights.

        Raises:
            ValueError: If the model is unknown or not supported, an argument does not fit, or the
                weights do not belong to it.
        """
        name, args = self.name, dict(self.args)
        if name == SHIPPED_NAME:
            name, args = "vit_tiny_patch16_224", SHIPPED_ARGS | args
        try:
            vit: Any = timm.create_model(name, pretrained=self.weights == "pretrained", **args)
        except RuntimeError as error:
            if "Unknown model" not in str(error):
                raise ValueError(f"model {self.name!r} cannot be built: {error}") from error
            near = difflib.get_close_matches(name, timm.list_models("*vit*"), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise ValueError(f"model.name {self.name!r} is not a timm model{hint}") from None
        except (TypeError, AssertionError) as error:
            raise ValueError(f"model {self.name!r} cannot be built: {error}") from error
        check_supported(vit)
        if "img_size" in args:
            _check_divisible(vit)
        if self.weights == "shipped":
            if self.name != SHIPPED_NAME:
                raise ValueError(
                    f"model.weights 'shipped' exist for {SHIPPED_NAME} only, got {self.name!r}."
                )
            with as_file(files("tokendial") / "assets" / f"{SHIPPED_NAME}.safetensors") as path:
                load_weights(vit, path)
        elif self.weights not in (None, "pretrained"):
            load_weights(vit, Path(self.weights))
        return vit  # type: ignore[no-any-return]  # checked to be one


def check_supported(vit: nn.Module) -> None:
    """Raise a ValueError that says what is supported, unless `vit` is."""
    problem = None
    if not isinstance(vit, VisionTransformer):
        problem = f"{type(vit).__name__} is not a timm VisionTransformer"
    elif type(vit).forward_features is not VisionTransformer.forward_features:
        problem = f"{type(vit).__name__} has a forward pass of its own"
    elif isinstance(vit.patch_drop, PatchDropout):
        problem = "it drops patches at random (patch_drop_rate)"
    elif vit.attn_pool is not None and not isinstance(vit.attn_pool, AttentionPoolLatent):
        problem = f"it pools with {type(vit.attn_pool).__name__}"
    else:
        for block in vit.blocks:
            if type(block) is not Block:
                problem = f"its blocks are {type(block).__name__}"
            elif type(block.attn) is not Attention:
                problem = f"its attention layers are {type(block.attn).__name__}"
    if problem:
        raise ValueError(f"This model is not supported: {problem}. Supported is {_SUPPORTED}.")


def _check_divisible(vit: VisionTransformer) -> None:
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise ValueError(
            f"img_size must be divisible by the patch size {patch[0]}x{patch[1]}, "
            f"got {size[0]}x{size[1]}."
        )


def load_weights(vit: VisionTransformer, path: Path) -> None:
    """Load a state dict from a file; position embeddings are resized, a head that differs is left.

    Raises:
        ValueError: If the file cannot be read or its tensors do not fit the model.
    """
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"model.weights: no such file {path}.")
    # timm logs every resized position embedding as if it were a warning.
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        state = load_state_dict(str(path))
        state = {name.removeprefix("vit."): value for name, value in state.items()}
        state = checkpoint_filter_fn(state, vit)
    except Exception as error:
        raise ValueError(f"model.weights: {path} is not a ViT state dict ({error}).") from error
    own = vit.state_dict()
    heads = tuple(f"{name}." for name in HEADS)
    state = {
        name: value.float()
        for name, value in state.items()
        if not (name.startswith(heads) and name in own and own[name].shape != value.shape)
    }
    wrong = [
        name for name, value in state.items() if name in own and own[name].shape != value.shape
    ]
    missing = [name for name in own if name not in state and not name.startswith(heads)]
    unexpected = [n for n in state if n not in own and not n.startswith(heads)]
    if bad := wrong + missing + unexpected:
        raise ValueError(
            f"model.weights: {path} belongs to another backbone: {len(wrong)} tensors of another "
            f"shape, {len(missing)} missing, {len(unexpected)} unexpected; the first is {bad[0]}."
        )
    vit.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)


def shape_of(vit: VisionTransformer) -> ViTShape:
    """The numbers that methods need."""
    return ViTShape(
        depth=len(vit.blocks),
        embed_dim=vit.embed_dim,
        num_prefix_tokens=vit.num_prefix_tokens,
        num_patches=vit.patch_embed.num_patches,
        has_class_token=vit.has_class_token,
    )


def fingerprint(vit: VisionTransformer) -> list[float]:
    """A few weights of the first and the last block, enough to tell two backbones apart."""
    last: Any = vit.blocks[-1]
    tensors = [vit.patch_embed.proj.weight, last.mlp.fc2.weight]
    if any(tensor.is_meta for tensor in tensors):
        return []
    return [round(v, 6) for t in tensors for v in t.detach().flatten()[:8].float().tolist()]


def same_backbone(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints agree up to half-precision rounding."""
    if len(first) != len(second):
        return False
    return all(abs(a - b) <= 1e-4 + 0.01 * abs(a) for a, b in zip(first, second, strict=True))


def embed(vit: VisionTransformer, images_B3HW: Tensor) -> Tokens:
    """Patches with positions and prefix tokens, as they enter the first block.

    Raises:
        ValueError: If the image size does not fit the model.
    """
    height, width = images_B3HW.shape[-2:]
    if vit.dynamic_img_size:
        patch = vit.patch_embed.patch_size
        if not vit.patch_embed.dynamic_img_pad and (height % patch[0] or width % patch[1]):
            raise ValueError(
                f"images must have sides divisible by the patch size {patch[0]}x{patch[1]}, "
                f"got {height}x{width}."
            )
    elif (height, width) != tuple(vit.patch_embed.img_size):
        size = vit.patch_embed.img_size
        raise ValueError(
            f"images must be {size[0]}x{size[1]}, got {height}x{width}; create the timm model "
            f"with img_size=({height}, {width}) or dynamic_img_size=True."
        )
    rows, columns = vit.patch_embed.dynamic_feat_size((height, width))
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images_B3HW)))
    return Tokens(x, vit.num_prefix_tokens, (rows, columns))


def classify(vit: VisionTransformer, tokens: Tokens) -> Tensor:
    """Logits [B, num_classes] from the tokens after the last block.

    Pooling counts a merged token as often as the patches it stands for, so that merging equal
    tokens changes nothing (ToMe's code does so for average pooling; for attention pooling it is
    proportional attention).
    """
    x = vit.norm(tokens.x)
    if tokens.size is None or (vit.attn_pool is None and vit.global_pool in ("token", "")):
        return vit.forward_head(x)
    size = tokens.size
    if not vit.pool_include_prefix:
        x, size = x[:, tokens.prefix :], size[:, tokens.prefix :]
    if vit.attn_pool is not None:
        bias = size.log().to(x.dtype)[:, None, None, :]
        pooled = vit.attn_pool(x, attn_mask=bias)
    else:
        share = (size / size.sum(dim=1, keepdim=True)).to(x.dtype)
        mean, largest = (x * share.unsqueeze(-1)).sum(dim=1), x.amax(dim=1)
        pooled = {"avg": mean, "max": largest, "avgmax": 0.5 * (mean + largest)}[vit.global_pool]
    logits: Tensor = vit.head(vit.head_drop(vit.fc_norm(pooled)))
    return logits
