"""Fine-tuned classifiers of the tables, and their predictions on images that they never saw."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tokendial as td
from benchmarks.evidence_real.common import Options, cached, in_processes, in_threads, train
from benchmarks.evidence_real.statistics import Metric, resampled_scores
from tokendial.measure import Resampling
from tokendial.methods import to_json
from tokendial.runs import Run
from tokendial.runs.loaders import eval_loader
from tokendial.runs.recipe import check_method

RESAMPLES = 1000
DIALS: dict[str, td.ToMe | td.EViT] = {"tome": td.ToMe(r=6), "evit": td.EViT(r=6)}
"""Dials of six degrees: at degree r, each of the twelve blocks removes r of 64 patches, as long as
twice as many are left."""
EPOCHS = 4
"""Epochs of models that run along a dial: there are many of them."""
FEW_SEEN = 2000
"""Images that a training on a few images of each class sees."""
CLASSES = {"elpv": 2, "stamps": 25}
"""Classes of each data set."""
ALL_DEGREES: dict[str, dict[str, Any]] = {
    "random": {"train.degrees": {"random": True}},
    "sandwich": {"train.degrees": {"sandwich": 2}},
    # An update of the sandwich runs four degrees, so this one takes the time of the others. The
    # learning rate rises over the first of the four epochs, and over the same share of a shorter
    # training.
    "short_sandwich": {
        "train.degrees": {"sandwich": 2},
        "train.epochs": EPOCHS // 4,
        "train.warmup_epochs": 1 / 4,
    },
}
"""Trainings for all degrees at once."""
RECIPES = {"dense_adapter": "sparse_tuning"}
"""Recipe of a method that has none of its own: Sparse-Tuning without its reduction."""
HOLDOUT = 0.15
"""Fraction of ELPV's training cells that these models are not trained on: scales of compensators
are searched on them."""


@dataclass(frozen=True)
class Classifier:
    """DINOv2-S fine-tuned on a data set."""

    data: str
    """"elpv" (defective or sound) or "stamps" (kind of object)."""
    method: str
    """Name of a recipe in recipes/real/elpv, or "dense_adapter"."""
    seed: int
    """Seed of new weights, order and augmentation."""
    dial: str | None = None
    """Reduction in training: a key of `DIALS`. None: no reduction, or the one of the recipe."""
    degree: int = 0
    """Degree in training, if there is a dial."""
    all_degrees: str | None = None
    """How it is trained for all degrees up to `degree` at once: a key of `ALL_DEGREES`. None: it is
    trained at `degree`."""
    img_size: int = 112
    """Side of the images in pixels."""
    images_per_class: int | None = None
    """Images of each class that it is trained on, for as many epochs as `FEW_SEEN` needs; None: all
    images."""
    lr: float | None = None
    """Learning rate; None: that of the recipe."""
    by_recipe: bool = False
    """Whether it has the epochs of its recipe and all training images, instead of `EPOCHS` and all
    but `HOLDOUT`."""

    @property
    def name(self) -> str:
        """Name of the run."""
        dial = f"{self.dial}{self.degree}" if self.dial else "plain"
        kind = f"-{self.all_degrees}" if self.all_degrees else ""
        kind += "-recipe" if self.by_recipe else ""
        kind += f"-few{self.images_per_class}" if self.images_per_class else ""
        kind += f"-lr{self.lr:g}" if self.lr else ""
        return f"{self.data}-{self.method}-{dial}-{self.img_size}-{self.seed}{kind}"

    def train(self, options: Options) -> Path:
        """Train the classifier, unless that is done. Returns the folder of its run."""
        settings: dict[str, Any] = {
            "seed": self.seed,
            "model.weights": str(options.weights.resolve()),
            "model.img_size": self.img_size,
            "data": data_settings(self.data, options, 0.0 if self.by_recipe else HOLDOUT),
            "train.evaluate": "last",
        }
        if not self.by_recipe:
            settings["train.epochs"] = EPOCHS
        if self.images_per_class:
            seen = FEW_SEEN // (self.images_per_class * CLASSES[self.data])
            settings |= {"train.images_per_class": self.images_per_class, "train.epochs": seen}
            settings["train.batch_size"] = 8
        if self.method in RECIPES:
            settings["reduce"] = None
        if self.dial:
            settings["reduce"] = to_json("reduce", DIALS[self.dial])
            settings["train.degree"] = self.degree
        if self.all_degrees:
            settings |= ALL_DEGREES[self.all_degrees]
        if self.lr:
            settings["train.lr"] = self.lr
        if self.data != "elpv":  # cells have no top; photographs do
            settings["augment.vertical_flip"] = 0.0
        recipe = RECIPES.get(self.method, self.method)
        return train(self.name, f"real/elpv/{recipe}", settings, options)


def data_settings(data: str, options: Options, holdout: float = HOLDOUT) -> dict[str, Any]:
    """The data section of a recipe."""
    if data == "elpv":
        root = {"root": str(Path(options.elpv).resolve())} if options.elpv else {}
        return {"name": "elpv", "task": "defect", "holdout": holdout} | root
    return {"name": "stamps", "task": "category", "train_size": 1600, "val_size": 800,
            "img_size": 128}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a classifier runs: at which degree of which dial, with which compensator."""

    dial: str | None = None
    """A key of `DIALS`; None: as in training."""
    degree: int = 0
    """Degree of the dial."""
    compensator: str | None = None
    """Folder of a compensator, the "last" one of its run; None: without."""
    scale: float = 1.0
    """Factor of the compensator."""

    @property
    def name(self) -> str:
        """Name for files."""
        run = Path(self.compensator).parent.name if self.compensator else ""
        compensator = f"-{run}-{self.scale:g}" if run else ""
        return f"{self.dial or 'trained'}{self.degree}{compensator}"


