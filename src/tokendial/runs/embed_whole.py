"""Embeddings that whole models in folders of transformers and open_clip give, under the dial."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokendial.model.attach import attach
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.image_model import Inputs, join_by_shape, move_inputs, open_image_model


class WholeModel:
    """A model of transformers or open_clip that embeds images, as its own code does it.

    Its ViTs get a dial by `attach`, so what comes after them, such as CLIP's projection, stays.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        reduce: ReducerConfig | None,
        degree: int | None,
        device: str,
        dtype: torch.dtype,
    ) -> None:
        """Load the model.

        Args:
            folder: Its folder; see `open_image_model`.
            reduce: A reduction method without weights. None: the model runs as it is.
            degree: Degree of the dial. None: the one of `reduce`.
            device: Device to compute on.
            dtype: Format of weights and activations.

        Raises:
            ValueError: If the folder holds no such model, its ViT is not supported, the method does
                not fit it, or there is no such degree.
        """
        self._source = open_image_model(folder)
        self.device, self.dtype = device, dtype
        self._source.model.to(device, dtype)
        if reduce is not None:
            dial = attach(self._source.model, reduce)
            if degree is not None:
                dial.set_degree(degree)
        elif degree:
            raise ValueError(
                f"degree needs reduce, because {folder} has no dial of its own, got {degree}."
            )

    def prepare(self, image: Image.Image) -> Inputs:
        """Turn an RGB image into inputs of one row."""
        return self._source.prepare(image)

    def embed(self, rows: Sequence[Inputs]) -> Tensor:
        """Embed images.

        Args:
            rows: Inputs of each image. Those of one shape run together.

        Returns:
            The embeddings [B, D], in float32 on the CPU.

        Raises:
            ValueError: If the model gives no embeddings.
        """
        found: dict[int, Tensor] = {}
        for indices, inputs in join_by_shape(rows):
            outputs = self._source.outputs(
                self._source.run(move_inputs(inputs, self.device, self.dtype))
            )
            embeddings = next((o.values for o in outputs if o.kind == "embeddings"), None)
            if embeddings is None:
                raise ValueError(
                    f"{self._source.name} gives no embeddings of images; it gives "
                    f"{', '.join(output.name for output in outputs)}."
                )
            found |= zip(indices, embeddings.float().cpu(), strict=True)
        return torch.stack([found[index] for index in range(len(rows))])
