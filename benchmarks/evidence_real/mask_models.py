"""Models that are trained for masks on Cutouts: DAR, DAR*, and what they are compared with."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokendial as td
from benchmarks.evidence_real.common import SEEDS, Options, cached, train
from benchmarks.evidence_real.masks import predict_masks, test_pairs
from tokendial.measure import ShareMeter
from tokendial.runs import Run

CHEAP = 0.6
"""Cost at which models with DAR run, too, as a share of the cost of `LINEAR`."""
RECIPE = "real/saliency/dar"
EPOCHS = 2
LINEAR = "linear decoder, frozen"
FULL = "all tokens, DAR's adapters"
KINDS: dict[str, dict[str, Any]] = {
    LINEAR: {
        "reduce": None,
        "adapt": {"name": "linear"},
        "decode": {"name": "linear"},
        "train.lr": 1e-2,
    },
    FULL: {"reduce": None},
    "DAR": {},
    "DAR*": {"distill": {"weight": 0.1}},
}
"""What each kind changes in the recipe."""
PARTS: dict[str, dict[str, Any]] = {
    "DAR without compensator": {"adapt": {"name": "adaptformer", "dim": 72, "scale": 2.0}},
    "DAR without adapters": {"adapt": {"name": "linear"}},
}
"""DAR without some of its parts."""


@dataclass(frozen=True)
class MaskModel:
    """A model that was trained for masks."""

    kind: str
    """A key of `KINDS` or `PARTS`."""
    seed: int
    """Seed of new weights, order and augmentation."""

    @property
    def name(self) -> str:
        """Name of the run."""
        words = f"masks-{self.kind}-{self.seed}".replace("*", " star").replace("'", "")
        return words.lower().replace(",", "").replace(" ", "_")

    def folder(self, options: Options) -> Path:
        """Folder of the run."""
        return options.out / "runs" / self.name

    def train(self, options: Options) -> Path:
        """Train the model, unless that is done. Returns the folder of its run."""
        settings: dict[str, Any] = {
            "seed": self.seed,
            "model.weights": str(options.weights.resolve()),
            "data.root": str(options.cutouts.resolve()),
            "train.epochs": EPOCHS,
            "train.warmup_epochs": 0.2,
            # So no model is chosen by pictures that it is then judged by.
            "train.evaluate": "last",
        }
        return train(self.name, RECIPE, settings | (KINDS | PARTS)[self.kind], options)

    def load(self, options: Options) -> td.DialViT:
        """The trained model, at the degree that it was trained at."""
        return td.load(Run(self.folder(options)).last).eval()

    def predict(self, degree: int, options: Options) -> dict[str, np.ndarray]:
        """Scores and masks of the test pictures at a degree, in bfloat16 as in training.

        Returns:
            What `predict_masks` returns, and macs: multiply-accumulates of a picture; share:
            fraction of the patch tokens that FFNs processed.
        """
        path = options.out / "dense" / "trained" / f"{self.name}-{degree}.npz"
        return cached(path, lambda: self._predict(degree, options))

    def _predict(self, degree: int, options: Options) -> dict[str, np.ndarray]:
        model, task = self.load(options), Run(self.folder(options)).task()
        model.set_degree(degree)
        meter = ShareMeter(model) if ShareMeter.supports(model) else None
        with torch.autocast("cpu", torch.bfloat16), meter or nullcontext():
            found = predict_masks(model, task, test_pairs(options))
        share = meter.share if meter else 1.0
        return found | {"macs": np.array(model.cost().macs), "share": np.array(share)}


def trained_models() -> list[MaskModel]:
    """All models to train: those of `KINDS` with each seed, then those of `PARTS`."""
    models = [MaskModel(kind, seed) for seed in SEEDS for kind in KINDS]
    return models + [MaskModel(kind, SEEDS[0]) for kind in PARTS]


def degrees_to_run(model: MaskModel, options: Options) -> list[int]:
    """The degree that a model was trained at, and for DAR the one nearest to the cost `CHEAP`.

    The two may be the same.
    """
    trained = model.load(options)
    if trained.degree == 0:
        return [0]
    linear = MaskModel(LINEAR, model.seed).load(options).cost().macs
    wanted = CHEAP * linear
    cheap = min(trained.degrees, key=lambda degree: abs(trained.cost(degree).macs - wanted))
    return [trained.degree, cheap]
