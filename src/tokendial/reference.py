"""Checkpoints of the public implementations, put into wrapped models.

Each of them keeps the backbone under timm's names and adds its own modules; a table per system says
where those live here.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokendial.backbones.loading import warn_of_unused_weights
from tokendial.compensate import Compensator
from tokendial.model.dial_vit import DialViT
from tokendial.weights import check_finite


@dataclass(frozen=True, slots=True)
class System:
    """What a public implementation calls its parameters, and which it saves."""

    names: tuple[tuple[str, str], ...] = ()
    """Its own names (as patterns) and ours."""
    prefix: str = ""
    """Before the names of backbone and adapters in a whole model."""
    only_in_training: tuple[str, ...] = ()
    """How names of modules begin that go away after training."""
    frozen_left_out: bool = False
    """Whether released files may hold what was trained alone."""


_ADAPTER = (
    (r"blocks\.(\d+)\.adapt(?:mlp|er)\.down_proj\.(\w+)", r"adapter.down.\1.\2"),
    (r"blocks\.(\d+)\.adapt(?:mlp|er)\.up_proj\.(\w+)", r"adapter.up.\1.\2"),
)
_DISPATCHER = (r"blocks\.(\d+)\.mlp_token_select\.mlp_head\.(\w+)", r"reducer.dispatchers.\1.\2")
_POOLING = (
    (r"query_token", "vit.head.query"),
    (r"attentive_blocks\.(norm_[qkv]\.\w+)", r"vit.head.\1"),
    (r"attentive_blocks\.cross_attn\.([qv])_bias", r"vit.head.\1.bias"),
    (r"attentive_blocks\.cross_attn\.(.+)", r"vit.head.\1"),
    (r"head\.(\w+)", r"vit.head.head.\1"),
)
_COMPENSATOR = r"blocks\.(\d+)\.compensator\."
SYSTEMS = {
    "tome": System(),
    "evit": System(),
    "tocom": System(),
    "dynamicvit": System(
        (
            (r"score_predictor\.(\d+)\.in_conv\.(.+)", r"reducer.predictors.\1.inside.\2"),
            (r"score_predictor\.(\d+)\.out_conv\.(.+)", r"reducer.predictors.\1.outside.\2"),
        )
    ),
    "dyt": System((*_ADAPTER, _DISPATCHER)),
    "dyt_video": System((*_ADAPTER, _DISPATCHER, *_POOLING)),
    "dar": System(
        (
            *_ADAPTER,
            (_COMPENSATOR + r"down_conv1\.(\w+)", r"adapter.compensators.\1.down.\2"),
            (_COMPENSATOR + r"down_conv2\.0\.(\w+)", r"adapter.compensators.\1.depthwise.\2"),
            (_COMPENSATOR + r"down_conv2\.1\.(\w+)", r"adapter.compensators.\1.pointwise.\2"),
            (_COMPENSATOR + r"up_conv\.(\w+)", r"adapter.compensators.\1.up.\2"),
            (r"blocks\.(\d+)\.token_mask_gen\.conv\.(\w+)", r"reducer.dispatchers.\1.\2"),
            (r"blocks\.(\d+)\.scale", r"adapter.scales.\1"),
            (r"decode_head\.convs\.0\.conv\.(\w+)", r"decoder.reduce.conv.\1"),
            (r"decode_head\.convs\.0\.bn\.(\w+)", r"decoder.reduce.norm.\1"),
            (r"decode_head\.fusion_conv\.conv\.(\w+)", r"decoder.fuse.conv.\1"),
            (r"decode_head\.fusion_conv\.bn\.(\w+)", r"decoder.fuse.norm.\1"),
            (r"decode_head\.conv_seg\.(\w+)", r"decoder.predict.\1"),
        ),
        prefix="backbone.",
        only_in_training=("d_head_s.", "d_head_t."),
        frozen_left_out=True,
    ),
}


def load_reference(model: DialViT, state_dict: Mapping[str, Any], system: str) -> None:
    """Put a state dict of a public implementation into a wrapped model.

    Args:
        model: Wrapped with the method, and where the system has adapters with those: DyT with
            `AdaptFormer` (dyt_video: a model of `video_vit`), DAR with `DARAdapter` and, for a
            whole segmentation model, `DARDecoder`.
            ToCom's compensator is attached to it, for a model fine-tuned at degree 0.
            Checkpoints of ToCom and DAR may leave the backbone out. What only training needs is
            left out, and named in the log.
        state_dict: Tensors by the implementation's names, or a checkpoint that holds them under
            "model".
        system: One of `SYSTEMS`.

    Raises:
        ValueError: If the system is unknown, names are missing or unexpected, shapes differ, or
            numbers are not finite; the message names them, and the model is left as it was.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system must be one of {', '.join(SYSTEMS)}, got {system!r}.")
    state_dict = state_dict.get("model", state_dict)
    if system == "tocom":
        pairs = {name: value for name, value in state_dict.items() if "_tocom." in name}
        plugin = Compensator.from_reference(pairs)
        if rest := {name: value for name, value in state_dict.items() if name not in pairs}:
            _load(model, rest, system)
        plugin.attach(model, source=0)
    else:
        _load(model, state_dict, system)


def _load(model: DialViT, state_dict: Mapping[str, Any], system: str) -> None:
    own, told = model.state_dict(), SYSTEMS[system]
    only_in_training = [name for name in state_dict if name.startswith(told.only_in_training)]
    renamed: dict[str, Any] = {
        our_name(name, system): value
        for name, value in state_dict.items()
        if name not in only_in_training
    }
    check_finite(renamed, f"this {system} state dict", own)
    trained_only = told.frozen_left_out and not any(name.startswith("vit.") for name in renamed)
    missing = [
        name
        for name in own
        if name not in renamed
        and not (trained_only and name.startswith("vit."))
        # How many batches a BatchNorm has seen matters to training alone; some files leave it out.
        and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in renamed if name not in own]
    wrong = [n for n, value in renamed.items() if n in own and own[n].shape != value.shape]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
    if any(names for _, names in problems):
        listed = "; ".join(f"{what}: {_some(names)}" for what, names in problems if names)
        raise ValueError(f"this is not a {system} state dict of this model; {listed}.")
    model.load_state_dict(own | renamed)
    warn_of_unused_weights(
        f"{system} state dict", Counter(n.split(".")[0] for n in only_in_training)
    )


def our_name(name: str, system: str) -> str:
    """What a parameter of a public implementation is called in a wrapped model."""
    told = SYSTEMS[system]
    name = name.removeprefix(told.prefix)
    for pattern, ours in told.names:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return f"vit.{name}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
