"""Table: what a compensator recovers, which was trained without labels on other pictures.

One compensator for each dial and loss is trained on unlabelled pictures. It is attached to the
classifiers of table `mismatch` with AdaptFormer (the adapter of the paper), which it never saw. Its
scale is searched, for each classifier and degree, on images outside of training and test set.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import tokendial as td
from benchmarks.evidence_real.classifiers import (
    DIALS,
    Classifier,
    Setting,
    bootstrap,
    predict,
)
from benchmarks.evidence_real.common import (
    SEEDS,
    Options,
    frozen_backbone,
    in_processes,
    in_threads,
    train,
)
from benchmarks.evidence_real.mismatch import (
    DATA,
    classifier,
    degrees,
    trainings,
)
from benchmarks.evidence_real.results import write_table
from benchmarks.evidence_real.statistics import balanced_accuracy, interval
from tokendial.atomic import atomic_write
from tokendial.data import Augment, Unlabelled
from tokendial.data.transforms.image import eval_transform, on_image
from tokendial.methods import to_json
from tokendial.runs.loaders import eval_loader

METHOD = "adaptformer"
"""Adapter of the classifiers."""
LOSSES = ("features", "distillation")
"""L1 between features, and KL between probabilities of clusters that take the place of classes."""
SHARES = (0.3, 0.6, 1.0)
"""Scales that are tried, as fractions of the scale in training."""
CLUSTERS, CLUSTERED = 256, 3000
HEADER = (
    "data",
    "dial",
    "loss",
    "trained at, run at",
    "matched",
    "mismatched",
    "compensated",
    "lost",
    "recovered",
)


def train_compensator(dial: str, loss: str, options: Options) -> Path:
    """Train a compensator on unlabelled pictures. Returns its folder."""
    weights = cluster_head(options) if loss == "distillation" else options.weights
    settings: dict[str, Any] = {
        "model.weights": str(weights.resolve()),
        "data.root": str(options.pictures.resolve()),
        "reduce": to_json("reduce", DIALS[dial]),
        "steps": DIALS[dial].r,
        "loss": loss,
    }
    name = f"compensator-{dial}-{loss}"
    return train(name, "tocom/dinov2_small", settings, options, "compensate") / "last"


def cluster_head(options: Options) -> Path:
    """Weights of the backbone with a head whose classes are clusters of unlabelled pictures.

    The clusters are those of k-means on the features of the pictures. The logit of a cluster is
    minus half of the squared distance to its centre, over a quarter of the mean squared distance of
    a picture to its own centre, so that most pictures have a few likely clusters.
    """
    path = options.out / "cluster_head.safetensors"
    if path.exists():
        return path
    from sklearn.cluster import KMeans

    features = _features(options)
    found = KMeans(CLUSTERS, n_init=1, random_state=0).fit(features)
    centres = torch.from_numpy(found.cluster_centers_).float()
    spread = found.inertia_ / len(features) / 4
    head = {
        "head.weight": centres / spread,
        "head.bias": -centres.square().sum(1) / 2 / spread,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(load_file(options.weights) | head, temporary)
    return path


@torch.inference_mode()
def _features(options: Options) -> np.ndarray:
    """Features [N, D] of unlabelled pictures, as the head reads them."""
    vit = frozen_backbone(112, options)
    anatomy = td.wrap(vit).anatomy
    augment = Augment(test_crop_ratio=1.0)
    transform = on_image(eval_transform(augment, anatomy.image_size, *anatomy.statistics))
    data = Unlabelled(root=str(options.pictures), val_every=2).build(0).train
    chosen = np.random.default_rng(0).permutation(len(data))[:CLUSTERED].tolist()
    subset = torch.utils.data.Subset(data, chosen)
    found = []
    for images, _ in eval_loader(subset, transform, batch_size=64):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(vit(images).float())
    return torch.cat(found).numpy()


def best_scale(
    one: Classifier, dial: str, target: int, compensator: Path, options: Options
) -> Setting:
    """The setting with the scale of best balanced accuracy on the search set."""
    settings = [Setting(dial, target, str(compensator), share) for share in SHARES]
    scores = [balanced_accuracy(*predict(one, each, options, "val")) for each in settings]
    return settings[int(np.argmax(scores))]


def main(options: Options) -> None:
    """Train compensators and classifiers, search scales, predict, and write the table."""
    kinds = list(itertools.product(DIALS, LOSSES))
    folders = in_threads(lambda kind: train_compensator(*kind, options), kinds, options)
    compensators = dict(zip(kinds, folders, strict=True))
    classifiers = trainings(methods=(METHOD,))
    in_threads(lambda one: one.train(options), classifiers, options)
    questions = [
        (classifier(data, METHOD, dial, source, seed), dial, target, compensators[dial, loss])
        for seed, data, loss in itertools.product(SEEDS, DATA, LOSSES)
        for dial in DIALS
        for source, target in itertools.permutations(degrees(dial), 2)
    ]
    in_processes(functools.partial(_answer, options=options), questions, options)
    rows = [
        row
        for data, dial, loss in itertools.product(DATA, DIALS, LOSSES)
        for row in table(data, dial, loss, compensators[dial, loss], options)
    ]
    write_table("tocom", HEADER, [row["cells"] for row in rows], {"rows": rows})


def _answer(question: tuple[Classifier, str, int, Path], options: Options) -> None:
    one, dial, target, _ = question
    matched = replace(one, dial=dial if target else None, degree=target)
    predict(one, best_scale(*question, options), options)
    for each in (one, matched):
        predict(each, Setting(dial, target), options)


def table(
    data: str, dial: str, loss: str, compensator: Path, options: Options
) -> list[dict[str, Any]]:
    """One row for each pair of degrees, and one for each direction of the dial."""
    pairs = list(itertools.permutations(degrees(dial), 2))
    none, half, full = degrees(dial)
    groups = {f"{source} → {target}": [(source, target)] for source, target in pairs}
    groups["to more reduction"] = [(none, half), (none, full), (half, full)]
    groups["to less reduction"] = [(half, none), (full, none), (full, half)]
    rows = []
    for name, members in groups.items():
        found = [scores(data, dial, *pair, compensator, options) for pair in members]
        matched, mismatched, compensated = np.mean(found, axis=0)
        lost, won = matched - mismatched, compensated - mismatched
        values = [interval(each) for each in (matched, mismatched, compensated)]
        cells = [data, dial, loss, name, *(f"{100 * each.value:.1f}" for each in values)]
        cells += [interval(lost).percent(sign=True), interval(won).percent(sign=True)]
        rows.append({"cells": cells, "lost": interval(lost).value, "won": interval(won).value})
    return rows


def scores(
    data: str, dial: str, source: int, target: int, compensator: Path, options: Options
) -> Sequence[np.ndarray]:
    """Bootstrap replicates of balanced accuracy: matched, mismatched, compensated."""
    asked = []
    for seed in SEEDS:
        mismatched = classifier(data, METHOD, dial, source, seed)
        asked.append(
            (
                (classifier(data, METHOD, dial, target, seed), Setting(dial, target)),
                (mismatched, Setting(dial, target)),
                (mismatched, best_scale(mismatched, dial, target, compensator, options)),
            )
        )
    return [
        bootstrap(of_seeds, balanced_accuracy, options) for of_seeds in zip(*asked, strict=True)
    ]
