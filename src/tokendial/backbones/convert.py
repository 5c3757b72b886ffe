"""Convert released weight files into state dicts of timm models."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers.mlp import GluMlp
from timm.models import is_model_pretrained
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.backbones.build import Backbone
from tokendial.backbones.checkpoints import (
    GRID,
    RESIZING,
    WITHOUT_ANTIALIASING,
    find_state_dict,
    find_vit,
)
from tokendial.backbones.loading import convert_to_timm_names, describe_counts
from tokendial.backbones.onnx_dinov2 import read_dinov2
from tokendial.backbones.onnx_file import OnnxFile
from tokendial.backbones.positions import resize_positions
from tokendial.backbones.timm_vit import HEADS
from tokendial.weights import check_finite, read_file, unreadable_error

Shapes = Mapping[str, tuple[int, ...]]

# In the families below, the width identifies the size.
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
_DINOV2_OFFSET = 0.1
_DAR_PARTS = re.compile(
    r"backbone\.blocks\.\d+\.(adapter|compensator|token_mask_gen|scale)(?:\..+)?"
    r"|(decode_head|d_head_s|d_head_t|backbone_t)\..+"
)


@dataclass(frozen=True)
class ConvertedWeights:
    """A released weight file with timm's names; `save` writes it."""

    source: Path
    """Path of the released file."""
    kind: str
    """"DINOv2", "DINO", "DeiT", "MAE", "AugReg", "DAR", or "ViT" for other files."""
    model: str
    """Name of the timm model that the tensors belong to."""
    tensors: dict[str, Tensor]
    """State dict of the model; it lacks the head if the file has none."""
    left_out: dict[str, int]
    """Number of tensors of the file that were left out, by group."""
    grid: tuple[int, int] | None = None
    """Rows and columns that the positions were resized to; None if they were not resized."""
    from_transformers: bool = False
    """Whether positions are resized without antialiasing, as transformers' Dinov2 does it: the
    weights come from an export of that library. The written file says so to `load_weights`."""

    @property
    def has_head(self) -> bool:
        """Whether the file contains a classification head."""
        return any(name.split(".")[0] in HEADS for name in self.tensors)

    def summary(self) -> str:
        """Describe the converted file in one line."""
        head = "" if self.has_head else ", no classifier head"
        left_out = f"; left out: {describe_counts(self.left_out)}" if self.left_out else ""
        return f"{self.kind} weights of {self.model}, {len(self.tensors)} tensors{head}{left_out}"

    def resized_to(self, img_size: tuple[int, int]) -> "ConvertedWeights":
        """Return a copy for another image size; positions are resized as the released code does.

        `load_weights` also resizes positions. For files that were converted from ONNX it does so in
        the same way, so that these need no resizing here; for all others it resizes with
        antialiasing, whatever the kind of model.

        Args:
            img_size: Height and width of the images in pixels.

        Raises:
            ValueError: If the model has no positions of its own to resize, or a side is not a
                multiple of the patch size.
        """
        if "pos_embed" not in self.tensors:
            raise ValueError(f"img_size: {self.model} has no position embeddings to resize.")
        patch = self.tensors["patch_embed.proj.weight"].shape[-1]
        if any(side < patch or side % patch for side in img_size):
            raise ValueError(
                f"img_size must be multiples of the patch size {patch}, got {img_size}."
            )
        positions = self.tensors["pos_embed"]
        # With registers, DINOv2 adds the class token's position to the token itself.
        prefix = positions.shape[1] - math.isqrt(positions.shape[1]) ** 2
        of_facebook = self.kind == "DINOv2" and not self.from_transformers
        plain_dinov2 = of_facebook and "reg_token" not in self.tensors
        grid = img_size[0] // patch, img_size[1] // patch
        resized = resize_positions(
            positions,
            grid,
            num_prefix_tokens=prefix,
            offset=_DINOV2_OFFSET if plain_dinov2 else 0.0,
            antialias=not self.from_transformers,
        )
        return replace(self, tensors=self.tensors | {"pos_embed": resized}, grid=grid)

    def save(self, out: str | Path | None = None) -> Path:
        """Write the tensors to a safetensors file, and return its path.

        Args:
            out: File to write, which ends in .safetensors; an existing one is replaced. By default
                it is written beside the released file.

        Raises:
            ValueError: If `out` has another ending, is the released file, or lies in a folder that
                does not exist.
        """
        path = self.source.with_suffix(".safetensors") if out is None else Path(out)
        if path.exists() and path.samefile(self.source):
            raise ValueError(f"out must be another file than the one that is converted, got {out}.")
        if path.suffix != ".safetensors":
            raise ValueError(f"out must end in .safetensors, got {path}.")
        if not path.parent.is_dir():
            raise ValueError(f"out: no such folder: {path.parent}.")
        # Copies, because safetensors takes no tensors that share memory.
        whole = torch.contiguous_format
        tensors = {n: value.clone(memory_format=whole) for n, value in self.tensors.items()}
        metadata = {"format": "pt"}
        if self.grid:
            metadata[GRID] = f"{self.grid[0]}x{self.grid[1]}"
        if self.from_transformers:
            metadata[RESIZING] = WITHOUT_ANTIALIASING
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        return path


