"""Training a compensator: the model at one degree teaches itself at another."""

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
from tokendial.model.dial_vit import DialViT, wrap
from tokendial.runs.loaders import seed_all
from tokendial.runs.recipe import CompensateRecipe
from tokendial.runs.run import Run
from tokendial.tasks.classification import Classification
from tokendial.train.loop import Trainer


def compensate(recipe: CompensateRecipe, *, quiet: bool = False) -> Run:
    """Train a compensator; go on where a killed run of the same recipe stopped.

    Returns:
        The run's folder: recipe.yaml, metrics.jsonl, checkpoints/, logs/, best/ and last/
        (saved compensators).

    Raises:
        ValueError: If the recipe does not fit the data or the model, the folder holds another
            run, or another process trains it.
        InterruptedRunError: If the process was asked to stop.
    """
    return Trainer(recipe, Compensating(recipe), quiet=quiet).run_to_end()


class SelfDistillation(nn.Module):
    """One pass of the teacher and one of the student: the same frozen model at two degrees."""

    def __init__(
        self,
        model: DialViT,
        plugin: Compensator,
        recipe: CompensateRecipe,
        task: Classification,
    ) -> None:
        super().__init__()
        self.model, self.plugin, self.recipe = model.requires_grad_(False), plugin, recipe
        self.task = task
        self.by_label = recipe.loss == "binary_distillation" or (
            recipe.loss == "classification" and task.multi_label
        )
        """Whether the answers of the head do not exclude each other."""
        self.of_features = recipe.loss in ("features", "feature_map")
        self.pair = (0, plugin.steps)
        """Source, the teacher's degree, and target, the student's."""
        self._drop_paths = [part for part in model.modules() if isinstance(part, DropPath)]
        model.set_degree(0)
        plugin.attach(model, source=0, merge=False)

    def train(self, mode: bool = True) -> "SelfDistillation":
        """Stochastic depth and the plugin's dropout act; all else is as at inference."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and for each image how right the student is, in [0, 1]."""
        source, target = self.pair
        recipe = self.recipe
        if recipe.loss == "classification":
            student = self.student(images, source, target)
            return self.task.loss(student, targets), self.agreement(student, targets)
        teacher = self.teacher(images, source)
        student = self.student(images, source, target)
        return self.mismatch(student, teacher), self.agreement(student, teacher)

    def mismatch(self, student: Tensor, teacher: Tensor) -> Tensor:
        """How far the student is from the teacher; minimised, unless labels teach."""
        recipe = self.recipe
        if self.of_features:
            return F.l1_loss(student.float(), teacher.float())
        if self.by_label:
            return binary_distillation(student, teacher, temperature=recipe.temperature)
        return soft_distillation(
            student, teacher, temperature=recipe.temperature, mean_over=recipe.mean_over
        )

    @torch.no_grad()
    def teacher(self, images: Tensor, source: int) -> Tensor:
        """Logits (or features) at the source, where the plugin does nothing."""
        return self._run(images, source, source)

    def student(self, images: Tensor, source: int, target: int) -> Tensor:
        """Logits (or features) at the target, bridged from the source."""
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
        """For each image: whether both name the same class, the share of labels, or the cosine.

        The teacher may be the targets themselves: indices, or a number for each class.
        """
        if self.of_features:
            cosine = F.cosine_similarity(student.float(), teacher.float(), dim=1)
            return cosine.reshape(len(cosine), -1).mean(1)
        if self.by_label:
            return ((student > 0) == (teacher > 0)).float().mean(dim=1)
        named = teacher.argmax(dim=1) if teacher.is_floating_point() else teacher
        return (student.argmax(dim=1) == named).float()


class Compensating:
    """The job of `compensate`."""

    shows = "agreement"

    def __init__(self, recipe: CompensateRecipe) -> None:
        self.recipe = recipe
        self.data: Splits = recipe.data.build(recipe.seed)
        model = pretrained_model(recipe)
        self.anatomy = model.anatomy
        if self.data.video or self.anatomy.frames is not None:
            raise ValueError("compensators are trained on images: data and model must be of these.")
        self._check(model)
        seed_all(recipe.seed)
        self.module = Compensator.for_model(model, recipe.compensate, recipe.steps)
        self.task = Classification(
            # Mixup asks for a class, also where nothing has any: neither images nor the model.
            len(self.data.classes) or model.num_classes or 1,
            multi_label=self.data.multi_label,
            augment=recipe.augment,
        )
        self.objective = SelfDistillation(model, self.module, recipe, self.task)

    def _check(self, model: DialViT) -> None:
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
        """The plugin's matrices."""
        settings = self.recipe.train
        parameters = list(self.module.parameters())
        return [{"params": parameters, "weight_decay": settings.weight_decay, "lr": settings.lr}]

    def before_update(self, update: int, updates_per_epoch: int) -> None:
        """Draw the two degrees of this update; all processes draw the same."""
        draw = np.random.default_rng((self.recipe.seed, update))
        source, target = draw.choice(self.module.steps + 1, size=2, replace=False).tolist()
        if self.recipe.loss == "classification":
            source, target = 0, target or source
        self.objective.pair = (source, target)

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix."""
        return self.task.mixed(images, targets)

    def hits(self, outputs: Tensor, targets: Tensor) -> float:
        """How right the student was."""
        return float(outputs.mean())

    @torch.no_grad()
    def scores(
        self, loader: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator
    ) -> dict[str, float]:
        """Agreement at the highest degree with the model at degree 0, and how far they are apart.

        Both with and without the plugin.
        """
        objective, steps = self.objective.eval(), self.module.steps
        sums = torch.zeros(5, device=accelerator.device)
        for batch in loader:
            images = batch[0].to(accelerator.device)
            with accelerator.autocast():
                teacher = objective.teacher(images, 0)
                bridged = objective.student(images, 0, steps)
                plain = objective.teacher(images, steps)
            found = [objective.agreement(student, teacher).sum() for student in (bridged, plain)]
            found += [
                objective.mismatch(student, teacher) * len(images) for student in (bridged, plain)
            ]
            sums += torch.stack([*found, found[0].new_tensor(len(images))])
        *totals, count = accelerator.reduce(sums, "sum").tolist()
        names = ("agreement", "agreement_without", "mismatch", "mismatch_without")
        return {name: total / count for name, total in zip(names, totals, strict=True)}

    def save(self, folder: Path) -> None:
        """Write the compensator."""
        self.module.save_pretrained(folder)


def pretrained_model(recipe: CompensateRecipe) -> DialViT:
    """The pre-trained model of a recipe with its own head, wrapped with the reduction."""
    backbone = recipe.model.backbone(None)
    if "num_classes" not in backbone.args and (size := backbone.head_size()) is not None:
        backbone = replace(backbone, args=dict(backbone.args) | {"num_classes": size})
    return wrap(backbone.create(), reduce=recipe.reduce, backbone=backbone)
