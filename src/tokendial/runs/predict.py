"""Prediction of classes: images or videos without labels, by the best model of a run."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from tokendial.data.readers.images import ImageError
from tokendial.data.readers.video import VideoError, VideoFile
from tokendial.data.sets.shards import ShardImage
from tokendial.runs.answering import AnsweringModel
from tokendial.runs.inputs import ImageReader
from tokendial.runs.run import Run
from tokendial.runtimes import PLAIN, Runtime
from tokendial.tasks import Classification, Embeddings, VideoClassification


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted classes of one image or video, most probable first."""

    path: str
    """Path of the image or video file. For an image in a shard, the shard and the sample."""
    classes: tuple[str, ...]
    """Names of the predicted classes, most probable first."""
    probabilities: tuple[float, ...]
    """Probability of each predicted class, in [0, 1]."""
    degree: int
    """Degree of the dial that answered."""


Source = Path | ShardImage
"""An image or video file, or an image in a shard."""
Answer = Prediction | ImageError | VideoError
"""A prediction, or the error of a file that cannot be read."""


class ClassPredictor:
    """Predicts the classes of images or videos with the best model of a run."""

    def __init__(
        self,
        run: Run,
        *,
        degree: int | None = None,
        top: int = 1,
        batch_size: int = 32,
        device: str | None = None,
        runtime: Runtime = PLAIN,
        cascade: bool = False,
        compensator: str | Path | None = None,
    ) -> None:
        """Load the model. The arguments are those of `predict`.

        Raises:
            ValueError: If the run has no model or predicts no classes, it has no cascade that fits
                where one is asked for, the compensator does not fit it, or `degree` or `top` is out
                of range.
        """
        self.classes, self.top, task = run.classes(), top, run.task()
        if isinstance(task, Embeddings):
            raise ValueError(f"{run.folder} has no classes to predict: use tokendial embed.")
        if not isinstance(task, Classification):
            raise ValueError(
                f"{run.folder} predicts masks, not classes: give a folder for them (--out)."
            )
        if not 1 <= top <= len(self.classes):
            raise ValueError(f"top must lie in [1, {len(self.classes)}] (classes), got {top}.")
        self.task = task
        self.batch_size = task.eval_batch_size(batch_size)
        """Images, or videos, in one forward pass."""
        self._answer = AnsweringModel(
            run,
            degree=degree,
            batch_size=self.batch_size,
            device=device,
            runtime=runtime,
            cascade=cascade,
            compensator=compensator,
        )
        self._transform = task.image_transform(self._answer.anatomy)
        self._takes_videos = isinstance(task, VideoClassification)
        self._read_image = ImageReader(self._transform, run.value_range())

    def __call__(self, sources: Sequence[Source]) -> list[Answer]:
        """Predict a batch: one answer per source, in their order."""
        inputs = [self._read(source) for source in sources]
        readable = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
        if not readable:
            return [entry for entry in inputs if not isinstance(entry, Tensor)]
        logits, degrees = self._answer(torch.stack(readable))
        highest = self.task.probabilities(logits).topk(self.top)
        top = iter(zip(*highest, degrees, strict=True))
        answers: list[Answer] = []
        for source, entry in zip(sources, inputs, strict=True):
            if not isinstance(entry, Tensor):
                answers.append(entry)
                continue
            probabilities, indices, degree = next(top)
            names = tuple(self.classes[index] for index in indices.tolist())
            answers.append(Prediction(str(source), names, tuple(probabilities.tolist()), degree))
        return answers

    def _read(self, source: Source) -> Tensor | ImageError | VideoError:
        """The model's input for a source, or the error if it cannot be read."""
        if isinstance(source, ShardImage) or not self._takes_videos:
            return self._read_image(source)
        try:
            return self._transform(VideoFile(source))
        except VideoError as error:
            return error


def predict(
    run: Run,
    sources: Iterable[Source],
    *,
    degree: int | None = None,
    top: int = 1,
    batch_size: int = 32,
    device: str | None = None,
    runtime: Runtime = PLAIN,
    cascade: bool = False,
    compensator: str | Path | None = None,
) -> Iterator[Answer]:
    """Predict the classes of images or videos, one answer per source, in their order.

    A file that cannot be read does not end the prediction: its answer is the error.

    Args:
        run: A run with a model.
        sources: Image files and images in shards, or video files for a run on videos.
        degree: Degree of the dial. None means the degree that the model was trained at.
        top: Number of most probable classes in each prediction.
        batch_size: Images, or views of videos, per forward pass.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        runtime: Where and how the model computes.
        cascade: Answer by the run's cascade, which `calibrate_cascade` writes, at no one degree.
        compensator: Folder of a compensator, which adapts the model to the degree. None: without.
    """
    predictor = ClassPredictor(
        run,
        degree=degree,
        top=top,
        batch_size=batch_size,
        device=device,
        runtime=runtime,
        cascade=cascade,
        compensator=compensator,
    )
    remaining = iter(sources)
    while batch := list(islice(remaining, predictor.batch_size)):
        yield from predictor(batch)
