"""Fused GPU kernels for token reduction: matching and merging in one kernel each."""

from tokendial.kernels.launch import (
    find_most_similar_fused,
    fused_kernels_available,
    merge_fused,
    should_fuse,
    use_fused_kernels,
)

__all__ = [
    "find_most_similar_fused",
    "fused_kernels_available",
    "merge_fused",
    "should_fuse",
    "use_fused_kernels",
]