def convert_weights(path: str | Path, model: str | Backbone | None = None) -> ConvertedWeights:
    """Read a released weight file and give its tensors timm's names.

    These are recognised by their tensors: DINOv2 (also with registers), DINO's training
    checkpoints, DeiT (also distilled), MAE (the encoder) and DAR's segmentation models (the
    backbone only) in torch's format, AugReg in NumPy's, and transformers' Dinov2 in ONNX files of
    torch's exporter. For other files, give `model`. Only tensors are unpickled. No tensor is
    resized, see `ConvertedWeights.resized_to`.

    Args:
        path: The file to read. The suffix .npz means NumPy's format, .onnx means ONNX, any other
            torch's.
        model: The timm model that the file belongs to, as a name or a `Backbone` (whose weights and
            head size are ignored). By default it is recognised by the tensors.

    Raises:
        ValueError: If the file cannot be read without unpickling objects, the model is not
            recognised, or the tensors are not exactly those of the model (the head may be missing).
            The message names the file and lists the tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}.")
    backbone = Backbone(name=model) if isinstance(model, str) else model
    readers = {".npz": _from_numpy, ".onnx": _from_onnx}
    return readers.get(path.suffix, _from_torch)(path, backbone)


def _from_torch(path: Path, backbone: Backbone | None) -> ConvertedWeights:
    state, wrapper, left_out = find_state_dict(read_file(path), path)
    if any(map(_DAR_PARTS.fullmatch, state)):
        kind, state = "DAR", _dar_backbone(state, left_out)
        if not state:
            raise ValueError(
                f"{path} holds only what DAR trained ({describe_counts(left_out)}), not the "
                "backbone: convert the DINOv2 file that it was fine-tuned from, or make a run of "
                "this one (--recipe dar/duts)."
            )
        check_finite(state, path)
    else:
        _, state = find_vit(state, path, left_out)
        kind = _kind(state, wrapper, left_out)
    if "mask_token" in state:
        left_out["mask_token"] += 1
        if kind != "DINOv2":
            del state["mask_token"]
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    backbone = backbone or _matching_backbone(path, kind, shapes)
    classes = next((shapes[n][0] for n in _head_names(".weight", ".bias") if shapes.get(n)), 0)
    vit = _build(backbone, classes, device="meta")
    _check(path, f"{kind} file of {backbone.name}", _torch_shapes(vit, kind), shapes)
    tensors, _ = convert_to_timm_names(state, vit, left_out)
    return ConvertedWeights(path, kind, backbone.name, tensors, dict(left_out))


def _from_onnx(path: Path, backbone: Backbone | None) -> ConvertedWeights:
    kind, left_out = "DINOv2", Counter[str]()
    found = read_dinov2(OnnxFile(path))
    _, state = find_vit(found.tensors, path, left_out)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    backbone = backbone or _matching_backbone(path, kind, shapes)
    *_, patch = _of_rank(4, shapes.get("patch_embed.proj.weight"))
    side = math.isqrt(_of_rank(3, shapes.get("pos_embed"))[1])
    if side and patch:
        # Positions have the size of the file's own images. They are resized later.
        backbone = replace(backbone, args=backbone.args | {"img_size": side * patch})
    vit = _build(backbone, 0, device="meta")
    # timm recognises DINOv2 by the mask token. Exported graphs lack it: only pre-training uses it.
    state["mask_token"] = torch.zeros(1, vit.embed_dim)
    shapes["mask_token"] = (1, vit.embed_dim)
    _check(path, f"{kind} file of {backbone.name}", _torch_shapes(vit, kind), shapes)
    first: Any = vit.blocks[0]
    heads, head_dim = first.attn.num_heads, first.attn.head_dim
    if found.head_dim not in (None, head_dim):
        raise ValueError(
            f"{path} has attention heads of width {found.head_dim}, but {backbone.name} has "
            f"{heads} heads of width {head_dim}."
        )
    tensors, _ = convert_to_timm_names(state, vit, left_out)
    return ConvertedWeights(
        path, kind, backbone.name, tensors, dict(left_out), from_transformers=True
    )


def _from_numpy(path: Path, backbone: Backbone | None) -> ConvertedWeights:
    shapes = _read_numpy_shapes(path)
    backbone = backbone or _matching_backbone(path, "AugReg", shapes)
    classes = next((shapes[n][-1] for n in ("head/kernel", "head/bias") if shapes.get(n)), 0)
    vit = _build(backbone, classes, device="cpu")
    _check(path, f"AugReg file of {backbone.name}", _numpy_shapes(vit), shapes)
    tensors = vit.state_dict()
    for value in tensors.values():
        value.fill_(math.nan)
    vit.load_pretrained(str(path))
    if absent := [name for name, value in tensors.items() if value.isnan().all()]:
        raise ValueError(
            f"{path}: AugReg files do not hold all of {backbone.name}; "
            f"{len(absent)} missing: {_some(absent)}."
        )
    return ConvertedWeights(path, "AugReg", backbone.name, tensors, {})


def _read_numpy_shapes(path: Path) -> Shapes:
    import numpy as np

    try:
        # NumPy does not close a file that it has opened and cannot read, so it is opened here.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        if "Object arrays" in str(error):
            raise ValueError(f"{path} needs pickled objects, which are not loaded.") from None
        raise unreadable_error(path, "NumPy", error) from None
    if odd := [name for name, array in arrays.items() if array.dtype.kind != "f"]:
        raise ValueError(f"{path}: {odd[0]} must be of a float type, got {arrays[odd[0]].dtype}.")
    if odd := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{path}: {odd[0]} must hold finite numbers, got NaN or infinity.")
    return {name: array.shape for name, array in arrays.items()}


def _kind(names: Mapping[str, Any], wrapper: str, left_out: Mapping[str, int]) -> str:
    if "decoder_embed" not in left_out and {"mask_token", "register_tokens"} & names.keys():
        return "DINOv2"
    if "dist_token" in names or (wrapper == "model" and "head.weight" in names):
        return "DeiT"
    return {"model": "MAE", "teacher": "DINO"}.get(wrapper, "ViT")


def _dar_backbone(state: Mapping[str, Any], left_out: Counter[str]) -> dict[str, Any]:
    """Return the backbone of DAR's model by its own names; DAR's other tensors are counted."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        if part := _DAR_PARTS.fullmatch(name):
            left_out[part[1] or part[2]] += 1
        else:
            plain[name.removeprefix("backbone.")] = value
    return plain


