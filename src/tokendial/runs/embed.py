"""Embeddings of images: pooled features or feature maps, by the model of a run or any other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor

from tokendial.checks import check_choice, check_count
from tokendial.data.readers.images import ImageError
from tokendial.model.dial import InferenceModel
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.device import default_device
from tokendial.runs.inputs import ImageReader
from tokendial.runs.model_source import ModelSource
from tokendial.runs.on_ray import answers_on_ray, check_ray
from tokendial.runs.predict import Source
from tokendial.runs.training_images import calibration_images
from tokendial.runtimes import Runtime
from tokendial.runtimes.config import RuntimeName, RuntimePrecision
from tokendial.tune import DTYPES

Features = Literal["pooled", "mean", "map"]
"""What an embedding is. pooled: what the head reads, or what a model without a head gives. mean:
the mean of the feature map over all positions. map: the feature map, restored to every position."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding of one image."""

    path: str
    """Path of the image file. For an image in a shard, the shard and the sample."""
    values: Tensor
    """Features in float32 on the CPU: [D], or [D, rows, columns] for a feature map."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedSettings:
    """How images are embedded."""

    degree: int | None = None
    """Degree of the dial. None means the degree that the model was saved at."""
    reduce: ReducerConfig | None = None
    """Reduction method in place of the model's own one. None keeps that."""
    features: Features = "pooled"
    """What an embedding is: pooled for what the head reads (what a model without a head gives),
    mean for the mean of the feature map, map for the feature map."""
    batch_size: int = 32
    """Images per forward pass."""
    precision: RuntimePrecision = "fp32"
    """Format of weights and activations; see `Runtime`."""
    runtime: RuntimeName = "torch"
    """Program that computes the model; see `Runtime`."""

    def __post_init__(self) -> None:
        check_choice("features", self.features, get_args(Features))
        Runtime(self.runtime, self.precision)  # raises if the runtime does not have the precision
        if self.runtime != "torch" and self.features != "pooled":
            raise ValueError(f"features must be pooled in {self.runtime}, got {self.features}.")
        check_count("batch_size", self.batch_size)


class Embedder:
    """Embeds images with one model."""

    def __init__(
        self, source: ModelSource, settings: EmbedSettings, *, device: str | None = None
    ) -> None:
        """Load the model. The arguments are those of `embed`.

        Raises:
            ValueError: If there is no such model, or a setting does not fit it.
        """
        self.settings = settings
        opened = source.open(settings.reduce)
        self.model = opened.model
        if settings.degree is not None:
            self.model.set_degree(settings.degree)
        self.device = device or default_device()
        self.dtype = torch.float32
        if settings.runtime == "torch":
            self.dtype = DTYPES[settings.precision]
        self.model.to(self.device, self.dtype)
        self._read = ImageReader(opened.transform, opened.value_range)
        self._started: InferenceModel | None = None
        self._run = opened.run
        self.needs_images = (
            settings.runtime in ("openvino", "auto")
            and settings.precision == "int8"
            and opened.run is None
        )
        """Whether the runtime starts with the first batch: no run has images to calibrate on."""
        if settings.runtime != "torch" and not self.needs_images:
            shape = settings.batch_size, *self.model.anatomy.input_shape
            self._started = self._start(torch.zeros(shape, device=self.device))

    @torch.no_grad()
    def __call__(self, sources: Sequence[Source]) -> list[Embedding | ImageError]:
        """Embed a batch: one answer per source, in their order."""
        inputs = [self._read(source) for source in sources]
        readable = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
        rows = iter(self._embed(torch.stack(readable)) if readable else ())
        return [
            # A copy: a row of the batch would keep the whole batch in memory.
            Embedding(str(source), next(rows).clone()) if isinstance(entry, Tensor) else entry
            for source, entry in zip(sources, inputs, strict=True)
        ]

    def _start(self, images: Tensor) -> InferenceModel:
        """The model in another runtime than PyTorch, for batches like `images`."""
        run = self._run
        return Runtime(self.settings.runtime, self.settings.precision).start(
            self.model,
            images,
            degrees=[self.model.degree],
            folder=run.runtime_folder if run else None,
            calibration=partial(calibration_images, run) if run else None,
        )

    def _embed(self, images: Tensor) -> Tensor:
        images = images.to(self.device, self.dtype)
        features = self.settings.features
        if self.settings.runtime != "torch":
            if self._started is None:
                self._started = self._start(images)
            return self._started.logits_and_embeddings(images)[1].float().cpu()
        if features == "pooled":
            return self.model.embeddings(images).float().cpu()
        maps = self.model.feature_map(images).float()
        return (maps.mean(dim=(2, 3)) if features == "mean" else maps).cpu()


def embed(
    source: ModelSource,
    images: Iterable[Source],
    settings: EmbedSettings | None = None,
    *,
    device: str | None = None,
    ray: bool = False,
) -> Iterator[Embedding | ImageError]:
    """Embed images, one answer per image, in their order.

    A file that cannot be read does not end it: its answer is the error.

    Args:
        source: Where the model comes from: a run, a saved model, or a backbone by its name.
        images: Image files and images in shards.
        settings: Degree, features, batch size and precision. None means the defaults.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        ray: Whether to use all GPUs (or CPUs) of a Ray cluster, as `predict_on_ray` does. Every
            machine must find the model and the images under the same paths.

    Raises:
        ValueError: If there is no such model, a setting does not fit it, or Ray is missing.

    Example:
        >>> from tokendial.runs.model_source import ModelSource
        >>> source = ModelSource(name="scenes_vit", weights="shipped")
        >>> list(embed(source, []))
        []
    """
    settings = settings or EmbedSettings()
    if ray:
        check_ray()
        # Loading the model here raises errors in one line, before any worker starts.
        embedder = Embedder(source, settings, device="cpu")
        if embedder.needs_images:
            raise ValueError(
                "int8 in openvino needs a run here: each process of Ray would calibrate other "
                f"images than the next, and {source.name} is no run."
            )
        arguments = {"source": source.absolute(), "settings": settings}
        yield from answers_on_ray(Embedder, arguments, images, settings.batch_size)
        return
    embedder, remaining = Embedder(source, settings, device=device), iter(images)
    while batch := list(islice(remaining, settings.batch_size)):
        yield from embedder(batch)
