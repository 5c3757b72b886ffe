"""Load weight files into timm models: each tensor is used, logged as left out, or refused."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokendial.backbones.checkpoints import (
    Checkpoint,
    find_state_dict,
    join_qkv,
    read_checkpoint,
)
from tokendial.backbones.timm_vit import HEADS
from tokendial.backbones.videomae import TubeletEmbed, filter_videomae
from tokendial.errors import error_message
from tokendial.weights import check_finite, read_file

_LOG = logging.getLogger(__name__)
_HEADS = tuple(f"{head}." for head in HEADS)
# Old files of timm have one more layer before the head, which is useless without the head.
_OF_A_HEAD = re.compile(rf"(?:.*\.)?(?:{'|'.join(HEADS)}|pre_logits)\..+")


def load_weights(vit: nn.Module, path: Path) -> None:
    """Load a checkpoint from a file or folder into a model.

    Position and patch embeddings are resized to the model. If the head has other shapes, the
    model's head keeps its weights. Tensors that are not used are named in the log.

    Args:
        vit: A timm model, which is changed in place.
        path: A file in torch's or safetensors' format, or a folder with one: a saved model, a run,
            a model of transformers. Names are those of timm, transformers, OpenAI's CLIP or other
            published code that timm knows; see `read_checkpoint`.

    Raises:
        ValueError: If the file cannot be read, or its tensors are not those of the model.
    """
    try:
        found = read_checkpoint(path)
        left_out = Counter(found.left_out)
        tensors = {name: value.float() for name, value in found.tensors.items()}
        state, unused = convert_to_timm_names(tensors, vit, left_out)
    except ValueError as error:
        raise ValueError(f"model.weights: {error}") from None
    own = vit.state_dict()
    for head in _HEADS:
        shapes = [
            {name: value.shape for name, value in holder.items() if name.startswith(head)}
            for holder in (own, state)
        ]
        if shapes[1] and shapes[0] != shapes[1]:
            left_out[head[:-1]] += len(shapes[1])
            state = {name: value for name, value in state.items() if name not in shapes[1]}
    unexpected = [name for name in state if name not in own]
    has_head = any(name.startswith(_HEADS) for name in state)
    for name in unused:
        if name == "mask_token" or (_OF_A_HEAD.fullmatch(name) and not has_head):
            left_out[name.split(".")[0]] += 1
        else:
            unexpected.append(name)
    missing = [name for name in own if name not in state and not name.startswith(_HEADS)]
    if "pos_embed" in own and not missing + unexpected:
        state["pos_embed"] = _resize_positions(state["pos_embed"], vit, found)
    wrong = [n for n, value in state.items() if n in own and own[n].shape != value.shape]
    if bad := wrong + missing + unexpected:
        raise ValueError(
            f"model.weights: {found.source} ({found.kind}) belongs to another backbone: "
            f"{len(wrong)} tensors of another shape, {len(missing)} missing, {len(unexpected)} "
            f"unexpected; the first is {bad[0]}."
        )
    vit.load_state_dict(state, strict=False)
    warn_of_unused_weights(found.source, left_out)


def load_own_names(vit: nn.Module, path: Path) -> None:
    """Load a file whose tensors have the names and shapes of the model's own state dict.

    Raises:
        ValueError: If the file cannot be read, or its tensors are not those of the model.
    """
    try:
        state, _, _ = find_state_dict(read_file(path), path)
        check_finite(state, str(path))
    except ValueError as error:
        raise ValueError(f"model.weights: {error}") from None
    own = vit.state_dict()
    wrong = [name for name in state if name in own and own[name].shape != state[name].shape]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if bad := wrong + sorted(missing) + sorted(unexpected):
        raise ValueError(
            f"model.weights: {path} belongs to another backbone: {len(wrong)} tensors of another "
            f"shape, {len(missing)} missing, {len(unexpected)} unexpected; the first is {bad[0]}."
        )
    vit.load_state_dict(state)


def warn_of_unused_weights(source: object, left_out: Mapping[str, int]) -> None:
    """Log the number of unused tensors of a file by group, once per file."""
    if any(left_out.values()):
        _warn_once(f"{source}: left out: {describe_counts(left_out)}")


@cache
def _warn_once(line: str) -> None:
    # A run reads the file of its backbone each time it is used; one warning is enough.
    _LOG.warning(line)


def describe_counts(groups: Mapping[str, int]) -> str:
    """Write counts of tensors in words, such as "2 head, 1 mask_token"."""
    return ", ".join(f"{count} {group}" for group, count in groups.items() if count)


def convert_to_timm_names(
    state: Mapping[str, Tensor], vit: Any, left_out: Counter[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert a state dict to the names of a timm model.

    Args:
        state: Float tensors by the names that `read_checkpoint` gives.
        vit: The timm model. Positions are not resized to it.
        left_out: Counter that is raised for each tensor that only pre-training needs.

    Returns:
        The state dict by timm's names, and the names of the tensors that it does not use.

    Raises:
        ValueError: If timm's filter cannot convert the tensors.
    """
    state = dict(state)
    if isinstance(vit, VisionTransformer):
        join_qkv(state)
    if isinstance(vit.patch_embed, TubeletEmbed):
        return filter_videomae(state, vit, left_out), []
    # timm's filters assume that positions form a square, or have the size in the model's name, so
    # positions are kept away from them.
    rename_registers(state)
    positions = state.pop("pos_embed", None)
    family: Any = eva if isinstance(vit, Eva) else vision_transformer
    # timm's filters silently drop tensors that they do not know. The autograd graph of the outputs
    # shows which inputs were used.
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
        try:
            named = family.checkpoint_filter_fn(dict(leaves), vit)
        except Exception as error:
            raise ValueError(
                f"this is not a state dict of such a ViT ({error_message(error)})"
            ) from error
    used = _sources_of(named.values())
    # A bias of zeros may be dropped, such as DINOv3's of queries, keys and values.
    unused = [
        name
        for name, leaf in leaves.items()
        if leaf not in used and (leaf.any() or not name.endswith("bias"))
    ]
    named = {name: value.detach() for name, value in named.items()}
    return named | ({} if positions is None else {"pos_embed": positions}), unused


