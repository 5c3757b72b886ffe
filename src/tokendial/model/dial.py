"""The dial: which degrees it offers, images that each have a degree, and what follows the dial."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokendial.backbones.anatomy import Anatomy


class Compensation(Protocol):
    """Changes weights of the model whenever the dial turns; see `tokendial.compensate`."""

    @property
    def in_weights(self) -> bool:
        """Whether the model's weights are changed now. If not, outputs of layers are."""

    @property
    def steps(self) -> int:
        """Highest degree that is compensated for."""

    @property
    def revision(self) -> str:
        """A text that differs from that of any other compensation."""

    def start(self) -> None:
        """Start to compensate, at the present degree of the model."""

    def stop(self) -> None:
        """Stop, and give the model its own weights back."""

    def set_degree(self, degree: int) -> None:
        """Compensate for another degree."""


class InferenceModel(Protocol):
    """What gives logits at a degree of the dial: a `DialViT`, or what `Runtime.start` returns."""

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the ViT."""

    @property
    def device(self) -> torch.device:
        """Device that it computes on, or gives its results on."""

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that can be set."""

    @property
    def degree(self) -> int:
        """Present degree of the dial."""

    def set_degree(self, degree: int) -> None:
        """Set the degree of the dial."""

    def eval(self) -> object:
        """Leave training mode."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Logits of images."""

    def logits_and_embeddings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and embeddings of images, from one pass."""

    def feature_map(self, images: Tensor, /) -> Tensor:
        """Features at every patch, all reductions undone; see `DialViT.feature_map`."""


def check_degree(degree: int, degrees: Sequence[int]) -> None:
    """Raise a ValueError unless `degree` is one of those that a dial offers."""
    if isinstance(degree, bool) or degree not in degrees:
        raise ValueError(f"degree must be an integer in [0, {degrees[-1]}], got {degree!r}.")


def run_by_degree(
    model: Callable[[Tensor], Tensor],
    set_degree: Callable[[int], None],
    images: Tensor,
    degrees: Sequence[int],
) -> Tensor:
    """Run the images of each degree together, and return the outputs in the order of the images.

    Args:
        model: Computes the outputs of images at the present degree.
        set_degree: Turns the model's dial, which is left at the last degree.
        images: [B, ...].
        degrees: The degree of each image.

    Raises:
        ValueError: If there are not as many degrees as images.
    """
    if len(degrees) != len(images):
        raise ValueError(
            f"degrees must be one for each of the {len(images)} images, got {len(degrees)}."
        )
    if not degrees:
        return model(images)
    rows = {d: [i for i, own in enumerate(degrees) if own == d] for d in sorted(set(degrees))}
    parts = []
    for degree, some in rows.items():
        set_degree(degree)
        parts.append(model(images[some]))
    order = torch.tensor([i for some in rows.values() for i in some], device=images.device)
    return torch.cat(parts)[order.argsort()]
