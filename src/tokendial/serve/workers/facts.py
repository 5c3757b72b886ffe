"""What is known of served models besides their weights: how images go in, and what logits say."""

import dataclasses
import hashlib
from collections.abc import Mapping
from io import BytesIO
from typing import Literal

from PIL import Image
from torch import Tensor

from tokendial.data.readers.pixels import ValueRange
from tokendial.data.transforms.image import Transform
from tokendial.model.files import CONFIG, WEIGHTS
from tokendial.runs.mask_images import mask_image, mask_share
from tokendial.runs.run import Run
from tokendial.tasks import BinaryMasks, Classification, Segmentation

ServedTask = Classification | BinaryMasks | Segmentation


@dataclasses.dataclass(frozen=True, slots=True)
class Classes:
    """Classes of an image, most probable first."""

    names: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Mask:
    """The mask of an image, of its size."""

    png: bytes
    """Probabilities as grey levels, or class indices with a palette."""
    share: float
    """Share of the pixels that lie inside, or that are of any class but the first."""


@dataclasses.dataclass(frozen=True, slots=True)
class TaskOf:
    """What one name stands for."""

    task: ServedTask
    classes: tuple[str, ...]
    transform: Transform
    adapter: str
    """Its name in the model."""
    revision: str
    """Begins the hash of its weights and configuration."""
    gmacs: Mapping[int, float]
    """Multiply-accumulates of an image at each degree, in 1e9."""
    accuracy: Mapping[int, float]
    """At the degrees where `tokendial eval` has measured it."""
    value_range: ValueRange
    """What is black and white in images of more than 8 bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """Several models that share a backbone and the degrees of a dial; for any thread."""

    tasks: Mapping[str, TaskOf]
    """What each name stands for; the first one is the default."""
    degrees: tuple[int, ...]
    """Degrees of the dial, as far as a compensator reaches; of a long dial about ten, evenly spaced
    in cost."""
    input_shape: tuple[int, ...]
    """Of an image as the models take it, [3, H, W]."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models."""
        return tuple(self.tasks)

    def ladder(self, max_degree: int | None, min_accuracy: float | None) -> tuple[int, ...]:
        """Degrees that the controller may use.

        Args:
            max_degree: The last of them; None: any.
            min_accuracy: The least accuracy, as `tokendial eval` found it, of every model.

        Raises:
            ValueError: If there is no such degree, or accuracies are not known.
        """
        last = self.degrees[-1]
        if max_degree is not None and not 0 <= max_degree <= last:
            raise ValueError(f"max_degree must lie in [0, {last}], got {max_degree}.")
        allowed = [d for d in self.degrees if max_degree is None or d <= max_degree]
        if min_accuracy is None:
            return tuple(allowed)
        for name, task in self.tasks.items():
            if missing := [degree for degree in allowed if degree not in task.accuracy]:
                raise ValueError(
                    f"min_accuracy needs the accuracy of {name} at degree {missing[0]}: run "
                    "`tokendial eval` on it first."
                )
            allowed = [degree for degree in allowed if task.accuracy[degree] >= min_accuracy]
        if not allowed:
            raise ValueError(f"min_accuracy: no degree reaches {min_accuracy:g}.")
        return tuple(allowed)

    def prepare(self, name: str, image: Image.Image) -> Tensor:
        """What the model sees of an RGB image, [3, H, W]."""
        return self.tasks[name].transform(image)

    def answer(
        self, name: str, logits: Tensor, size: tuple[int, int], top: int = 5
    ) -> Classes | Mask:
        """What logits say.

        Args:
            name: Of the model.
            logits: Of an image, as `run` gives them.
            size: Height and width of the image.
            top: How many classes to name, if there are as many.
        """
        of = self.tasks[name]
        if not isinstance(of.task, Classification):
            return mask_of(of, logits, size)
        likely = of.task.probabilities(logits.unsqueeze(0))[0]
        values, indices = likely.topk(min(top, len(of.classes)))
        names = tuple(of.classes[index] for index in indices.tolist())
        return Classes(names, tuple(values.tolist()))

    def kind(self, name: str) -> Literal["classes", "masks"]:
        """What it gives."""
        return "classes" if isinstance(self.tasks[name].task, Classification) else "masks"

    def revision(self, name: str) -> str:
        """Begins the hash of its weights and configuration."""
        return self.tasks[name].revision

    def classes(self, name: str) -> tuple[str, ...]:
        """Names of its classes."""
        return self.tasks[name].classes

    def gmacs(self, name: str, degree: int) -> float:
        """Multiply-accumulates of an image, in 1e9."""
        return self.tasks[name].gmacs[degree]

    def accuracy(self, name: str, degree: int) -> float | None:
        """As `tokendial eval` measured it last; None: it did not."""
        return self.tasks[name].accuracy.get(degree)


def mask_of(of: TaskOf, logits: Tensor, size: tuple[int, int]) -> Mask:
    """What the logits [K, h, w] of a task of masks say, at the size of the image."""
    if isinstance(of.task, Classification):
        raise ValueError("of must be a task of masks, got one of classes.")
    mask = mask_image(of.task, logits, size)
    return Mask(_png(mask), mask_share(of.task, mask))


def revision_of(run: Run) -> str:
    """Begins the hash of a run's weights and configuration; a ValueError if it has none yet."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        path = run.best / name
        if not path.is_file():
            raise ValueError(f"{run.folder} has no finished epoch yet, so there is no model.")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
