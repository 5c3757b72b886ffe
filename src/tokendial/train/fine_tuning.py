"""Fine-tuning: the job that trains adapters, heads and decoders.

On labelled data it trains for their task. On images without labels it trains a backbone without a
head to keep its embeddings when tokens are reduced.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tokendial.data.splits import (
    Splits,
    balanced_weights,
    few_per_class,
    warn_of_absent_classes,
)
from tokendial.measure import ShareMeter, calibrate
from tokendial.measure.neighbours import MIN_IMAGES
from tokendial.model.dial_vit import DialViT
from tokendial.model.loading import load
from tokendial.model.wrap import wrap
from tokendial.runs.card import write_card
from tokendial.runs.evaluate import evaluate_loader, first_images
from tokendial.runs.loaders import eval_loader
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import Recipe
from tokendial.runs.run import Run, task_of
from tokendial.tasks import FeatureDistillation
from tokendial.train.loop import Trainer
from tokendial.train.objective import Distillation, Objective
from tokendial.train.optimizer import decay_groups, parameter_groups
from tokendial.train.several_degrees import SeveralDegrees

_CALIBRATION_IMAGES = 64


def train(recipe: Recipe, *, quiet: bool = False) -> Run:
    """Fine-tune a model by a recipe. An interrupted run is resumed, with bit-identical results.

    Args:
        recipe: The recipe. Its `output` is the folder of the run.
        quiet: Whether to print nothing.

    Returns:
        The run. Its folder holds recipe.yaml, classes.json, metrics.jsonl, checkpoints/, logs/,
        best/ and last/ (saved models), versions.json and README.md (a draft of a model card).

    Raises:
        ValueError: If the recipe does not fit the data or the model, the folder holds another
            run, or another process trains this one.
        InterruptedRunError: If a signal asked the process to stop.
    """
    job = FineTuning(recipe)

    def finish(run: Run, device: torch.device) -> None:
        job.calibrate(run, device)
        write_card(run)

    return Trainer(recipe, job, quiet=quiet).run_to_end(finish)


class FineTuning:
    """The job of fine-tuning a wrapped model: on labelled data, or to keep its embeddings."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.settings = recipe, recipe.train
        self.data: Splits = recipe.data.build(recipe.seed)
        if len(self.data.classes) == 1 and not self.data.dense:
            raise ValueError(
                "data: classification needs at least 2 classes to tell apart, got 1: "
                f"{self.data.classes[0]!r}."
            )
        if (count := self.settings.images_per_class) is not None:
            self.data = few_per_class(self.data, count, recipe.seed)
        warn_of_absent_classes(self.data)
        weights = self.settings.class_weights
        self.task = task_of(
            recipe,
            len(self.data.classes),
            multi_label=self.data.multi_label,
            dense=self.data.dense,
            video=self.data.video,
            class_weights=balanced_weights(self.data) if weights == "balanced" else weights,
        )
        self.model = build_model(recipe, len(self.data.classes))
        self.anatomy = self.model.anatomy
        _check_frames(self.data, self.anatomy.frames)
        if not self.data.classes:
            _check_embeddings(self.data, self.model)
        teacher = load(self.settings.teacher) if self.settings.teacher else None
        self.distillation = _distillation(recipe, self.model) if recipe.distill else None
        objective = Objective(self.model, self.task, teacher, self.distillation)
        self.several: SeveralDegrees | None = None
        if self.settings.degrees:
            self.several = SeveralDegrees(objective, self.settings.degrees)
            self.several.mark_trained()
        self.objective = self.module = self.several or objective

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trainable parameters: adapters, heads, decoders, reducers, distillation heads."""
        settings = self.settings
        decay, lr = settings.weight_decay, settings.lr
        of_vectors = decay if settings.decay == "all" else 0.0
        groups = parameter_groups(
            self.model, decay, lr, settings.layer_decay, vector_decay=of_vectors
        )
        if self.distillation:
            groups += decay_groups(self.distillation, decay, lr, vector_decay=of_vectors)
        return groups

    def before_update(self, update: int, updates_per_epoch: int) -> None:
        """Give the reduction method the number of finished steps, and draw degrees if several
        train; some methods have a schedule."""
        if self.model.reducer:
            self.model.reducer.at_step(update, updates_per_epoch)
        if self.several:
            self.several.draw_degrees(self.recipe.seed, update)

    @property
    def score_name(self) -> str:
        """Name of the score of a training batch."""
        return self.task.score_name

    @property
    def passes(self) -> int:
        """One pass for each degree of the present update."""
        return len(self.several.degrees) if self.several else 1

    def before_pass(self, number: int) -> None:
        """Choose the degree of the next pass."""
        if self.several:
            self.several.number = number

    def augment_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix, if the recipe asks for them; without labels, the targets are the
        embeddings of the frozen backbone."""
        images, targets = self.task.mix_batch(images, targets)
        return images, self.task.batch_targets(images, targets)

    def batch_score(self, outputs: Tensor, targets: Tensor) -> float:
        """Score of a training batch: the fraction of right answers, if there are any."""
        return self.task.batch_score(outputs, targets)

    def validation_scores(
        self, loader: DataLoader[Any], accelerator: Accelerator
    ) -> dict[str, float]:
        """The task's metrics over the validation set; of several degrees at the highest."""
        self._turn_to_highest()
        return evaluate_loader(self.model, loader, self.task, autocast=accelerator.autocast)

    def save(self, folder: Path) -> None:
        """Save the model; of several degrees at the highest."""
        self._turn_to_highest()
        self.model.save_pretrained(folder)

    def _turn_to_highest(self) -> None:
        if self.several:
            self.model.set_degree(self.several.highest)

    def calibrate(self, run: Run, device: torch.device) -> None:
        """Find the dial's thresholds for the models of a finished run, and save them.

        Only methods that select tokens by threshold need this, and only once. A model that was
        trained at another degree than that of its target ratio is left as it is: it has to keep
        the threshold that it was trained with.
        """
        reducer = self.model.reducer
        if (
            not ShareMeter.supports(self.model)
            or not reducer
            or self.model.degree != reducer.degree
        ):
            return
        images, found = None, None
        for folder in (run.best, run.last):
            model = load(folder).to(device)
            if model.reducer and model.reducer.calibration is None:
                # With one evaluation, the best model is the last one: it has the same thresholds.
                if found is None or self.settings.evaluate != "last":
                    images = self._training_images() if images is None else images
                    found = calibrate(
                        model, torch.split(images.to(device), self.settings.batch_size)
                    )
                model.reducer.calibration = found
                model.save_pretrained(folder)

    def _training_images(self) -> Tensor:
        """Random training images [N, 3, H, W], prepared as in evaluation."""
        draw = np.random.default_rng(self.recipe.seed)
        train: Any = self.data.train
        count = min(_CALIBRATION_IMAGES, len(train))
        subset = Subset(train, draw.choice(len(train), size=count, replace=False).tolist())
        loader = eval_loader(
            subset,
            self.task.eval_transform(self.anatomy),
            batch_size=self.task.eval_batch_size(self.settings.batch_size),
        )
        return first_images(loader, self.model, count)


