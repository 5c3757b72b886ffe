"""ViTShape: the sizes of a Vision Transformer that methods read when they build their modules."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ViTShape:
    """Sizes of a backbone, such as its depth and its width."""

    depth: int
    """Number of transformer blocks."""
    embed_dim: int
    """Number of features of each token."""
    num_prefix_tokens: int
    """Number of class, distillation and register tokens; they stand before the patch tokens."""
    num_patches: int
    """Number of patch tokens at the image size that the backbone is configured for."""
    has_class_token: bool
    """Whether the first token is a class token."""
    num_grids: int = 1
    """Number of time steps whose patch tokens stand in one sequence. It is 1 for images, and for
    video models that process each frame alone."""
