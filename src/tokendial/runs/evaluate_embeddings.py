"""Evaluation of embeddings along the dial: how far they are from degree 0, cost and speed."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tokendial.data.readers.images import ImageError
from tokendial.measure.neighbours import MIN_IMAGES, embedding_scores
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.device import default_device
from tokendial.runs.evaluate import (
    DegreeRow,
    ProgressCallback,
    StepCounter,
    no_progress,
    time_degrees,
)
from tokendial.runs.inputs import ImageReader
from tokendial.runs.model_source import ModelSource
from tokendial.runs.predict import Source


def evaluate_embeddings(
    source: ModelSource,
    images: Sequence[Source],
    degrees: str = "all",
    *,
    labels: Sequence[str] | None = None,
    reduce: ReducerConfig | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: ProgressCallback = no_progress,
) -> list[DegreeRow]:
    """Compare the embeddings of a model at several degrees with those at degree 0.

    The scores of each degree are those of `tokendial.measure.neighbours.embedding_scores`.

    Args:
        source: Where the model comes from: a run, a saved model, or a backbone by its name.
        images: Image files and images in shards, at least 3. Of few images, fewer neighbours are
            compared and vote.
        degrees: Degrees as text, such as "0,4,8", "all" or "every"; see `parse_degrees`.
        labels: Class of each image. None: the images have no classes.
        reduce: Reduction method in place of the model's own one. None keeps that.
        batch_size: Images per forward pass.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        progress: Called after each batch.

    Returns:
        One row per degree, in the order of `degrees`.

    Raises:
        ValueError: If there is no such model, a degree is not offered, an image cannot be read, or
            there are too few images or another number of labels.
    """
    if len(images) < MIN_IMAGES:
        raise ValueError(f"images must be at least {MIN_IMAGES}, got {len(images)}.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must be {len(images)}, one for each image, got {len(labels)}.")
    opened = source.open(reduce)
    model = opened.model.to(device or default_device())
    wanted = degrees_to_show(model, degrees)
    read = ImageReader(opened.transform, opened.value_range)
    counter = StepCounter(progress, -(-len(images) // batch_size))
    counter.text = "batches"
    found: defaultdict[int, list[Tensor]] = defaultdict(list)
    first = torch.empty(0)
    for start in range(0, len(images), batch_size):
        batch = torch.stack(
            [_readable(read(image)) for image in images[start : start + batch_size]]
        )
        first = first if len(first) else batch
        for degree in {0, *wanted}:
            model.set_degree(degree)
            with torch.no_grad():
                embeddings = model.embeddings(batch.to(next(model.parameters()).device))
            found[degree].append(embeddings.float().cpu())
        counter.step()
    by_degree = {degree: torch.cat(parts) for degree, parts in found.items()}
    classes = None
    if labels is not None:
        numbers = {name: number for number, name in enumerate(sorted(set(labels)))}
        classes = torch.tensor([numbers[name] for name in labels])
    counter.show(f"measuring the speed of {len(wanted)} degrees in turns")
    timings = time_degrees(model, first, wanted)
    rows = []
    for degree, timing in zip(wanted, timings, strict=True):
        cost = model.cost(degree)
        rows.append(
            DegreeRow(
                degree=degree,
                scores=embedding_scores(by_degree[degree], by_degree[0], classes),
                gmacs=cost.gmacs,
                images_per_s=len(first) / timing.seconds,
                speedup=timings[0].seconds / timing.seconds,
                timing=timing,
                tokens=cost.tokens_per_layer[-1],
                share=None,
                confusion=None,
            )
        )
    return rows


def _readable(entry: Tensor | ImageError) -> Tensor:
    if isinstance(entry, ImageError):
        raise entry
    return entry


def labels_by_folder(images: Sequence[Source]) -> list[str] | None:
    """Class of each image by the folder that it lies in; None unless there are several classes.

    Images of shards have no classes.
    """
    folders = [getattr(image, "parent", None) for image in images]
    if None in folders or len(set(folders)) < 2:
        return None
    return list(map(str, folders))
