"""Describe, build and identify backbones."""

import difflib
from collections import Counter
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import HfHubHTTPError
from timm.models.naflexvit import NaFlexVit
from torch import nn

from tokendial.backbones.checkpoints import read_checkpoint
from tokendial.backbones.huggingface_names import CLASSES
from tokendial.backbones.kinds import TORCHVISION, TRANSFORMERS, anatomy_of
from tokendial.backbones.loading import load_own_names, load_weights, warn_of_unused_weights
from tokendial.backbones.open_clip import OpenClipViT
from tokendial.backbones.pooling import QueryPooling, video_vit
from tokendial.backbones.torchvision_vit import create_torchvision, torchvision_arguments
from tokendial.errors import error_message
from tokendial.extras import check_installed
from tokendial.hub import cached_file, hub_problem
from tokendial.weights import check_finite

SHIPPED_NAME = "scenes_vit"
SHIPPED_ARGS: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 6,
    "embed_dim": 96,
    "depth": 12,
    "num_heads": 3,
    "num_classes": 10,
}
_OPEN_CLIP = "open_clip."
_IMAGENET_CLASSES = 1000
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_FRESH = {"classifier", "cls_classifier", "distillation_classifier", "pooler", "mask_token"}
"""Parts of transformers' models that may be random after loading: heads and unused parts."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The name, arguments and weights of a model: all that is needed to build it again."""

    name: str
    """A model name of timm, "scenes_vit" (the small model that ships with Tokendial),
    "transformers.CLASS", "torchvision.VisionTransformer", or a builder of torchvision, such as
    "torchvision.vit_b_16"."""
    weights: str | None = "pretrained"
    """Source of the weights. "pretrained": timm's, from the hub. "shipped": those of "scenes_vit".
    None: random. A path: a checkpoint in torch's or safetensors' format, or a folder with one. For
    a class of transformers: the name or folder that its `from_pretrained` takes. For torchvision:
    None or a file."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model of timm or torchvision, such as img_size, num_classes and
    drop_path_rate, or fields of the transformers configuration."""
    frames: int | None = None
    """Frames per clip of a video model; `video_vit` turns an image model into one. None: the model
    takes images, or it is a video model with its own number of frames."""

    @classmethod
    def of(cls, vit: Any) -> "Backbone":
        """Describe an existing model.

        A timm model that was built by its class instead of `timm.create_model` has no name. To load
        a model that was saved with it, pass the backbone to `load` again.
        """
        if type(vit).__module__.startswith(TRANSFORMERS):
            args = vit.config.to_diff_dict()
            weights = vit.config.name_or_path or None
            if weights and Path(weights).is_dir():
                weights = str(Path(weights).resolve())
            return cls(name=f"{TRANSFORMERS}{type(vit).__name__}", weights=weights, args=args)
        if type(vit).__module__.startswith(TORCHVISION):
            # A model of torchvision does not say which weights it has.
            name = f"{TORCHVISION}{type(vit).__name__}"
            return cls(name=name, weights=None, args=torchvision_arguments(vit))
        if OpenClipViT.owns(vit):
            return cls(name=f"{_OPEN_CLIP}{type(vit).__name__}")
        cfg: Any = getattr(vit, "pretrained_cfg", {"architecture": type(vit).__name__})
        tag = f".{cfg['tag']}" if cfg.get("tag") else ""
        # timm stores the arguments of create_model here. A model may have changed since, so the
        # arguments that change shapes are read from the model itself.
        args = dict(getattr(vit, "_model_args", {})) | {
            "num_classes": vit.num_classes,
            "global_pool": vit.global_pool,
        }
        if isinstance(vit, NaFlexVit):
            return cls(name=f"{cfg['architecture']}{tag}", args=args)
        args |= {
            "img_size": tuple(vit.patch_embed.img_size),
            "dynamic_img_size": vit.dynamic_img_size,
        }
        frames = vit.head.frames if isinstance(vit.head, QueryPooling) else None
        return cls(name=f"{cfg['architecture']}{tag}", args=args, frames=frames)

    def with_head(self, num_classes: int) -> "Backbone":
        """Return the same backbone with a head for `num_classes` classes."""
        name = "num_labels" if self.name.startswith(TRANSFORMERS) else "num_classes"
        return replace(self, args=dict(self.args) | {name: num_classes})

    def head_size(self) -> int | None:
        """Classes in a weight file, 0 without a head; None if the model's name implies them."""
        if self.weights in (None, "pretrained", "shipped"):
            return None
        try:
            state = read_checkpoint(Path(str(self.weights))).tensors
        except ValueError as error:
            raise ValueError(f"model.weights: {error}") from None
        heads = [value for name, value in state.items() if name.endswith("head.weight")]
        return len(heads[0]) if heads else 0

    def create(self) -> nn.Module:
        """Build the model and load its weights.

        Raises:
            ValueError: If the model is unknown or not supported, an argument does not fit, a
                package is missing, or the weights belong to another model.
        """
        if self.name.startswith(TRANSFORMERS):
            return self._create_transformers()
        if self.name.startswith(TORCHVISION):
            return self._create_torchvision()
        if self.name.startswith(_OPEN_CLIP):
            raise ValueError(
                f"model.name {self.name!r} is a part of a model of open_clip: pass the backbone "
                "itself, as in td.load(folder, vit=clip.visual)."
            )
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
        if "img_size" in args and not isinstance(vit, NaFlexVit):
            _check_divisible(vit)
        if self.weights == "shipped":
            if self.name != SHIPPED_NAME:
                raise ValueError(
                    f"model.weights 'shipped' exist for {SHIPPED_NAME} only, got {self.name!r}."
                )
            with as_file(files("tokendial") / "assets" / f"{SHIPPED_NAME}.safetensors") as path:
                load_weights(vit, path)
        elif self.weights not in (None, "pretrained"):
            load = load_own_names if isinstance(vit, NaFlexVit) else load_weights
            load(vit, Path(self.weights))
        return vit  # type: ignore[no-any-return]  # timm has no return type

    def _create_timm(self, args: dict[str, Any]) -> Any:
        name, pretrained = self.name, self.weights == "pretrained"
        if name == SHIPPED_NAME:
            name, args = "vit_tiny_patch16_224", SHIPPED_ARGS | args
        for given in args:
            if given.startswith("pretrained") or given in ("checkpoint_path", "cache_dir"):
                raise ValueError(
                    f"model.args.{given} cannot be set: model.weights says which weights are read."
                )
        if pretrained:
            args = args | _cached_weights(name)
        try:
            return timm.create_model(name, pretrained=pretrained, **args)
        except (OSError, HfHubHTTPError) as error:
            raise _unavailable(name, error_message(error)) from error
        except Exception as error:  # unsuitable arguments raise anything
            if "Unknown model" not in str(error):
                problem = error_message(error)
                raise ValueError(f"model {self.name!r} cannot be built: {problem}") from error
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise ValueError(f"model.name {self.name!r} is not a timm model{hint}") from None

    def _create_torchvision(self) -> nn.Module:
        if self.weights in ("pretrained", "shipped"):
            raise ValueError(
                f"model.weights of {self.name} must be a file, or null for random weights, got "
                f"{self.weights!r}."
            )
        vit = create_torchvision(self.name.removeprefix(TORCHVISION), self.args)
        anatomy_of(vit)
        if self.weights is not None:
            load_own_names(vit, Path(self.weights))
        return vit

    def _create_transformers(self) -> nn.Module:
        check_installed(f"model.name {self.name!r}", "transformers")
        import transformers

        name = self.name.removeprefix(TRANSFORMERS)
        cls = getattr(transformers, name, None) if name in CLASSES else None
        if cls is None:
            raise ValueError(
                f"model.name {self.name!r} is not a class of transformers that is supported: one "
                f"of {', '.join(CLASSES)}."
            )
        if self.weights is None:
            try:
                vit = cls(cls.config_class.from_dict(self.args))
            except Exception as error:  # unsuitable arguments raise anything
                problem = error_message(error)
                raise ValueError(f"model {self.name!r} cannot be built: {problem}") from error
        else:
            vit = self._from_pretrained(cls, self.weights)
        anatomy_of(vit)
        return vit  # type: ignore[no-any-return]

    def _from_pretrained(self, cls: Any, weights: str) -> Any:
        if weights.startswith((".", "/", "~")) and not Path(weights).exists():
            raise ValueError(f"model.weights {weights!r}: no such folder.")
        cached = Path(weights).is_dir() or cached_file(weights, "config.json")
        if not cached and (problem := hub_problem()):
            raise _unavailable(weights, problem)
        # Only the head's size is passed: the rest of the configuration comes with the weights.
        head = {"num_labels": self.args["num_labels"]} if "num_labels" in self.args else {}
        try:
            vit, loading_info = cls.from_pretrained(
                weights,
                **head,
                ignore_mismatched_sizes=bool(head),
                local_files_only=bool(cached),
                weights_only=True,
                output_loading_info=True,
            )
        except Exception as error:  # reading, downloading or unsuitable files
            raise ValueError(f"model.weights {weights!r}: {error_message(error)}") from error
        if missing := [n for n in loading_info["missing_keys"] if _FRESH.isdisjoint(n.split("."))]:
            raise ValueError(
                f"model.weights {weights!r} belongs to another backbone: {len(missing)} tensors "
                f"are missing, the first is {min(missing)}."
            )
        check_finite(vit.state_dict(), f"model.weights {weights!r}")
        warn_of_unused_weights(
            weights, Counter(n.split(".")[0] for n in loading_info["unexpected_keys"])
        )
        return vit


