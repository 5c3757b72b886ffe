"""A run's model as it answers new images: at one degree, or by the run's cascade."""

from pathlib import Path

import torch
from torch import Tensor

from tokendial.cascade import Cascade
from tokendial.model.dial import InferenceModel
from tokendial.runs.compensated import load_compensated
from tokendial.runs.device import default_device
from tokendial.runs.run import Run
from tokendial.runs.started_runtime import start_runtime
from tokendial.runtimes import PLAIN, Runtime


class AnsweringModel:
    """Gives logits for batches that the run's task prepared, and says which degree answered."""

    def __init__(
        self,
        run: Run,
        *,
        degree: int | None = None,
        batch_size: int = 1,
        device: str | None = None,
        runtime: Runtime = PLAIN,
        cascade: bool = False,
        compensator: str | Path | None = None,
    ) -> None:
        """Load the best model of a run.

        Args:
            run: A run with a model.
            degree: Degree of the dial. None means the degree that the model was trained at.
            batch_size: Largest number of images in one forward pass.
            device: Device to compute on. None means the accelerator if there is one, else the CPU.
            runtime: Where and how the model computes.
            cascade: Answer by the run's cascade, which `calibrate_cascade` writes, at no one
                degree.
            compensator: Folder of a compensator, which adapts the model to the degree. None:
                without.

        Raises:
            ValueError: If the run has no model, it has no cascade that fits where one is asked for,
                the compensator does not fit it, or `degree` is not offered.
        """
        self.device, self.task = device or default_device(), run.task()
        if cascade and compensator:
            raise ValueError(
                "a cascade is calibrated without a compensator: leave out one of both."
            )
        model = load_compensated(run, compensator, self.device)
        if degree is not None:
            if cascade:
                raise ValueError(f"degree cannot be combined with cascade, got {degree}.")
            model.set_degree(degree)
        self._cascade: Cascade | None = None
        if cascade:
            self._cascade = Cascade.load(
                model, run.cascade_file, revision=run.revision(), numerics=runtime.numerics
            )
        self.anatomy = model.anatomy
        example = torch.zeros(batch_size, *model.anatomy.input_shape, device=self.device)
        degrees = self._cascade.degrees if self._cascade else (model.degree,)
        self.model: InferenceModel = start_runtime(run, runtime, model, example, degrees)
        """The started model."""
        if self._cascade:
            self._cascade.model = self.model

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Logits of a batch in float32, and the degree that answered for each of its images."""
        images = images.to(self.device)
        if self._cascade:
            found = self._cascade.answer(images)
            return found.logits.float(), found.degrees
        logits = self.task.predict(self.model, images)
        return logits.float(), (self.model.degree,) * len(images)
