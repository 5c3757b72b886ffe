"""Fused kernels: what token reduction does on a GPU in many small steps, in one each."""

from tokendial.kernels.launch import can_fuse, fused, fuses, merge_fused, most_similar_fused

__all__ = ["can_fuse", "fused", "fuses", "merge_fused", "most_similar_fused"]
