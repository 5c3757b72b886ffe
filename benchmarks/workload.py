"""Requests with labelled images of a run, and the accuracy of their answers."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.load import Exchange
from tokendial.runs import Run
from tokendial.tasks import BinaryMasks, Classification

_BATCH = 256
_EPS = 1e-4  # less than a grey level: probabilities of 0 and 1 have no finite logit


class Workload:
    """Images of a run's validation set, encoded in advance so that encoding is not timed."""

    def __init__(self, run: Run, images: int) -> None:
        """Read and encode the first images.

        Args:
            run: A run on images.
            images: Number of images, at most. A smaller validation set is used whole.
        """
        recipe = run.recipe()
        validation: Any = recipe.data.build(recipe.seed).val
        samples = [validation[index] for index in range(min(images, len(validation)))]
        self.images: list[Image.Image] = [image for image, _ in samples]
        self.targets = [torch.as_tensor(target).long() for _, target in samples]
        self.task, self.classes = run.task(), run.classes()
        self._encoded = [encode_image(image) for image in self.images]

    def body(self, images: Sequence[int], **fields: object) -> bytes:
        """The body of a prediction request.

        Args:
            images: Indices of the images to send.
            fields: Further fields of the request, such as `degree`.
        """
        return request_body([self._encoded[number] for number in images], **fields)

    def groups(self, each: int) -> list[range]:
        """Group all images by `each`; an incomplete last group is left out."""
        return [range(first, first + each) for first in range(0, len(self.images) - each + 1, each)]

    @property
    def top(self) -> int:
        """Number of classes to request in each answer, so that the metric can be computed."""
        return len(self.classes) if getattr(self.task, "multi_label", False) else 1

    def score(self, answers: Iterable[tuple[int, dict[str, Any]]]) -> float | None:
        """The task's main metric over pairs of an image's index and its prediction.

        None if there are no answers.
        """
        metrics, left, count = self.task.metrics(), iter(answers), 0
        while some := list(islice(left, _BATCH)):
            logits: Any = [self._logits(prediction) for _, prediction in some]
            targets: Any = [self.targets[number] for number, _ in some]
            if isinstance(self.task, Classification):  # masks may differ in size
                logits, targets = torch.stack(logits), torch.stack(targets)
            metrics.update(logits, targets)
            count += len(some)
        return float(next(iter(metrics.compute().values()))) if count else None

    def _logits(self, prediction: dict[str, Any]) -> Tensor:
        """Input of the task's metrics: [K], or maps [K, H, W]."""
        if isinstance(self.task, Classification):
            return torch.from_numpy(probabilities(prediction, self.classes))
        mask = torch.from_numpy(mask_of(prediction))
        if isinstance(self.task, BinaryMasks):
            return (mask.float() / 255).logit(_EPS).unsqueeze(0)
        return F.one_hot(mask.long(), self.task.num_classes).movedim(-1, 0).float()


def request_body(images: Sequence[str], **fields: object) -> bytes:
    """JSON body of a prediction request, with encoded images and further fields."""
    return json.dumps({"images": images, **fields}).encode()


def encode_image(image: Image.Image) -> str:
    """Encode an image as base64 of a PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def predictions(exchange: Exchange) -> list[dict[str, Any]]:
    """Predictions of an answered request, one per image, in order."""
    found: list[dict[str, Any]] = json.loads(exchange.body)["predictions"]
    return found


def probabilities(prediction: dict[str, Any], classes: Sequence[str]) -> "np.ndarray":
    """Probability of each class [K]; 0 for classes that the answer does not name."""
    by_name = {row["name"]: row["probability"] for row in prediction["classes"]}
    return np.array([by_name.get(name, 0.0) for name in classes])


def mask_of(prediction: dict[str, Any]) -> "np.ndarray":
    """Decode a mask, [H, W] in uint8: grey levels, or indices of classes."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(prediction["mask"]))))
