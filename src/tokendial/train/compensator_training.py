"""Training of compensators: one frozen model is teacher at one degree and student at another."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.layers.drop import DropPath
from torch import Tensor, nn

from tokendial.compensate import Attachment, Compensator
from tokendial.compensate.distillation import binary_distillation, soft_distillation
from tokendial.data.splits import Splits
from tokendial.model.dial_vit import DialViT
from tokendial.model.wrap import wrap
from tokendial.runs.loaders import seed_all
from tokendial.runs.recipe import CompensateRecipe
from tokendial.runs.run import Run
from tokendial.tasks.classification import Classification
from tokendial.train.loop import Trainer


def compensate(recipe: CompensateRecipe, *, quiet: bool = False) -> Run:
    """Train a compensator by a recipe. An interrupted run is resumed, with bit-identical results.

    Args:
        recipe: The recipe. Its `output` is the folder of the run.
        quiet: Whether to print nothing.

    Returns:
        The run. Its folder holds recipe.yaml, metrics.jsonl, checkpoints/, logs/, best/ and last/
        (saved compensators).

    Raises:
        ValueError: If the recipe does not fit the data or the model, the folder holds another
            run, or another process trains this one.
        InterruptedRunError: If a signal asked the process to stop.
    """
    return Trainer(recipe, CompensatorTraining(recipe), quiet=quiet).run_to_end()


class SelfDistillation(nn.Module):
    """The objective: one frozen model runs at two degrees, as teacher and as student.

    The teacher runs at the source degree, where the compensator does nothing. The student runs at
    the target degree with the compensator, whose weights are the only ones that are trained.
    """

    def __init__(
        self,
        model: DialViT,
        compensator: Compensator,
        recipe: CompensateRecipe,
        task: Classification,
    ) -> None:
        """Freeze the model and attach the compensator.

        Args:
            model: The pre-trained model.
            compensator: The compensator to train.
            recipe: Its `loss`, `temperature` and `mean_over` choose the loss.
            task: Gives the loss where labels are the targets.
        """
        super().__init__()
        self.model, self.compensator, self.recipe = model.requires_grad_(False), compensator, recipe
        self.task = task
        self.independent_labels = recipe.loss == "binary_distillation" or (
            recipe.loss == "classification" and task.multi_label
        )
        """Whether the head is multi-label: each output is an independent sigmoid, no softmax."""
        self.compares_features = recipe.loss in ("features", "feature_map")
        """Whether student and teacher are compared by features instead of logits."""
        self.pair = (0, compensator.steps)
        """The source degree (teacher) and the target degree (student) of the next forward."""
        self._drop_paths = [part for part in model.modules() if isinstance(part, DropPath)]
        model.set_degree(0)
        compensator.attach(model, source=0, merge=False)

    def train(self, mode: bool = True) -> "SelfDistillation":
        """Put the compensator (its dropout) into training mode; the model stays in evaluation mode.

        Stochastic depth of the model acts in the student's passes only; see `student`.
        """
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and for each image the agreement of student and teacher, in [0, 1]."""
        source, target = self.pair
        if self.recipe.loss == "classification":
            student = self.student(images, source, target)
            return self.task.loss(student, targets), self.agreement(student, targets)
        teacher = self.teacher(images, source)
        student = self.student(images, source, target)
        return self.mismatch(student, teacher), self.agreement(student, teacher)

    def mismatch(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distillation loss between the outputs of student and teacher."""
        recipe = self.recipe
        if self.compares_features:
            return F.l1_loss(student.float(), teacher.float())
        if self.independent_labels:
            return binary_distillation(student, teacher, temperature=recipe.temperature)
        return soft_distillation(
            student, teacher, temperature=recipe.temperature, mean_over=recipe.mean_over
        )

    @torch.no_grad()
    def teacher(self, images: Tensor, source: int) -> Tensor:
        """Logits (or features) at the source degree, where the compensator does nothing."""
        return self._run(images, source, source)

    def student(self, images: Tensor, source: int, target: int) -> Tensor:
        """Logits (or features) at the target degree, compensated from the source degree."""
        for part in self._drop_paths:
            part.train(self.training)
        try:
            return self._run(images, source, target)
        finally:
            for part in self._drop_paths:
                part.eval()

    def _run(self, images: Tensor, source: int, degree: int) -> Tensor:
        attachment = self.model.compensation
        assert isinstance(attachment, Attachment)
        attachment.source = source
        self.model.set_degree(degree)
        if self.recipe.loss == "feature_map":
            return self.model.feature_map(images)
        logits: Tensor = self.model(images)
        return logits

    def agreement(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Agreement of student and teacher for each image, in [0, 1] (cosines in [-1, 1]).

        For softmax outputs: whether the most probable class is the same. For sigmoid outputs: the
        fraction of equal labels. For features: their cosine similarity.

        Args:
            student: Outputs of the student.
            teacher: Outputs of the teacher, or the targets: class indices, or one number per class.
        """
        if self.compares_features:
            cosine = F.cosine_similarity(student.float(), teacher.float(), dim=1)
            return cosine.reshape(len(cosine), -1).mean(1)
        if self.independent_labels:
            return ((student > 0) == (teacher > 0)).float().mean(dim=1)
        expected = teacher.argmax(dim=1) if teacher.is_floating_point() else teacher
        return (student.argmax(dim=1) == expected).float()


class CompensatorTraining:
    """The job of training a compensator on a frozen pre-trained model."""

    score_name = "agreement"
    passes = 1

    def __init__(self, recipe: CompensateRecipe) -> None:
        """Load data and model, and make a new compensator.

        Raises:
            ValueError: If the recipe does not fit the data or the model.
        """
        self.recipe = recipe
        self.data: Splits = recipe.data.build(recipe.seed)
        model = pretrained_model(recipe)
        self.anatomy = model.anatomy
        if self.data.video or self.anatomy.frames is not None:
            raise ValueError("compensators are trained on images: data and model must be of these.")
        self._check_loss(model)
        seed_all(recipe.seed)
        self.module = Compensator.for_model(model, recipe.compensate, recipe.steps)
        self.task = Classification(
            # Mixup needs a number of classes even if neither images nor model have any.
            len(self.data.classes) or model.num_classes or 1,
            multi_label=self.data.multi_label,
            augment=recipe.augment,
        )
        self.objective = SelfDistillation(model, self.module, recipe, self.task)

    def _check_loss(self, model: DialViT) -> None:
        """Raise a ValueError if the recipe's loss does not fit the head or the labels."""
        loss, head = self.recipe.loss, model.num_classes
        if loss != "feature_map" and (loss == "features") != (head == 0):
            allowed = "features or feature_map" if head == 0 else "one of the others"
            raise ValueError(
                f"loss must be {allowed} for a model with a head of {head} classes, got {loss}."
            )
        if loss == "classification" and len(self.data.classes) != head:
            raise ValueError(
                f"loss classification needs labels of the model's {head} classes, but the data "
                f"have {len(self.data.classes)}."
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The compensator's weights, all with weight decay."""
        settings = self.recipe.train
        parameters = list(self.module.parameters())
        return [{"params": parameters, "weight_decay": settings.weight_decay, "lr": settings.lr}]

    def before_update(self, update: int, updates_per_epoch: int) -> None:
        """Draw the source and target degree of the update; all processes draw the same."""
        draw = np.random.default_rng((self.recipe.seed, update))
        source, target = draw.choice(self.module.steps + 1, size=2, replace=False).tolist()
        if self.recipe.loss == "classification":
            source, target = 0, target or source
        self.objective.pair = (source, target)

    def before_pass(self, number: int) -> None:
        """Nothing to prepare: an update has one pass."""

    def augment_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix, if the recipe asks for them."""
        return self.task.mix_batch(images, targets)

    def batch_score(self, outputs: Tensor, targets: Tensor) -> float:
        """Mean agreement of student and teacher; `outputs` holds that of each image."""
        return float(outputs.mean())

    @torch.no_grad()
    def validation_scores(
        self, loader: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator
    ) -> dict[str, float]:
        """Agreement and loss between degree 0 and the highest degree, with and without compensator.

        Without it means: the plain model at the highest degree in place of the student.
        """
        objective, steps = self.objective.eval(), self.module.steps
        sums = torch.zeros(5, device=accelerator.device)
        for batch in loader:
            images = batch[0].to(accelerator.device)
            with accelerator.autocast():
                teacher = objective.teacher(images, 0)
                compensated = objective.student(images, 0, steps)
                plain = objective.teacher(images, steps)
            students = (compensated, plain)
            batch_sums = [objective.agreement(student, teacher).sum() for student in students]
            batch_sums += [
                objective.mismatch(student, teacher) * len(images) for student in students
            ]
            count = batch_sums[0].new_tensor(len(images))
            sums += torch.stack([*batch_sums, count])
        *totals, num_images = accelerator.reduce(sums, "sum").tolist()
        names = ("agreement", "agreement_without", "mismatch", "mismatch_without")
        return {name: total / num_images for name, total in zip(names, totals, strict=True)}

    def save(self, folder: Path) -> None:
        """Save the compensator."""
        self.module.save_pretrained(folder)


def pretrained_model(recipe: CompensateRecipe) -> DialViT:
    """The pre-trained model of a recipe with its own head, wrapped with the reduction method."""
    backbone = recipe.model.backbone(None)
    if "num_classes" not in backbone.args and (size := backbone.head_size()) is not None:
        backbone = replace(backbone, args=dict(backbone.args) | {"num_classes": size})
    return wrap(backbone.create(), reduce=recipe.reduce, backbone=backbone)
