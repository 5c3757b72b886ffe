"""Which model a backbone is: build it, load its weights, take it apart, tell it from another."""

import difflib
import logging
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timm
from timm.models import eva, load_state_dict, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.backbones.huggingface import HuggingFaceViT
from tokendial.backbones.pooling import QueryPooling, video_vit
from tokendial.backbones.timm_eva import TimmEva
from tokendial.backbones.timm_video import TimmFrames, TimmTubelets
from tokendial.backbones.timm_vit import HEADS, TimmViT
from tokendial.backbones.videomae import TubeletEmbed, filter_videomae

SHIPPED_NAME = "scenes_vit"
SHIPPED_ARGS: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 6,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
    "num_classes": 10,
}
_TRANSFORMERS = "transformers."
_IMAGENET_CLASSES = 1000
_SUPPORTED = (
    "timm's VisionTransformer built of the standard pre-norm Block (ViT, DeiT, also distilled, "
    "DeiT-III, DINO, DINOv2 with or without registers, MAE, AugReg, CLIP and SigLIP image towers), "
    "timm's Eva (EVA-02, DINOv3, Perception Encoder), and ViT, DeiT, Dinov2, Dinov2WithRegisters "
    "and CLIPVisionModel of transformers; for clips, models of video_vit and videomae_*"
)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Which model, with which arguments and weights: all it takes to build it again."""

    name: str
    """timm's model name, "scenes_vit" for the small model that is shipped, or
    "transformers.CLASS"."""
    weights: str | None = "pretrained"
    """"pretrained" (timm's, from the hub), "shipped", None (random), or a path: a state dict
    (.safetensors, .pth), or a folder with a fully fine-tuned model of ours. For a class of
    transformers: what its `from_pretrained` takes."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the timm model, such as img_size, num_classes, drop_path_rate, or fields of
    the transformers configuration."""
    frames: int | None = None
    """Frames of the clips that a video model takes; an image model becomes one by `video_vit`.
    None: images, or what the video model takes by itself."""

    @classmethod
    def of(cls, vit: Any) -> "Backbone":
        """Describe a model, as far as it knows itself.

        A timm model that was built by its class instead of `timm.create_model` has no name; to load
        what was saved from it, the model has to be given again.
        """
        if type(vit).__module__.startswith(_TRANSFORMERS):
            args = vit.config.to_diff_dict()
            weights = vit.config.name_or_path or None
            if weights and Path(weights).is_dir():
                weights = str(Path(weights).resolve())
            return cls(name=f"{_TRANSFORMERS}{type(vit).__name__}", weights=weights, args=args)
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
        frames = vit.head.frames if isinstance(vit.head, QueryPooling) else None
        return cls(name=f"{cfg['architecture']}{tag}", args=args, frames=frames)

    def with_head(self, num_classes: int) -> "Backbone":
        """The same with a head of that width."""
        name = "num_labels" if self.name.startswith(_TRANSFORMERS) else "num_classes"
        return replace(self, args=dict(self.args) | {name: num_classes})

    def head_size(self) -> int | None:
        """Width of the head in a file of weights; None if the name of the model says it."""
        if self.weights in (None, "pretrained", "shipped"):
            return None
        state = _read_weights(Path(str(self.weights)))
        heads = [value for name, value in state.items() if name.endswith("head.weight")]
        return len(heads[0]) if heads else 0

    def create(self) -> nn.Module:
        """Build the model and load its weights.

        Raises:
            ValueError: If the model is unknown or not supported, an argument does not fit, or the
                weights do not belong to it.
        """
        if self.name.startswith(_TRANSFORMERS):
            return self._create_transformers()
        args = dict(self.args)
        if self.frames is None:
            vit = self._create_timm(args)
        elif self.name.startswith("videomae_"):
            vit = self._create_timm(args | {"frames": self.frames})
        else:
            num_classes = args.get("num_classes", _IMAGENET_CLASSES)
            image = self._create_timm(args | {"num_classes": 0, "global_pool": ""})
            vit = video_vit(image, frames=self.frames, num_classes=num_classes)
        anatomy_of(vit)
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
        return vit  # type: ignore[no-any-return]  # timm does not say what it makes

    def _create_timm(self, args: dict[str, Any]) -> Any:
        name = self.name
        if name == SHIPPED_NAME:
            name, args = "vit_tiny_patch16_224", SHIPPED_ARGS | args
        try:
            return timm.create_model(name, pretrained=self.weights == "pretrained", **args)
        except RuntimeError as error:
            if "Unknown model" not in str(error):
                raise ValueError(f"model {self.name!r} cannot be built: {error}") from error
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise ValueError(f"model.name {self.name!r} is not a timm model{hint}") from None
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"model {self.name!r} cannot be built: {error}") from error

    def _create_transformers(self) -> nn.Module:
        try:
            import transformers
        except ImportError:
            raise ValueError(
                f"model.name {self.name!r} needs: pip install 'tokendial[transformers]'."
            ) from None
        cls = getattr(transformers, self.name.removeprefix(_TRANSFORMERS), None)
        if cls is None:
            raise ValueError(f"model.name {self.name!r} is not a class of transformers.")
        if self.weights is None:
            vit = cls(cls.config_class.from_dict(self.args))
        else:
            # The weights hold the rest of the configuration, and another head.
            head = {"num_labels": self.args["num_labels"]} if "num_labels" in self.args else {}
            try:
                vit = cls.from_pretrained(self.weights, **head, ignore_mismatched_sizes=bool(head))
            except OSError as error:
                raise ValueError(f"model.weights {self.weights!r}: {error}") from None
        anatomy_of(vit)
        return vit  # type: ignore[no-any-return]


def anatomy_of(vit: nn.Module) -> Anatomy:
    """Take a model apart.

    Raises:
        ValueError: If it is of no supported kind; it says what is.
    """
    if isinstance(vit, Eva):
        kind: type[Anatomy] = TimmEva
    elif type(vit).__module__.startswith(_TRANSFORMERS):
        kind = HuggingFaceViT
    elif isinstance(getattr(vit, "patch_embed", None), TubeletEmbed):
        kind = TimmTubelets
    elif isinstance(getattr(vit, "head", None), QueryPooling):
        kind = TimmFrames
    else:
        kind = TimmViT
    if problem := kind.problem(vit):
        raise ValueError(f"This model is not supported: {problem}. Supported are {_SUPPORTED}.")
    return kind(vit)


def _check_divisible(vit: Any) -> None:
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise ValueError(
            f"img_size must be divisible by the patch size {patch[0]}x{patch[1]}, "
            f"got {size[0]}x{size[1]}."
        )


def load_weights(vit: nn.Module, path: Path) -> None:
    """Load a state dict from a file; position embeddings are resized, a head that differs is left.

    Raises:
        ValueError: If the file cannot be read or its tensors do not fit the model.
    """
    state = _read_weights(path)
    # timm logs every resized position embedding as if it were a warning.
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        if isinstance(vit, VisionTransformer) and isinstance(vit.patch_embed, TubeletEmbed):
            state = filter_videomae(state, vit)
        else:
            family: Any = eva if isinstance(vit, Eva) else vision_transformer
            state = family.checkpoint_filter_fn(state, vit)
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


def _read_weights(path: Path) -> dict[str, Any]:
    """A state dict by timm's names."""
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"model.weights: no such file {path}.")
    try:
        state = load_state_dict(str(path))
    except Exception as error:
        raise ValueError(f"model.weights: {path} is not a ViT state dict ({error}).") from error
    return {name.removeprefix("vit."): value for name, value in state.items()}


def fingerprint(vit: nn.Module) -> list[float]:
    """A few weights of the patch embedding and the last block, enough to tell two models apart."""
    patches = next(p for p in vit.parameters() if p.ndim >= 4)
    last = [p for p in anatomy_of(vit).blocks[-1].parameters() if p.ndim == 2][-1]
    if patches.is_meta or last.is_meta:
        return []
    values = (p.detach().flatten()[:8].float().tolist() for p in (patches, last))
    return [round(value, 6) for part in values for value in part]


def same_backbone(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints agree up to half-precision rounding."""
    if len(first) != len(second):
        return False
    return all(abs(a - b) <= 1e-4 + 0.01 * abs(a) for a, b in zip(first, second, strict=True))
