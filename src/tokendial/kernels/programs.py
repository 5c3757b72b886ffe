"""The fused kernels, in Triton. `launch` starts them and documents their arguments and results.

Each program instance of a grid computes its own part of the result. No two instances add to the
same number, so every run gives the same bits. All tensors are contiguous.
"""

# Shape legend: a suffix names the shape of a block, with the letters of the legend in `launch`.

import triton
import triton.language as tl

# The numbers of tokens differ from layer to layer; one compiled kernel serves all of them.
_COUNTS = ["num_tokens", "num_groups", "num_absorbed", "num_sources", "num_targets"]


@triton.jit(do_not_specialize=_COUNTS)  # type: ignore[untyped-decorator]
def merge_program(
    out: tl.tensor,
    x: tl.tensor,
    keep: tl.tensor,
    src: tl.tensor,
    dst: tl.tensor,
    weight: tl.tensor,
    num_tokens: tl.tensor,
    num_groups: tl.tensor,
    num_absorbed: tl.tensor,
    width: tl.tensor,
    MEAN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Compute one block of features of one new token. Grid: images, new tokens, feature blocks."""
    image = tl.program_id(0).to(tl.int64)  # offsets computed from it can exceed 32 bits
    group = tl.program_id(1)
    place = image * num_groups + group
    x += image * num_tokens * width
    weight += image * num_tokens
    src += image * num_absorbed
    dst += image * num_absorbed

    # Weights are divided by their sum before they multiply features, so that a token that absorbs
    # none has a share of exactly 1.
    kept = tl.load(keep + place)
    weight_kept = tl.load(weight + kept).to(tl.float32)
    total = weight_kept if MEAN else 1.0
    if MEAN:
        for first in range(0, num_absorbed, BLOCK_S):
            s_S = first + tl.arange(0, BLOCK_S)
            is_member_S = tl.load(dst + s_S, mask=s_S < num_absorbed, other=-1) == group
            token_S = tl.load(src + s_S, mask=is_member_S, other=0)
            weight_S = tl.load(weight + token_S, mask=is_member_S, other=0.0)
            total += tl.sum(weight_S.to(tl.float32))

    d_D = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row_D = d_D < width
    kept_D = tl.load(x + kept * width + d_D, mask=in_row_D)
    sum_D = kept_D.to(tl.float32) * tl.div_rn(weight_kept, total)
    for first in range(0, num_absorbed, BLOCK_S):
        s_S = first + tl.arange(0, BLOCK_S)
        is_member_S = tl.load(dst + s_S, mask=s_S < num_absorbed, other=-1) == group
        # A new token absorbs few tokens, so most blocks contain none of them: skip those.
        if tl.max(is_member_S.to(tl.int32)) > 0:
            token_S = tl.load(src + s_S, mask=is_member_S, other=0)
            weight_S = tl.load(weight + token_S, mask=is_member_S, other=0.0)
            share_S = tl.div_rn(weight_S.to(tl.float32), total)
            row_SD = x + token_S[:, None] * width + d_D[None, :]
            x_SD = tl.load(row_SD, mask=is_member_S[:, None] & in_row_D[None, :], other=0.0)
            sum_D += tl.sum(x_SD.to(tl.float32) * share_S[:, None], axis=0)
    tl.store(out + place * width + d_D, sum_D, mask=in_row_D)


@triton.jit(do_not_specialize=_COUNTS)  # type: ignore[untyped-decorator]
def most_similar_program(
    best: tl.tensor,
    partner: tl.tensor,
    unit: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    num_tokens: tl.tensor,
    num_sources: tl.tensor,
    num_targets: tl.tensor,
    width: tl.tensor,
    BLOCK_A: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Find the best targets of one block of sources. Grid: images, blocks of sources."""
    image = tl.program_id(0).to(tl.int64)
    unit += image * num_tokens * width
    a_A = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    is_source_A = a_A < num_sources
    source_A = tl.load(source + a_A, mask=is_source_A, other=0)

    best_A = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    partner_A = tl.zeros((BLOCK_A,), tl.int32)
    for first in range(0, num_targets, BLOCK_E):
        e_E = first + tl.arange(0, BLOCK_E)
        is_target_E = e_E < num_targets
        target_E = tl.load(target + e_E, mask=is_target_E, other=0)
        cosine_AE = tl.zeros((BLOCK_A, BLOCK_E), tl.float32)
        for start in range(0, width, BLOCK_C):
            c_C = start + tl.arange(0, BLOCK_C)
            in_row_C = c_C < width
            source_AC = tl.load(
                unit + source_A[:, None] * width + c_C[None, :],
                mask=is_source_A[:, None] & in_row_C[None, :],
                other=0.0,
            )
            target_CE = tl.load(
                unit + target_E[None, :] * width + c_C[:, None],
                mask=is_target_E[None, :] & in_row_C[:, None],
                other=0.0,
            )
            # Not TF32: with its 10 bits of mantissa many similarities would be equal.
            cosine_AE = tl.dot(source_AC, target_CE, cosine_AE, input_precision="ieee")
        # A cosine with a zero vector is NaN. PyTorch's maximum prefers NaN, Triton's ignores it, so
        # NaN becomes infinity here and NaN again below.
        cosine_AE = tl.where(cosine_AE == cosine_AE, cosine_AE, float("inf"))
        cosine_AE = tl.where(is_target_E[None, :], cosine_AE, float("-inf"))
        block_best_A, at_A = tl.max(cosine_AE, axis=1, return_indices=True)
        better_A = block_best_A > best_A  # if equal, the first target stays
        best_A = tl.where(better_A, block_best_A, best_A)
        partner_A = tl.where(better_A, first + at_A, partner_A)
    best_A = tl.where(best_A == float("inf"), float("nan"), best_A)
    place_A = image * num_sources + a_A
    tl.store(best + place_A, best_A, mask=is_source_A)
    tl.store(partner + place_A, partner_A, mask=is_source_A)
