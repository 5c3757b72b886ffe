"""Description of the served models without their weights: tasks, classes, degrees, costs."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from tokendial.cascade import CascadeStages
from tokendial.data.readers.pixels import ValueRange
from tokendial.data.transforms.image import Transform
from tokendial.tasks import BinaryMasks, Classification, Embeddings, Segmentation

ServedTask = Classification | BinaryMasks | Segmentation | Embeddings
AnswerKind = Literal["classes", "masks", "embeddings"]
"""What a model gives for an image."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """Description of one served model."""

    task: ServedTask
    """What the model was trained for."""
    classes: tuple[str, ...]
    """Names of its classes, in the order of its logits."""
    transform: Transform
    """Turns an RGB image into the normalised input of the model, [3, H, W]."""
    adapter: str
    """Name of its adapter in the shared `DialViT`."""
    revision: str
    """First 12 characters of a hash of its weights and configuration."""
    gmacs: Mapping[int, float]
    """Multiply-accumulates of one image at each degree, in 1e9."""
    accuracy: Mapping[int, float]
    """Accuracy at the degrees that `tokendial eval` has measured."""
    value_range: ValueRange
    """Values of black and white in images of more than 8 bits."""
    cascade: CascadeStages | None = None
    """When its cheap degrees are sure enough; None: an image gets one answer."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCatalog:
    """Description of all served models; they share a backbone and the degrees of the dial."""

    models: Mapping[str, ServedModel]
    """The models by name. The first one is the default."""
    degrees: tuple[int, ...]
    """Degrees of the dial, as far as the compensator reaches. Of a long dial, about ten degrees
    that are evenly spaced in cost."""
    input_shape: tuple[int, ...]
    """Shape of a model's input for one image, [3, H, W]."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(self.models)

    def allowed_degrees(
        self, max_degree: int | None, min_accuracy: float | None
    ) -> tuple[int, ...]:
        """Degrees that the server may use.

        Args:
            max_degree: Highest degree; None: no limit.
            min_accuracy: Lowest accuracy, as measured by `tokendial eval`, of every model; None:
                no limit.

        Raises:
            ValueError: If there is no such degree, or accuracies are needed and not known.
        """
        last = self.degrees[-1]
        if max_degree is not None and not 0 <= max_degree <= last:
            raise ValueError(f"max_degree must lie in [0, {last}], got {max_degree}.")
        allowed = [d for d in self.degrees if max_degree is None or d <= max_degree]
        if min_accuracy is None:
            return tuple(allowed)
        for name, model in self.models.items():
            if missing := [degree for degree in allowed if degree not in model.accuracy]:
                raise ValueError(
                    f"min_accuracy needs the accuracy of {name} at degree {missing[0]}: run "
                    "`tokendial eval` on it first."
                )
            allowed = [degree for degree in allowed if model.accuracy[degree] >= min_accuracy]
        if not allowed:
            raise ValueError(f"min_accuracy: no degree reaches {min_accuracy:g}.")
        return tuple(allowed)

    def likely_classes(self, name: str, logits: Tensor, top: int) -> list[tuple[str, float]]:
        """Names and probabilities of the `top` most probable classes, most probable first.

        Args:
            name: Name of a model that classifies.
            logits: Logits of one image, [K].
            top: Number of classes; fewer if the model has fewer.

        Raises:
            ValueError: If the model does not classify.
        """
        model = self.models[name]
        if not isinstance(model.task, Classification):
            raise ValueError(f"{name} gives {self.kind(name)}, not classes.")
        probabilities = model.task.probabilities(logits.unsqueeze(0))[0]
        values, indices = probabilities.topk(min(top, len(model.classes)))
        names = [model.classes[index] for index in indices.tolist()]
        return list(zip(names, values.tolist(), strict=True))

    def kind(self, name: str) -> AnswerKind:
        """What a model gives for an image."""
        match self.models[name].task:
            case Classification():
                return "classes"
            case Embeddings():
                return "embeddings"
            case _:
                return "masks"

    def accuracy(self, name: str, degree: int) -> float | None:
        """Accuracy that `tokendial eval` measured last; None if it was not run."""
        return self.models[name].accuracy.get(degree)
