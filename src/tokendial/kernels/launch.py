"""Decides whether the fused kernels run, and starts them.

The kernels are for inference, and off by default. For each of them there is plain PyTorch code that
gives the same results up to rounding and runs where the kernel cannot. Triton is imported when the
first kernel starts. It comes with PyTorch's wheels for GPUs; the library needs it for nothing else.
"""

# Shape legend: B batch, N tokens, G new tokens, S tokens that are absorbed, D any feature width,
# C metric width, A sources (tokens that may be absorbed), E targets (tokens that absorb).

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

_is_on = ContextVar("fused kernels", default=False)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def use_fused_kernels(on: bool = True) -> Iterator[None]:
    """Context manager: let token reduction use the fused kernels where they can run.

    Args:
        on: Whether to use them. False turns them off inside of a block that turned them on.

    Example:
        >>> from tokendial.kernels import should_fuse, use_fused_kernels
        >>> with use_fused_kernels(), torch.no_grad():
        ...     should_fuse(torch.zeros(2, 5, 8))  # not on a GPU
        False
    """
    before = _is_on.set(on)
    try:
        yield
    finally:
        _is_on.reset(before)


def should_fuse(x: Tensor) -> bool:
    """Whether a fused kernel processes `x` now, instead of plain PyTorch."""
    return (
        not torch.compiler.is_compiling()  # first, because torch.compile cannot trace the rest
        and _is_on.get()
        and not torch.is_grad_enabled()
        and x.dtype in _DTYPES
        and fused_kernels_available(x.device)
    )


def fused_kernels_available(device: torch.device) -> bool:
    """Whether the kernels can run on a device: a GPU, or a CPU by Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == ("cpu" if interpreted else "cuda") and _has_triton()


def merge_fused(
    x_BND: Tensor,
    keep_BG: Tensor,
    src_BS: Tensor,
    dst_BS: Tensor,
    weight_BN: Tensor | None,
    how: Literal["mean", "sum"],
) -> Tensor:
    """Return the features of the new tokens of a `Grouping`, [B, G, D].

    The arguments are those of `Grouping.merge`. Sums are computed in float32 for every dtype, and
    in the same order in every run.
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


def find_most_similar_fused(
    unit_BNC: Tensor, source_A: Tensor, target_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the most similar target of each source, without a matrix of all similarities.

    Args:
        unit_BNC: Normalised features of the tokens, float32.
        source_A: Indices of the tokens that may be absorbed.
        target_E: Indices of the tokens that absorb.

    Returns:
        The highest cosine of each source, float32, and the position of that target in `target_E`
        (the first one if several are equal), int64; [B, A] each.
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
        *(num_tokens, num_sources, len(target_E), width),
        BLOCK_A=block,
        BLOCK_E=64,
        BLOCK_C=32,
    )
    return best_BA, partner_BA


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _start(program: Any, grid: tuple[int, ...], *arguments: Tensor | int, **blocks: int) -> None:
    """Run a kernel on the device of its tensors, which are made contiguous."""
    contiguous = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    with torch.cuda.device_of(contiguous[0]):  # type: ignore[no-untyped-call]
        # Allow fused multiply-adds. The argument is explicit because Triton's default will change.
        program[grid](*contiguous, **blocks, enable_fp_fusion=True)


def _power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least `number`, as Triton needs for block sizes."""
    return 1 << (number - 1).bit_length()