def rename_registers(state: dict[str, Tensor], prefix: str = "") -> None:
    """Change register tokens of DINOv2's code to timm's form in place, if there are any.

    There, positions hold that of the class token. timm adds it to the token itself.

    Args:
        state: Tensors by name.
        prefix: What stands before the names of the backbone.
    """
    registers, positions = f"{prefix}register_tokens", f"{prefix}pos_embed"
    if registers in state and positions in state and state[positions].ndim == 3:
        state[f"{prefix}reg_token"] = state.pop(registers)
        state[f"{prefix}cls_token"] = state[f"{prefix}cls_token"] + state[positions][:, :1]
        state[positions] = state[positions][:, 1:]


def _sources_of(outputs: Iterable[Tensor]) -> set[Tensor]:
    """Return the leaf tensors that the outputs were computed from."""
    leaves, seen = set[Tensor](), set[Any]()
    waiting: list[Any] = []
    for output in outputs:
        if output.grad_fn is None:
            leaves.add(output)
        else:
            waiting.append(output.grad_fn)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _resize_positions(positions: Tensor, vit: Any, found: Checkpoint) -> Tensor:
    """Resize positions [1, N, D], prefix tokens first, to the grid of a model.

    Unless the file states rows and columns, the positions must form a square or fit the model.
    """
    if positions.ndim != 3:
        return positions
    new = vit.patch_embed.grid_size
    wanted = vit.pos_embed.shape[1]
    count, prefix = positions.shape[1], wanted - math.prod(new)
    grid = found.grid
    if grid is None or math.prod(grid) + prefix != count:
        if count == wanted:
            return positions
        side = math.isqrt(max(count - prefix, 0))
        grid = side, side
        if not side or side * side + prefix != count:
            raise ValueError(
                f"model.weights: {found.source} has positions of {count} tokens, which is not "
                f"{prefix} and a square of patches; to resize them to {new[0]}x{new[1]}, their "
                "rows and columns have to be known, which saved models and files of `tokendial "
                "weights convert --img-size` say."
            )
    if grid == new:
        return positions
    # timm's own function returns positions unchanged if another grid has as many patches.
    own, patches = positions.tensor_split([prefix], dim=1)
    moved = F.interpolate(
        patches.transpose(1, 2).reshape(1, -1, *grid),
        size=new,
        mode="bicubic",
        antialias=found.antialias,
    )
    return torch.cat([own, moved.flatten(2).transpose(1, 2)], dim=1)
