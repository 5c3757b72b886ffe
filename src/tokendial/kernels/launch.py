"""When the kernels run, and how they are started.

They are for inference and off by default. Plain PyTorch stands beside each of them, gives the same
up to rounding, and is what runs wherever they do not. Triton is imported when the first one starts:
it comes with PyTorch's wheels for GPUs, and the library needs it for nothing else.
"""

# Shape legend: B batch, N tokens, G new tokens, S tokens that are absorbed, D any feature width,
# C metric width, A sources, E targets.

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

_on = ContextVar("fused kernels", default=False)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def fused(on: bool = True) -> Iterator[None]:
    """Let reductions run in fused kernels, where these can.

    Args:
        on: False: not even if something around it says so.

    Example:
        >>> from tokendial.kernels import fused
        >>> with fused(), torch.no_grad():
        ...     fuses(torch.zeros(2, 5, 8))  # not on a GPU
        False
    """
    before = _on.set(on)
    try:
        yield
    finally:
        _on.reset(before)


def fuses(x: Tensor) -> bool:
    """Whether a kernel is to run on `x` in place of plain PyTorch."""
    return (
        not torch.compiler.is_compiling()  # first: compilers cannot look into the rest
        and _on.get()
        and not torch.is_grad_enabled()
        and x.dtype in _DTYPES
        and can_fuse(x.device)
    )


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels can run on a device: a GPU, or a processor in Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == ("cpu" if interpreted else "cuda") and _triton_is_there()


def merge_fused(
    x_BND: Tensor,
    keep_BG: Tensor,
    src_BS: Tensor,
    dst_BS: Tensor,
    weight_BN: Tensor | None,
    how: Literal["mean", "sum"],
) -> Tensor:
    """Features of the new tokens of a `Grouping`, see there. [B, G, D].

    Sums are taken in float32 whatever the dtype, and in the same order in every run.
    """
    from tokendial.kernels.programs import merge_program

    num_images, num_tokens, width = x_BND.shape
    num_groups, num_absorbed = keep_BG.shape[1], src_BS.shape[1]
    if weight_BN is None:
        weight_BN = x_BND.new_ones(num_images, num_tokens)
    out_BGD = x_BND.new_empty(num_images, num_groups, width)
    block = min(256, _power_of_2(width))
    _start(
        merge_program,
        (num_images, num_groups, -(-width // block)),
        *(out_BGD, x_BND, keep_BG, src_BS, dst_BS, weight_BN),
        *(num_tokens, num_groups, num_absorbed, width),
        MEAN=how == "mean",
        BLOCK_S=16,
        BLOCK_D=block,
    )
    return out_BGD


def most_similar_fused(
    unit_BNC: Tensor, source_A: Tensor, target_E: Tensor, passed_by: int = 0
) -> tuple[Tensor, Tensor]:
    """The highest cosine of each source with a target, and the first target that has it.

    No more than a small block of similarities exists at a time.

    Args:
        unit_BNC: Normalised metric of the tokens, float32.
        source_A: Tokens that look for a target.
        target_E: Tokens that they may find.
        passed_by: So many targets, the first ones, are nobody's.

    Returns:
        Cosines, float32, and places in `target_E`, int64; [B, A] each.
    """
    from tokendial.kernels.programs import most_similar_program

    num_images, num_tokens, width = unit_BNC.shape
    num_sources = len(source_A)
    best_BA = unit_BNC.new_empty(num_images, num_sources)
    partner_BA = torch.empty_like(best_BA, dtype=torch.int64)
    block = 32
    _start(
        most_similar_program,
        (num_images, -(-num_sources // block)),
        *(best_BA, partner_BA, unit_BNC, source_A, target_E),
        *(num_tokens, num_sources, len(target_E), passed_by, width),
        BLOCK_A=block,
        BLOCK_E=64,
        BLOCK_C=32,
    )
    return best_BA, partner_BA


@cache
def _triton_is_there() -> bool:
    return find_spec("triton") is not None


def _start(program: Any, grid: tuple[int, ...], *arguments: Tensor | int, **blocks: int) -> None:
    """Run a kernel on the GPU that holds its tensors, all of them contiguous."""
    given = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    with torch.cuda.device_of(given[0]):  # type: ignore[no-untyped-call]
        # A product and a sum may be rounded once: said here, as the default is to change.
        program[grid](*given, **blocks, enable_fp_fusion=True)


def _power_of_2(number: int) -> int:
    """The least one that is not below `number`, as sizes of blocks have to be."""
    return 1 << (number - 1).bit_length()