def _matching_backbone(path: Path, kind: str, shapes: Shapes) -> Backbone:
    """Find the timm model that tensors of these shapes belong to."""
    if kind == "AugReg":
        patch, *_, width = _of_rank(4, shapes.get("embedding/kernel"))
        tokens = _of_rank(3, shapes.get("Transformer/posembed_input/pos_embedding"))[1]
    else:
        width, *_, patch = _of_rank(4, shapes.get("patch_embed.proj.weight"))
        tokens = _of_rank(3, shapes.get("pos_embed"))[1]
    # The grid is square. One or two prefix tokens are too few to reach the next square number.
    side = math.isqrt(tokens) * patch
    registers = _of_rank(3, shapes.get("register_tokens"))[1]
    with_registers = f"reg{registers}_" if registers else ""
    distilled = "distilled_" if "dist_token" in shapes else ""
    size = _SIZES.get(width)
    name = {
        "DINOv2": f"vit_{size}_patch{patch}_{with_registers}dinov2",
        "DAR": f"vit_{size}_patch{patch}_dinov2",
        "DeiT": f"deit_{size}_{distilled}patch{patch}_{side}",
        "MAE": f"vit_{size}_patch{patch}_{side}.mae",
        "DINO": f"vit_{size}_patch{patch}_{side}.dino",
        "AugReg": f"vit_{size}_patch{patch}_{side}",
    }.get(kind, "")
    if not is_model_pretrained(name):
        raise ValueError(
            f"{path}: its tensors do not say which timm model they belong to "
            f"({_some(list(shapes))}); give the model (--model), such as vit_base_patch16_224."
        )
    return Backbone(name=name)


