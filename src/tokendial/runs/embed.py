"""Embeddings of images: pooled features or feature maps, by the model of a run or any other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokendial.checks import check_choice, check_count
from tokendial.data.readers.images import ImageError
from tokendial.model.dial import InferenceModel
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.device import default_device
from tokendial.runs.embed_whole import WholeModel
from tokendial.runs.image_model import is_image_model
from tokendial.runs.inputs import ImageReader
from tokendial.runs.model_source import ModelSource
from tokendial.runs.on_ray import answers_on_ray, check_ray
from tokendial.runs.predict import Source
from tokendial.runs.run import Run
from tokendial.runs.started_runtime import start_runtime
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
        check_count("batch_size", self.batch_size)


class _DialModel:
    """A model of a run, a saved model or a backbone that embeds images."""

    def __init__(self, source: ModelSource, settings: EmbedSettings, device: str) -> None:
        self.settings = settings
        opened = source.open(settings.reduce)
        self.model = opened.model
        if settings.degree is not None:
            self.model.set_degree(settings.degree)
        self.device, self.dtype = device, _dtype(settings)
        self.model.to(self.device, self.dtype)
        self.prepare, self.value_range = opened.transform, opened.value_range
        self._started: InferenceModel = self.model
        if settings.runtime != "torch":
            self._start(settings, opened.run)

    def _start(self, settings: EmbedSettings, run: Run | None) -> None:
        """Let another runtime than PyTorch compute the model."""
        if run is None and settings.precision == "int8" and settings.runtime != "onnxruntime":
            raise ValueError(
                f"precision int8 in {settings.runtime} needs a run, on whose training images it is "
                "calibrated; this model is of no run."
            )
        shape = settings.batch_size, *self.model.anatomy.input_shape
        self._started = start_runtime(
            run,
            Runtime(settings.runtime, settings.precision),
            self.model,
            torch.zeros(shape, device=self.device),
            [self.model.degree],
            feature_map=settings.features != "pooled",
        )

    def embed(self, rows: Sequence[Tensor]) -> Tensor:
        """Embeddings of inputs [3, H, W], in float32 on the CPU."""
        images = torch.stack(list(rows)).to(self.device, self.dtype)
        features = self.settings.features
        if features == "pooled":
            if self._started is not self.model:
                return self._started.logits_and_embeddings(images)[1].float().cpu()
            return self.model.embeddings(images).float().cpu()
        maps = self._started.feature_map(images).float()
        return (maps.mean(dim=(2, 3)) if features == "mean" else maps).cpu()


class Embedder:
    """Embeds images with one model."""

    def __init__(
        self, source: ModelSource, settings: EmbedSettings, *, device: str | None = None
    ) -> None:
        """Load the model. The arguments are those of `embed`.

        Raises:
            ValueError: If there is no such model, or a setting does not fit it.
        """
        device = device or default_device()
        self._model: Any
        if is_image_model(source.name):
            self._model = _whole_model(source, settings, device)
            self._read = ImageReader(self._model.prepare, None)
        else:
            self._model = _DialModel(source, settings, device)
            self._read = ImageReader(self._model.prepare, self._model.value_range)

    @torch.no_grad()
    def __call__(self, sources: Sequence[Source]) -> list[Embedding | ImageError]:
        """Embed a batch: one answer per source, in their order."""
        inputs = [self._read(source) for source in sources]
        readable = [entry for entry in inputs if not isinstance(entry, ImageError)]
        rows = iter(self._model.embed(readable) if readable else ())
        return [
            # A copy: a row of the batch would keep the whole batch in memory.
            entry if isinstance(entry, ImageError) else Embedding(str(source), next(rows).clone())
            for source, entry in zip(sources, inputs, strict=True)
        ]


def _whole_model(source: ModelSource, settings: EmbedSettings, device: str) -> WholeModel:
    """The model of a folder of transformers or open_clip; a ValueError if settings do not fit."""
    for field, value, allowed in (
        ("features", settings.features, "pooled"),
        ("runtime", settings.runtime, "torch"),
        ("weights", source.weights, None),
        ("img_size", source.img_size, None),
    ):
        if value != allowed:
            raise ValueError(
                f"{field} must be {allowed or 'left out'} for a model of transformers or "
                f"open_clip, got {value}."
            )
    return WholeModel(
        source.name,
        reduce=settings.reduce,
        degree=settings.degree,
        device=device,
        dtype=_dtype(settings),
    )


def _dtype(settings: EmbedSettings) -> torch.dtype:
    """Format of the weights in PyTorch; other runtimes start from float32."""
    return DTYPES[settings.precision] if settings.runtime == "torch" else torch.float32


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
        Embedder(source, settings, device="cpu")
        arguments = {"source": source.absolute(), "settings": settings}
        yield from answers_on_ray(Embedder, arguments, images, settings.batch_size)
        return
    embedder, remaining = Embedder(source, settings, device=device), iter(images)
    while batch := list(islice(remaining, settings.batch_size)):
        yield from embedder(batch)