def predict(
    classifier: Classifier, setting: Setting, options: Options, part: str = "test"
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, classes] and labels [N] of the test set ("test") or of the search set ("val")."""
    path = options.out / "predictions" / classifier.name / f"{setting.name}-{part}.npz"
    found = cached(path, lambda: _predict(classifier, setting, options, part))
    return found["logits"], found["labels"]


@torch.inference_mode()
def _predict(
    classifier: Classifier, setting: Setting, options: Options, part: str
) -> dict[str, np.ndarray]:
    run = Run(options.out / "runs" / classifier.name)
    model = load_model(run.folder, setting.dial).eval()
    if model.reducer is not None:
        model.set_degree(classifier.degree if setting.dial is None else setting.degree)
    if setting.compensator:
        compensator = td.Compensator.from_pretrained(setting.compensator)
        compensator.scale = setting.scale
        model.set_degree(classifier.degree)
        compensator.attach(model, classifier.degree)
        model.set_degree(setting.degree)
    logits, labels = run_model(model, run.folder, part)
    return {"logits": logits, "labels": labels}


@torch.inference_mode()
def run_model(model: td.DialViT, folder: Path, part: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, classes] and labels [N] of a model on a part of a run's data."""
    images, labels = _images(folder, part)
    with torch.autocast("cpu", torch.bfloat16):
        logits = [model(batch).float() for batch in images.split(64)]
    return torch.cat(logits).numpy(), labels.numpy()


def compute(
    questions: Iterable[tuple[Classifier, Setting]], options: Options, part: str = "test"
) -> None:
    """Train classifiers and predict a part of the data, as far as that is not done."""
    asked = list(dict.fromkeys(questions))
    trained = dict.fromkeys(classifier for classifier, _ in asked)
    in_threads(lambda classifier: classifier.train(options), trained, options)
    in_processes(functools.partial(_predict_one, options=options, part=part), asked, options)


def _predict_one(question: tuple[Classifier, Setting], options: Options, part: str) -> None:
    predict(*question, options, part)


def bootstrap(
    asked: Sequence[tuple[Classifier, Setting]], metric: Metric, options: Options
) -> np.ndarray:
    """Bootstrap replicates of the score of one model with several seeds, on the test set.

    All models of a data set see the same draws, so differences of replicates are paired.

    Args:
        asked: The classifier of each seed, and how it runs.
        metric: The score.
        options: The options.

    Returns:
        [1 + number of draws], as `resampled_scores`.
    """
    found = [predict(*each, options) for each in asked]
    labels = found[0][1]
    draws = resampling(asked[0][0].data, len(labels), len(asked), options)
    return resampled_scores(draws, metric, [logits for logits, _ in found], labels)


@functools.cache
def resampling(data: str, images: int, seeds: int, options: Options) -> Resampling:
    """Draws of a data set's test images (of stamps: of its objects) and of seeds."""
    if data == "elpv":
        return Resampling(images, seeds, resamples=RESAMPLES)
    pictures: Any = check_method("data", data_settings(data, options)).build(0).val
    names = [pictures.pictures.compose(index).name for index in range(images)]
    return Resampling(images, seeds, groups=names, resamples=RESAMPLES)


def load_model(folder: Path, dial: str | None) -> td.DialViT:
    """The last model of a run, with a dial of `DIALS` or its own."""
    run = Run(folder)
    return td.load(run.last, reduce=DIALS[dial]) if dial else td.load(run.last)


@functools.lru_cache(maxsize=4)
def _images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a part of the run's data set. The seeds of runs share the test set."""
    run = Run(folder)
    data = replace(run.recipe().data, val=part).build(0)
    transform = run.task().eval_transform(run.model().anatomy)
    images, labels = zip(*eval_loader(data.val, transform, batch_size=64), strict=True)
    return torch.cat(images), torch.cat(labels)
