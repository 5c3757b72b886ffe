"""Load checkpoints of the published implementations into wrapped models.

Each implementation keeps timm's names for the backbone and adds modules of its own. A table per
system maps their names to ours.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokendial.backbones.loading import rename_registers, warn_of_unused_weights
from tokendial.compensate import Compensator
from tokendial.model.dial_vit import DialViT
from tokendial.weights import check_finite


@dataclass(frozen=True, slots=True)
class System:
    """How a published implementation names its parameters, and which ones it saves."""

    names: tuple[tuple[str, str], ...] = ()
    """Pairs of a pattern for its names and the template of our name."""
    prefix: str = ""
    """Prefix of backbone and adapter names in a complete model."""
    only_in_training: tuple[str, ...] = ()
    """Prefixes of modules that exist only in training."""
    frozen_left_out: bool = False
    """Whether released files may leave out the frozen backbone."""


_ADAPTER = (
    (r"blocks\.(\d+)\.adapt(?:mlp|er)\.down_proj\.(\w+)", r"adapter.down.\1.\2"),
    (r"blocks\.(\d+)\.adapt(?:mlp|er)\.up_proj\.(\w+)", r"adapter.up.\1.\2"),
)
_OPTIONS = (
    (r"blocks\.(\d+)\.adaptmlp\.adapter_layer_norm_before\.(\w+)", r"adapter.norms.\1.\2"),
    (r"blocks\.(\d+)\.adaptmlp\.scale", r"adapter.scales.\1"),
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
    "sparse_tuning": System(
        ((r"blocks\.(\d+)\.adaptmlp\.((?:down|up)\d\.\w+)", r"adapter.layers.\1.\2"),)
    ),
    "dynamicvit": System(
        (
            (r"score_predictor\.(\d+)\.in_conv\.(.+)", r"reducer.predictors.\1.inside.\2"),
            (r"score_predictor\.(\d+)\.out_conv\.(.+)", r"reducer.predictors.\1.outside.\2"),
        )
    ),
    "dyt": System((*_ADAPTER, *_OPTIONS, _DISPATCHER)),
    "dyt_video": System((*_ADAPTER, *_OPTIONS, _DISPATCHER, *_POOLING)),
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
    """Load a state dict of a published implementation into a wrapped model.

    Checkpoints of ToCom and DAR may leave the backbone out. Modules that exist only in training are
    skipped, and named in the log.

    Args:
        model: A model wrapped with the system's method and adapter: DyT with `AdaptFormer`
            (dyt_video: on a model of `video_vit`), DAR with `DARAdapter` and, for a complete
            segmentation model, `DARDecoder`; Sparse-Tuning's released code with
            `ReleasedDenseAdapter`. For ToCom, a compensator is attached to the model, which counts
            as fine-tuned at degree 0.
        state_dict: Tensors by the implementation's names, or a checkpoint that holds them under
            "model".
        system: tome, evit, dynamicvit, dyt, dyt_video, dar, tocom or sparse_tuning.

    Raises:
        ValueError: If the system is unknown, names are missing or unexpected, shapes differ, or
            numbers are not finite. The message names them, and the model is left unchanged.
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
    own, names = model.state_dict(), SYSTEMS[system]
    only_in_training = [name for name in state_dict if name.startswith(names.only_in_training)]
    renamed: dict[str, Any] = {
        wrapped_name(name, system): value
        for name, value in state_dict.items()
        if name not in only_in_training
    }
    check_finite(renamed, f"this {system} state dict", own)
    rename_registers(renamed, prefix="vit.")
    trained_only = names.frozen_left_out and not any(name.startswith("vit.") for name in renamed)
    missing = [
        name
        for name in own
        if name not in renamed
        and not (trained_only and name.startswith("vit."))
        # Only training uses the number of batches of a BatchNorm; some files leave it out.
        and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in renamed if name not in own]
    wrong = [n for n, value in renamed.items() if n in own and own[n].shape != value.shape]
    problems = (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
    if any(found for _, found in problems):
        listed = "; ".join(f"{what}: {_some(found)}" for what, found in problems if found)
        raise ValueError(f"this is not a {system} state dict of this model; {listed}.")
    model.load_state_dict(own | renamed)
    warn_of_unused_weights(
        f"{system} state dict", Counter(n.split(".")[0] for n in only_in_training)
    )


def wrapped_name(name: str, system: str) -> str:
    """Return the name in a wrapped model of a published implementation's parameter."""
    names = SYSTEMS[system]
    name = name.removeprefix(names.prefix)
    for pattern, ours in names.names:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return f"vit.{name}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
