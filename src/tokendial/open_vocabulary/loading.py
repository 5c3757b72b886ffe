"""Load the two models of ProxyCLIP by a name, or from a local folder or file."""

import difflib
import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from tokendial.backbones import Backbone
from tokendial.errors import error_message
from tokendial.extras import check_installed
from tokendial.model.dial_vit import DialViT
from tokendial.model.loading import load
from tokendial.open_vocabulary.clip_parts import clip_parts

_WINDOWED = (
    *("SamModel", "SamVisionModel", "SamHQModel", "SamHQVisionModel"),
    *("VitDetModel", "VitDetBackbone"),
)
"""Classes of transformers that hold an encoder with attention in windows."""


def load_clip(source: str, weights: str | None = None) -> nn.Module:
    """Load a CLIP model in evaluation mode.

    Args:
        source: Name of a model of open_clip, such as "ViT-B-16-quickgelu"; or a local folder, as
            open_clip or the `save_pretrained` of transformers' CLIPModel writes it.
        weights: With a name: a tag of open_clip such as "openai", or a weight file. With a folder:
            None.

    Raises:
        ValueError: If there is no such model, or the weights cannot be loaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        return _load_open_clip(source, weights)
    if weights is not None:
        raise ValueError(f"clip weights must be left out, because {source} is a folder with them.")
    if (folder / "open_clip_config.json").is_file():
        return _load_open_clip(f"local-dir:{folder}", None)
    if folder_config(folder).get("model_type") != "clip":
        raise ValueError(f"clip must be a folder of a CLIP model, {folder} holds another one.")
    return _load_transformers("clip", "CLIPModel", folder)


def load_clip_tower(clip: nn.Module, folder: str | Path) -> DialViT:
    """Load the fine-tuned image tower of a CLIP model, with its adapters and its dial.

    Args:
        clip: The CLIP model that the tower was fine-tuned in; its own tower is wrapped.
        folder: What `save_pretrained` wrote of the wrapped tower.

    Raises:
        ValueError: If the folder holds no saved model, or one of another tower.
    """
    try:
        return load(folder, vit=clip_parts(clip, None).tower)
    except ValueError as error:
        raise ValueError(f"clip_tower: {error_message(error)}") from error


def load_proxy(source: str, weights: str = "pretrained") -> nn.Module:
    """Load a proxy in evaluation mode. A ViT takes images of any size that its patches divide.

    Args:
        source: Name of a timm model, such as "vit_base_patch8_224.dino" or "samvit_base_patch16";
            or a local folder of a model of transformers, such as Dinov2Model or SamModel.
        weights: With a name: "pretrained" for timm's own, or a weight file.

    Raises:
        ValueError: If there is no such model, or the weights cannot be loaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.partition(".")[0] in timm.list_models(module="vision_transformer_sam"):
            return _load_sam_of_timm(source, weights)
        args = {"num_classes": 0, "dynamic_img_size": True}
        return Backbone(name=source, weights=weights, args=args).create().eval()
    if weights != "pretrained":
        raise ValueError(f"proxy weights must be left out, because {source} is a folder with them.")
    name, *_ = folder_config(folder).get("architectures") or ["?"]
    if name in _WINDOWED:
        return _load_transformers("proxy", name, folder)
    return Backbone(name=f"transformers.{name}", weights=str(folder)).create().eval()


def _load_transformers(kind: str, name: str, folder: Path) -> nn.Module:
    """Load a folder of a class of transformers in evaluation mode."""
    check_installed(f"{kind} {str(folder)!r}", "transformers")
    import transformers

    try:
        model, facts = getattr(transformers, name).from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # reading unsuitable files
        raise ValueError(f"{kind} {str(folder)!r}: {error_message(error)}") from error
    if missing := sorted(facts["missing_keys"]):
        raise ValueError(
            f"{kind} {str(folder)!r} lacks {len(missing)} weights, such as {missing[0]}."
        )
    loaded: nn.Module = model.eval()
    return loaded


def _load_sam_of_timm(name: str, weights: str) -> nn.Module:
    """Load SAM's encoder of timm in evaluation mode. It is no backbone that `wrap` takes."""
    own = weights == "pretrained"
    if not own and not Path(weights).is_file():
        raise ValueError(f"proxy weights must be pretrained or a weight file, got {weights!r}.")
    try:
        # As timm's own weights, so that the names of SAM's published files are translated.
        overlay = None if own else {"file": weights}
        sam = timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # reading, downloading or unsuitable files
        raise ValueError(f"proxy {name!r}: {error_message(error)}") from error
    return sam.eval()


def _load_open_clip(name: str, weights: str | None) -> nn.Module:
    check_installed(f"clip {name!r}", "open_clip")
    import open_clip

    known = open_clip.list_models()
    if ":" not in name and name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        raise ValueError(f"clip {name!r} is neither a folder nor a model of open_clip{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is not None and weights not in tags and not Path(weights).is_file():
        allowed = f"one of {', '.join(tags)}, or a weight file" if tags else "a weight file"
        raise ValueError(f"clip weights must be {allowed}, got {weights!r}.")
    if ":" not in name and weights is None:
        raise ValueError(f"clip weights must be given for {name!r}: a tag or a weight file.")
    try:
        clip: nn.Module = open_clip.create_model(name, pretrained=weights)
    except Exception as error:  # reading, downloading or unsuitable files
        raise ValueError(f"clip {name!r}: {error_message(error)}") from error
    return clip.eval()


def folder_config(folder: Path) -> dict[str, Any]:
    """Content of the config.json in a folder of a model.

    Raises:
        ValueError: If there is none, or it is no mapping.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no model: there is no config.json in it.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error_message(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping.")
    return content
