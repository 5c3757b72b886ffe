"""The numbers of a ViT that methods need when they are built."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ViTShape:
    """The numbers of a backbone that methods need when they are built."""

    depth: int
    """Number of blocks."""
    embed_dim: int
    """Width of a token."""
    num_prefix_tokens: int
    """Class, distillation and register tokens."""
    num_patches: int
    """Patch tokens at the backbone's configured image size."""
    has_class_token: bool
    """Whether the first token is a class token."""
    num_grids: int = 1
    """Time steps of a clip whose patches one sequence holds; 1: images, or frames by themselves."""