def _of_rank(rank: int, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    return shape if shape and len(shape) == rank else (0,) * rank


def _head_names(*suffixes: str) -> Iterator[str]:
    return (f"{head}{suffix}" for head in HEADS for suffix in suffixes)


def _build(backbone: Backbone, classes: int, device: str) -> VisionTransformer:
    with torch.device(device):
        vit = replace(backbone, weights=None).with_head(classes).create()
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"model must be a VisionTransformer of timm, got {backbone.name!r}.")
    return vit


def _torch_shapes(vit: VisionTransformer, kind: str) -> Shapes:
    """Shapes that a file of this kind in torch's format must have, by its own names."""
    shapes = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    if kind != "DINOv2":
        return shapes
    if isinstance(vit.blocks[0].mlp, GluMlp):
        for name in list(shapes):
            theirs = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
            shapes[theirs] = shapes.pop(name)
    shapes["mask_token"] = (1, vit.embed_dim)
    if "reg_token" in shapes:
        # timm adds the class token's position to the token itself.
        shapes["register_tokens"] = shapes.pop("reg_token")
        _, count, width = shapes["pos_embed"]
        shapes["pos_embed"] = (1, count + 1, width)
    return shapes


def _numpy_shapes(vit: VisionTransformer) -> Shapes:
    """Shapes that a file of Google's JAX code must have, by its own names."""
    first: Any = vit.blocks[0]
    width, hidden, heads = vit.embed_dim, first.mlp.fc1.out_features, first.attn.num_heads
    head = (heads, width // heads)
    block = {
        "LayerNorm_0/scale": (width,),
        "LayerNorm_0/bias": (width,),
        "MultiHeadDotProductAttention_1/out/kernel": (*head, width),
        "MultiHeadDotProductAttention_1/out/bias": (width,),
        "LayerNorm_2/scale": (width,),
        "LayerNorm_2/bias": (width,),
        "MlpBlock_3/Dense_0/kernel": (width, hidden),
        "MlpBlock_3/Dense_0/bias": (hidden,),
        "MlpBlock_3/Dense_1/kernel": (hidden, width),
        "MlpBlock_3/Dense_1/bias": (width,),
    }
    for part in ("query", "key", "value"):
        block[f"MultiHeadDotProductAttention_1/{part}/kernel"] = (width, *head)
        block[f"MultiHeadDotProductAttention_1/{part}/bias"] = head
    own = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    _, channels, *patch = own["patch_embed.proj.weight"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, width),
        "embedding/kernel": (*patch, channels, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": own.get("pos_embed", ()),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
    }
    for number in range(len(vit.blocks)):
        shapes |= {f"Transformer/encoderblock_{number}/{n}": s for n, s in block.items()}
    if vit.num_classes:
        shapes |= {"head/kernel": (width, vit.num_classes), "head/bias": (vit.num_classes,)}
    return shapes


def _check(path: Path, what: str, wanted: Shapes, found: Shapes) -> None:
    wrong = [name for name in wanted if name in found and found[name] != wanted[name]]
    problems = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [f"{n} {list(found[n])} for {list(wanted[n])}" for n in wrong],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(n)} {kind}: {_some(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"{path} is not a whole {what}: {listed}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
