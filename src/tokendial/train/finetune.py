"""Fine-tuning: a wrapped model, a labelled data set, the losses of task and reduction method."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.data.splits import Splits
from tokendial.saving import load
from tokendial.tasks.classification import Classification
from tokendial.train.batches import seed_all
from tokendial.train.evaluate import evaluate_loader
from tokendial.train.loop import Trainer
from tokendial.train.objective import Objective
from tokendial.train.optimizer import parameter_groups
from tokendial.train.recipe import Recipe
from tokendial.train.runs import Run
from tokendial.vit import DialViT, wrap


def train(recipe: Recipe, *, quiet: bool = False) -> Run:
    """Train as the recipe says; go on where a killed run of the same recipe stopped.

    Returns:
        The run's folder: recipe.yaml, classes.json, metrics.jsonl, checkpoints/, tensorboard/,
        best/ and last/ (saved models).

    Raises:
        ValueError: If the recipe does not fit the data or the model, or the folder holds another
            run.
        InterruptedRunError: If the process was asked to stop.
    """
    return Trainer(recipe, FineTuning(recipe), quiet=quiet).run_to_end()


def build_model(recipe: Recipe, num_classes: int) -> DialViT:
    """The wrapped model of a recipe, with a fresh head, at the degree to train at."""
    backbone = recipe.model.backbone(num_classes)
    seed_all(recipe.seed)
    model = wrap(backbone.create(), reduce=recipe.reduce, adapt=recipe.adapt, backbone=backbone)
    if recipe.train.degree is not None:
        model.set_degree(recipe.train.degree)
    model.checkpoint_activations = recipe.train.checkpoint_activations
    return model


class FineTuning:
    """The job of `train`."""

    shows = "accuracy"

    def __init__(self, recipe: Recipe) -> None:
        self.settings = recipe.train
        self.data: Splits = recipe.data.build(recipe.seed)
        if not self.data.classes:
            raise ValueError("data: fine-tuning needs labelled images; these have no classes.")
        self.task = Classification(
            len(self.data.classes), multi_label=self.data.multi_label, augment=recipe.augment
        )
        self.module = build_model(recipe, len(self.data.classes))
        self.anatomy = self.module.anatomy
        teacher = load(self.settings.teacher) if self.settings.teacher else None
        self.objective = Objective(self.module, self.task, teacher)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapters, heads and what else trains."""
        settings = self.settings
        return parameter_groups(
            self.module, settings.weight_decay, settings.lr, settings.layer_decay
        )

    def before_update(self, update: int, updates_per_epoch: int) -> None:
        """Some reduction methods have a schedule."""
        if self.module.reducer:
            self.module.reducer.at_step(update, updates_per_epoch)

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup and cutmix."""
        return self.task.mixed(images, targets)

    def hits(self, outputs: Tensor, targets: Tensor) -> float:
        """Share of right answers."""
        return self.task.hits(outputs, targets)

    def scores(self, loader: DataLoader[Any], accelerator: Accelerator) -> dict[str, float]:
        """Accuracy and the task's other metrics."""
        return evaluate_loader(self.module, loader, self.task, accelerator)

    def save(self, folder: Path) -> None:
        """Write the model."""
        self.module.save_pretrained(folder)
