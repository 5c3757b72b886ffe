"""Fused GPU kernels for token reduction: matching and merging in one kernel each."""

from tokendial.kernels.launch import can_fuse, fused, fuses, merge_fused, most_similar_fused

__all__ = ["can_fuse", "fused", "fuses", "merge_fused", "most_similar_fused"]
