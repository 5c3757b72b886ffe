"""How many decisions about tokens rounding changes: which one merges into which, or is dropped."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import tokendial as td
from tokendial.export_files import write_onnx
from tokendial.runtimes import onnxruntime_sessions, openvino_int8, openvino_sessions

_BATCH = 32
_OPENERS = {
    "onnxruntime": onnxruntime_sessions.open_file,
    "openvino": openvino_sessions.open_file,
}

# Shape legend: B images, P original positions (prefix and patch).


def changed_decisions(found_BP: Tensor, first_BP: Tensor) -> float:
    """Share of the decisions about tokens that are no longer taken.

    A merge makes one group of positions of two, and a drop gives one position up. So there are as
    many decisions as positions without a group of their own. Those that two runs share are counted
    in the groups of the positions that both runs hold together. A token that merges into another
    one than before is one changed decision, however many patches it stands for.

    Args:
        found_BP: The token that holds each position, -1 where it was dropped (`Tokens.origin`).
        first_BP: The same in the run to compare with.

    Returns:
        The share of the decisions of `first_BP`, in [0, 1]; 0 if there are none.
    """
    decisions = first_BP.numel() - _num_groups(first_BP, first_BP)
    shared = first_BP.numel() - _num_groups(found_BP, first_BP)
    return (decisions - shared) / decisions if decisions else 0.0


def _num_groups(found_BP: Tensor, first_BP: Tensor) -> int:
    """Groups of positions that both hold in one token each, in all images."""
    pairs_B2P = torch.stack([found_BP, first_BP], dim=1)
    groups = (pairs.unique(dim=1) for pairs in pairs_B2P)
    return sum(int((each >= 0).any(dim=0).sum()) for each in groups)


class _Origins(nn.Module):
    """Gives the token that holds each position behind the last block, [B, P]."""

    def __init__(self, model: td.DialViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        *_, last = self.model.steps(images, track=True)
        return last.tokens.origin


@torch.no_grad()
def origins(
    model: td.DialViT,
    images: Tensor,
    runtime: td.Runtime,
    folder: Path,
    calibration: Callable[[td.DialViT], Tensor],
) -> Tensor:
    """The token that holds each position at the model's present degree, in a runtime.

    onnxruntime and OpenVINO run a file of their own, which gives these in place of logits.

    Args:
        model: The model, in evaluation mode.
        images: [B, 3, H, W], at least two.
        runtime: PyTorch, onnxruntime or OpenVINO, in any precision.
        folder: Keeps the files for other runtimes; of one model only.
        calibration: Reads the images that 8 bits in OpenVINO are calibrated on.

    Returns:
        [B, P], -1 where a position was dropped.
    """
    batches = images.split(_BATCH)
    if runtime.name == "torch":
        fast = runtime.start(model, batches[0], degrees=[model.degree])
        plain = fast.model if isinstance(fast, td.OptimizedViT) else model
        dtype = next(plain.parameters()).dtype
        return torch.cat([_Origins(plain)(batch.to(dtype)) for batch in batches])
    path = folder / f"origins_{model.degree}.onnx"
    if not path.exists():
        write_onnx(_Origins(model), images[:2], path, ["origins"])
    open_file = _OPENERS[runtime.name]
    if (runtime.name, runtime.precision) == ("openvino", "int8"):
        path = openvino_int8.quantized(path, lambda: calibration(model).numpy(), quiet=True)
    session = open_file(path, runtime.precision, batches[0].numpy())
    return torch.cat([torch.from_numpy(session(batch.numpy())["origins"]) for batch in batches])