def _check_frames(data: Splits, frames: int | None) -> None:
    """Raise a ValueError unless data and model are both for videos, or both for images."""
    if data.video and frames is None:
        raise ValueError(
            "model.frames must be a number such as 8 for a data set of videos, got null."
        )
    if not data.video and frames is not None:
        raise ValueError(f"data must be a data set of videos for a model of {frames} frames.")


def _check_embeddings(data: Splits, model: DialViT) -> None:
    """Raise a ValueError if a model cannot learn from images without labels."""
    if model.degree == 0:
        raise ValueError(
            "train.degree must be at least 1 for images without labels, got 0 (from the recipe or "
            "from the settings of reduce): the model learns to keep its embeddings when tokens are "
            "reduced."
        )
    if not any(True for _ in model.trainable_parameters()):
        raise ValueError(
            "adapt must be a method that trains more than a head for images without labels, got "
            f"{type(model.adapt_config).__name__}."
        )
    if model.reducer and "complete" in model.reducer.extra_passes:
        raise ValueError(
            "reduce.complete must be false for images without labels, got true: it compares the "
            "logits of classes."
        )
    count = len(data.val)  # type: ignore[arg-type]
    if count < MIN_IMAGES:
        raise ValueError(
            f"data: embeddings are compared on at least {MIN_IMAGES} validation images, got "
            f"{count}; take more images, or a smaller data.val_every."
        )


def _distillation(recipe: Recipe, model: DialViT) -> Distillation:
    """The distillation of a recipe, with a fresh copy of the pre-trained backbone as teacher."""
    settings = recipe.distill
    assert settings is not None
    heads = FeatureDistillation(model.anatomy.shape.embed_dim, settings.dim, detach=settings.detach)
    return Distillation(heads, wrap(recipe.model.backbone(0).create()), settings.weight)