def _cached_weights(name: str) -> dict[str, Any]:
    """Return arguments that make timm read weights from the hub's cache, if it has them.

    Raises:
        ValueError: If the cache has no weights, and the hub does not answer.
    """
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    repo = cfg.hf_hub_id if cfg else name.partition("hf-hub:")[2]
    if not repo:
        return {}  # weights from elsewhere than the hub, or an unknown name
    file = cfg.hf_hub_filename if cfg else "config.json"
    weights = (file, str(Path(file).with_suffix(".safetensors"))) if file else _HUB_FILES
    if not (found := cached_file(repo, *weights)):
        if problem := hub_problem():
            raise _unavailable(name, problem)
        return {}
    source = {"file": str(found), "custom_load": False}
    return {"pretrained_cfg_overlay": source} if cfg else {}


def _unavailable(name: str, problem: str) -> ValueError:
    return ValueError(
        f"the pre-trained weights of {name} are not available: {problem}; give them as a file or "
        "folder (model.weights=...), or start from random ones (model.weights=null)."
    )


def _check_divisible(vit: Any) -> None:
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if any(side % step for side, step in zip(size, patch, strict=True)):
        raise ValueError(
            f"img_size must be divisible by the patch size {patch[0]}x{patch[1]}, "
            f"got {size[0]}x{size[1]}."
        )


def fingerprint(vit: nn.Module) -> list[float]:
    """A few weights of the patch embedding and the last block, to identify a backbone by."""
    # NaFlex models compute patches by a linear layer, and may have no weight of four dimensions.
    weights = [p for p in vit.parameters() if p.ndim >= 2]
    patches = next((p for p in weights if p.ndim >= 4), weights[0])
    last = [p for p in anatomy_of(vit).blocks[-1].parameters() if p.ndim == 2][-1]
    if patches.is_meta or last.is_meta:
        return []
    values = (p.detach().flatten()[:8].float().tolist() for p in (patches, last))
    return [round(value, 6) for part in values for value in part]


def same_backbone(first: list[float], second: list[float]) -> bool:
    """Whether two fingerprints are equal up to half-precision rounding."""
    if len(first) != len(second):
        return False
    return all(abs(a - b) <= 1e-4 + 0.01 * abs(a) for a, b in zip(first, second, strict=True))
