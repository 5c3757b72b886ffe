"""A model that runs in another runtime than PyTorch, from one exported file for each degree."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.model.dial import check_degree

if TYPE_CHECKING:
    import numpy as np

Session = Callable[["np.ndarray"], Mapping[str, "np.ndarray"]]
"""Runs an exported file: images [B, 3, H, W] to its outputs by their names."""


class ExportedViT(nn.Module):
    """A model whose degrees are exported files, run by onnxruntime or OpenVINO on the CPU.

    `Runtime.start` makes it. It is called like the model and has the same dial, for the degrees
    that it was started with. It cannot be trained, and has no adapters to switch.
    """

    def __init__(self, anatomy: Anatomy, sessions: Mapping[int, Session], degree: int) -> None:
        super().__init__()
        self.anatomy = anatomy
        """The parts of the wrapped ViT."""
        self.degrees = tuple(sorted(sessions))
        """Degrees that can be set."""
        self.device = torch.device("cpu")
        """Device of the results."""
        self._sessions = sessions
        self.set_degree(degree)

    @property
    def degree(self) -> int:
        """Present degree of the dial."""
        return self._degree

    def set_degree(self, degree: int) -> None:
        """Set the degree of the dial.

        Raises:
            ValueError: If `degree` is not in `degrees`.
        """
        check_degree(degree, self.degrees)
        self._degree = degree

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the model at the present degree."""
        (logits,) = self._run(images, "logits")
        return logits

    def logits_and_embeddings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and embeddings of one pass.

        Raises:
            ValueError: If this was started with feature maps in place of embeddings.
        """
        logits, embeddings = self._run(images, "logits", "embeddings")
        return logits, embeddings

    def feature_map(self, images: Tensor) -> Tensor:
        """Return features at every patch; see `DialViT.feature_map`.

        Raises:
            ValueError: If this was started without feature maps.
        """
        (features,) = self._run(images, "feature_map")
        return features

    def _run(self, images: Tensor, *names: str) -> list[Tensor]:
        given = images.detach().cpu().float().contiguous()
        outputs = self._sessions[self.degree](given.numpy())
        if missing := [name for name in names if name not in outputs]:
            raise ValueError(
                f"{missing[0]} is not among the outputs that this was started with: "
                f"{', '.join(outputs)}."
            )
        return [torch.from_numpy(outputs[name]) for name in names]
