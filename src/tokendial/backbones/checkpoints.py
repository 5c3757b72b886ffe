"""Find the ViT in a checkpoint file, and give its tensors the names that timm knows.

Training checkpoints wrap the state dict ("state_dict", "teacher"), training modules add a prefix to
all names ("model.", "backbone."), and transformers uses other names. All three are recognised by
the structure of the file. The resulting names are timm's, or names that timm's own checkpoint
filters convert.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tokendial.weights import check_finite, read_file

GRID = "grid"
"""Key in the metadata of a safetensors file: rows and columns of the position grid, e.g. 14x10."""
RESIZING = "position_resizing"
"""Key in the metadata of a safetensors file: how its positions are resized to other grids."""
WITHOUT_ANTIALIASING = "without_antialiasing"
"""Value of the key `RESIZING`: bicubically, as transformers' Dinov2 does it."""
_IN_A_FOLDER = (
    "model.safetensors",
    "best/model.safetensors",
    "last/model.safetensors",
    "pytorch_model.bin",
)
# The averaged weights are what timm and DINO evaluate.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "teacher", "state_dict", "model", "module", "encoder",
    "target_encoder", "student",
)  # fmt: skip
_NOT_WEIGHTS = ("optimizer", "optimizer_states", "loops", "callbacks", "lr_schedulers")
_TIMM = "patch_embed.proj.weight"
_ANCHORS = {
    _TIMM: "timm",
    "embeddings.patch_embeddings.projection.weight": "transformers",
    "embeddings.patch_embedding.weight": "transformers",
    "conv1.weight": "OpenAI CLIP",
    f"visual.trunk.{_TIMM}": "OpenCLIP",
}
"""Tensor names that every ViT contains under some prefix, and the library that uses them. If
several names match, the longest one counts."""
_TOWERS = ("OpenAI CLIP", "OpenCLIP")
"""Formats whose image tower has the prefix "visual.", which timm's filters expect."""
_HEADS = ("head.", "head_dist.", "fc_norm.")
# Buffers that models compute themselves, and parts of pre-training or of transformers' models that
# timm's ViTs do not have.
_NOT_OF_THE_VIT = re.compile(
    r"(?:.*\.)?(?:position_ids|relative_position_index|bias_mask|rope(?:_embed)?\.(?:periods|freqs_\w+))"
    r"|(?:pooler|decoder|local_cls_norm|projectors|lm_head)\..+|decoder_.+"
)
_FROM_TRANSFORMERS = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.class_embedding", "cls_token"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.(.+)", r"patch_embed.proj.\1"),
    (r"(?:encoder\.)?layers?\.(\d+\..+)", r"blocks.\1"),
    (r"(blocks\.\d+)\.(?:attention\.attention|self_attn)\.(.+)", r"\1.attention.\2"),
    (r"(blocks\.\d+)\.attention\.(?:output\.dense|o_proj|out_proj)\.(.+)", r"\1.attn.proj.\2"),
    (r"(blocks\.\d+)\.attention\.([qkv])(?:uery|ey|alue|_proj)\.(.+)", r"\1.attn.\2_proj.\3"),
    (r"(blocks\.\d+)\.attention\.([qkv])_bias", r"\1.attn.\2_proj.bias"),
    (r"(blocks\.\d+)\.intermediate\.dense\.(.+)", r"\1.mlp.fc1.\2"),
    (r"(blocks\.\d+)\.output\.dense\.(.+)", r"\1.mlp.fc2.\2"),
    (r"(blocks\.\d+)\.mlp\.weights_in\.(.+)", r"\1.mlp.w12.\2"),
    (r"(blocks\.\d+)\.mlp\.(?:weights_out|down_proj)\.(.+)", r"\1.mlp.w3.\2"),
    (r"(blocks\.\d+)\.(?:layernorm_before|layer_norm1)\.(.+)", r"\1.norm1.\2"),
    (r"(blocks\.\d+)\.(?:layernorm_after|layer_norm2)\.(.+)", r"\1.norm2.\2"),
    (r"(blocks\.\d+)\.layer_scale([12])\.lambda1", r"\1.ls\2.gamma"),
    (r"pre_layrnorm\.(.+)", r"norm_pre.\1"),
    (r"(?:layernorm|post_layernorm)\.(.+)", r"norm.\1"),
)
# In transformers' models the heads are siblings of the ViT.
_BESIDE = (
    (r"(?:cls_)?classifier\.(.+)", r"head.\1"),
    (r"distillation_classifier\.(.+)", r"head_dist.\1"),
    (r"visual_projection\.weight", "head.weight"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A ViT that was found in a file."""

    source: Path
    """Path of the file."""
    kind: str
    """The library whose names the file uses and the prefix of the ViT, in words."""
    tensors: dict[str, Tensor]
    """Finite float tensors, by timm's names or by names that timm's filters convert."""
    left_out: dict[str, int]
    """Number of tensors in the file that do not belong to the ViT, by group."""
    grid: tuple[int, int] | None
    """Rows and columns of the position grid; None if the file does not say."""
    antialias: bool = True
    """Whether positions are resized with antialiasing. False only for files that ask for it."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Find the ViT in a file or folder.

    Args:
        path: A file in torch's or safetensors' format, or a folder with one: a saved model, a run
            (whose best model is read), or a model of transformers.

    Raises:
        ValueError: If the file cannot be read, holds no ViT or several, or tensors that are not
            finite floats. The message says what was found.
    """
    file = _file_in(path) if path.is_dir() else path
    state, wrapper, left_out = find_state_dict(read_file(file), file)
    kind, state = find_vit(state, file, left_out)
    grid = _grid(file, state.get(_TIMM)) if "pos_embed" in state else None
    if wrapper:
        kind = f"{kind} in {wrapper!r}"
    antialias = _metadata(file).get(RESIZING) != WITHOUT_ANTIALIASING
    return Checkpoint(file, kind, state, dict(left_out), grid, antialias)


def _file_in(folder: Path) -> Path:
    if file := next((folder / name for name in _IN_A_FOLDER if (folder / name).is_file()), None):
        return file
    if parts := sorted(folder.glob("*.index.json")):
        raise ValueError(f"{folder} holds weights in several files ({parts[0].name}): join them.")
    raise ValueError(f"{folder} holds no weights: none of {', '.join(_IN_A_FOLDER)} is in it.")


def find_state_dict(
    content: Mapping[str, Any], file: Path
) -> tuple[dict[str, Any], str, Counter[str]]:
    """Find the state dict in the content of a file.

    Returns:
        The state dict, the key that it was stored under ("" if at the top), and the number of
        tensors that were stored beside it, by key.

    Raises:
        ValueError: If there is no state dict.
    """
    wrapper, left_out = "", Counter[str]()
    while not any(isinstance(value, Tensor) for value in content.values()):
        inside = {name: value for name, value in content.items() if isinstance(value, Mapping)}
        found = next((name for name in _WRAPPERS if name in inside), None)
        if found is None:
            listed = f"; it holds {_some(map(str, content))}" if content else ""
            raise ValueError(
                f"{file} is not a weight file: it does not hold tensors by name, as such or under "
                f"one of {', '.join(_WRAPPERS)}{listed}."
            )
        for name, value in inside.items():
            tensors = sum(isinstance(part, Tensor) for part in value.values())
            if name != found and name not in _NOT_WEIGHTS and tensors:
                left_out[str(name)] += tensors
        wrapper, content = found, inside[found]
    if not all(isinstance(name, str) for name in content):
        raise ValueError(f"{file} is not a weight file: it does not hold tensors by name.")
    return dict(content), wrapper, left_out


def find_vit(
    state: Mapping[str, Any], file: Path, left_out: Counter[str]
) -> tuple[str, dict[str, Tensor]]:
    """Find the ViT in a state dict, and remove the prefix of its names.

    Args:
        state: Tensors by the file's names.
        file: Path of the file, for messages.
        left_out: Counter that is raised for each tensor that does not belong to the ViT.

    Returns:
        The naming scheme in words, and the tensors of the ViT.

    Raises:
        ValueError: If there is no ViT or several, or its tensors are not finite floats.
    """
    roots = _roots(state)
    if len(roots) != 1:
        raise ValueError(f"{file} holds {_what_else(state, list(roots))}.")
    root, whose = roots.popitem()
    if root == "vit." and any(name.startswith("adapter.") for name in state):
        raise ValueError(
            f"{file} holds a model that was fine-tuned with an adapter; model.weights takes the "
            "file that it was fine-tuned from, or a fully fine-tuned model."
        )
    # The file may hold the image tower of a CLIP model alone.
    alone = whose not in _TOWERS or f"{root}conv1.weight" in state
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        inner: str | None = name.removeprefix(root)
        if whose == "transformers":
            inside = name.startswith(root)
            inner = _rename(name.removeprefix(root), _FROM_TRANSFORMERS if inside else _BESIDE)
            inner = inner if inside or inner.startswith(_HEADS) else None
        elif not name.startswith(root) or not (alone or name.startswith(f"{root}visual.")):
            inner = None
        if inner is None or _NOT_OF_THE_VIT.fullmatch(inner):
            left_out[name.removeprefix(root).split(".")[0]] += 1
        else:
            tensors[inner] = value
    check_finite(tensors, file)
    if whose == "transformers":
        _join(tensors)
    return f"names of {whose}" + (f" under {root!r}" if root else ""), tensors


def _roots(state: Mapping[str, Any]) -> dict[str, str]:
    """Map the prefix of each ViT in a state dict to the library whose names it uses."""
    roots: dict[str, str] = {}
    for name in state:
        if fitting := [a for a in _ANCHORS if name == a or name.endswith(f".{a}")]:
            anchor = max(fitting, key=len)
            roots[name.removesuffix(anchor)] = _ANCHORS[anchor]
    return {
        root.removesuffix("visual.") if whose == "OpenAI CLIP" else root: whose
        for root, whose in roots.items()
        if whose != "OpenAI CLIP" or f"{root}transformer.resblocks.0.ln_1.weight" in state
    }


def _rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """Apply all matching patterns of a table to a name, one after another."""
    for pattern, ours in table:
        name = re.sub(f"^{pattern}$", ours, name)
    return name


def _join(tensors: dict[str, Tensor]) -> None:
    """Convert the layers and shapes of transformers to those of the other formats, in place."""
    for name, rank in (("cls_token", 3), ("pos_embed", 3)):
        while name in tensors and tensors[name].ndim < rank:  # CLIP's
            tensors[name] = tensors[name][None]
    for gate in [name for name in tensors if ".mlp.gate_proj." in name]:
        if (up := tensors.pop(gate.replace("gate_proj", "up_proj"), None)) is not None:
            tensors[gate.replace("gate_proj", "w12")] = torch.cat([tensors.pop(gate), up])
    join_qkv(tensors)
    if "head.weight" in tensors:  # CLIP's projection has no bias
        tensors.setdefault("head.bias", torch.zeros(len(tensors["head.weight"])))


def join_qkv(state: dict[str, Tensor]) -> None:
    """Join separate query, key and value layers, in place; a missing key bias becomes zeros."""
    for attn in {match[1] for name in state if (match := re.fullmatch(r"(.*attn\.)[qv]_.+", name))}:
        weights = [f"{attn}{part}_proj.weight" for part in "qkv"]
        if all(weight in state for weight in weights):
            state[f"{attn}qkv.weight"] = torch.cat([state.pop(weight) for weight in weights])
        q, k, v = (
            next(
                (state.pop(n) for n in (f"{attn}{p}_bias", f"{attn}{p}_proj.bias") if n in state),
                None,
            )
            for p in "qkv"
        )
        if q is not None and v is not None:
            state[f"{attn}qkv.bias"] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])


def _what_else(state: Mapping[str, Any], roots: list[str]) -> str:
    """Describe in words a state dict that does not hold exactly one ViT."""
    if roots:
        return f"several ViTs, under {', '.join(map(repr, sorted(roots)))}: save one of them alone"
    groups = Counter(name.split(".")[0] for name in state)
    listed = ", ".join(f"{count} {group}" for group, count in groups.most_common(5))
    if any(name.startswith(("adapter.", "vit.")) for name in state):
        return (
            f"only what was trained ({listed}), not a whole backbone; model.weights takes the file "
            "that it was fine-tuned from, or a fully fine-tuned model"
        )
    return (
        f"no ViT that is known ({listed}); expected are names of timm ({_TIMM}), of transformers' "
        "ViT, DeiT, Dinov2, CLIP or VideoMAE, or of OpenAI's CLIP"
    )


def _grid(file: Path, patch_weight: Tensor | None) -> tuple[int, int] | None:
    """Read the position grid from the file's metadata or from the configuration beside it."""
    try:
        if match := re.fullmatch(r"(\d+)x(\d+)", _metadata(file).get(GRID, "")):
            return int(match[1]), int(match[2])
        config = json.loads((file.parent / "config.json").read_text())
        size = config["backbone"]["args"]["img_size"]
        height, width = (size, size) if isinstance(size, int) else size
        assert patch_weight is not None
        return height // patch_weight.shape[-2], width // patch_weight.shape[-1]
    except (OSError, ValueError, LookupError, TypeError, AssertionError, RecursionError):
        return None  # neither of them says it


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for files in other formats."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
