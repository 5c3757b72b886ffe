"""The dial: which degrees it offers, images that each have a degree, and what follows the dial."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Compensation(Protocol):
    """Changes weights of the model whenever the dial turns; see `tokendial.compensate`."""

    @property
    def in_weights(self) -> bool:
        """Whether the model's weights are changed now. If not, outputs of layers are."""

    def start(self) -> None:
        """Start to compensate, at the present degree of the model."""

    def stop(self) -> None:
        """Stop, and give the model its own weights back."""

    def set_degree(self, degree: int) -> None:
        """Compensate for another degree."""


def check_degree(degree: int, degrees: Sequence[int]) -> None:
    """Raise a ValueError unless `degree` is one of those that a dial offers."""
    if isinstance(degree, bool) or degree not in degrees:
        raise ValueError(f"degree must be an integer in [0, {degrees[-1]}], got {degree!r}.")


def run_by_degree(
    run: Callable[[Tensor, int], Tensor], images: Tensor, degrees: Sequence[int]
) -> Tensor:
    """Run the images of each degree together, and return the outputs in the order of the images.

    Args:
        run: Computes the outputs of some images at one degree.
        images: At least one image.
        degrees: The degree of each image.
    """
    rows = {d: [i for i, own in enumerate(degrees) if own == d] for d in sorted(set(degrees))}
    parts = [run(images[some], degree) for degree, some in rows.items()]
    order = torch.tensor([i for some in rows.values() for i in some], device=images.device)
    return torch.cat(parts)[order.argsort()]
