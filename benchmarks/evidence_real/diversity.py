"""Table: how much the attention of tokens differs, by depth, with and without reduction.

DAR's paper argues that reduction makes the attention patterns of tokens alike, which hurts dense
prediction, and that DAR's adapters undo this. Measured is the mean total variation distance between
two rows of the attention map, from 0 (all tokens attend alike) to 1, and the effective rank of the
map as a share of its tokens, on test pictures of Cutouts at 224 pixels. First come reduction
methods on the frozen backbone at about 60 % of the cost, then the models of table `dense_trained`,
at the degree they were trained at and, for DAR, at about 60 % of the cost. Differences are paired:
those to the frozen backbone without reduction, on the same pictures.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

import tokendial as td
from benchmarks.evidence_real.common import SEEDS, Options, cached, frozen_backbone, in_processes
from benchmarks.evidence_real.mask_models import (
    FULL,
    KINDS,
    LINEAR,
    PARTS,
    MaskModel,
    degrees_to_run,
)
from benchmarks.evidence_real.masks import IMG_SIZE, over_pictures, test_pairs
from benchmarks.evidence_real.matched_costs import Reduction, reduce_config
from benchmarks.evidence_real.results import plain, write_table
from tokendial.data.transforms.masks import MaskAugment
from tokendial.measure.diversity import attention_diversity
from tokendial.tasks import BinaryMasks

DEPTH = 12
"""Layers of the backbone."""
PICTURES = 100
REDUCTIONS = (
    Reduction(),
    Reduction("ToMe", 0.6),
    Reduction("FFN merging", 0.6),
    Reduction("EViT in 3 layers, fuse", 0.6),
    Reduction("EViT in 3 layers, drop", 0.6),
)
STAGES = {"layers 1-4": slice(0, 4), "5-8": slice(4, 8), "9-12": slice(8, 12)}
HEADER = ("model", "runs with", *STAGES, "all layers", "minus frozen, no reduction",
          "effective rank / tokens", "minus frozen, no reduction")  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A model whose attention is measured: a reduction of the frozen one, or a trained one."""

    reduction: Reduction | None = None
    """Reduction of the frozen backbone; None: a trained model."""
    trained: MaskModel | None = None
    """The trained model."""
    position: int = 0
    """Which of the degrees that `degrees_to_run` lists it runs at."""

    @property
    def name(self) -> str:
        """Name for files."""
        if self.trained:
            return f"{self.trained.name}-{self.position}"
        assert self.reduction is not None
        return f"frozen-{self.reduction.name}"

    def build(self, options: Options) -> td.DialViT:
        """The model at its degree."""
        if self.trained:
            model = self.trained.load(options)
            model.set_degree(degrees_to_run(self.trained, options)[self.position])
            return model
        assert self.reduction is not None
        vit = frozen_backbone(IMG_SIZE, options)
        return td.wrap(vit, reduce=reduce_config(self.reduction, vit)[0]).eval()

    def measure(self, options: Options) -> dict[str, np.ndarray]:
        """Distance and rank of the attention, [pictures, layers] each, and tokens [layers]."""
        path = options.out / "diversity" / f"{self.name}.npz"
        return cached(path, lambda: self._measure(options))

    def _measure(self, options: Options) -> dict[str, np.ndarray]:
        model, pairs = self.build(options), test_pairs(options)
        transform = BinaryMasks(MaskAugment()).image_transform(model.anatomy)
        found = [
            attention_diversity(model, transform(pairs[index][0])[None])
            for index in range(PICTURES)
        ]
        values: dict[str, Any] = {
            name: np.array([[getattr(layer, name) for layer in layers] for layers in found])
            for name in ("distance", "effective_rank", "num_tokens")
        }
        values["rank share"] = values["effective_rank"] / values["num_tokens"]
        return values


def groups() -> dict[tuple[str, str], list[Variant]]:
    """The variants of each row, one for each seed, by model and by how it runs."""
    rows = {("frozen", _how(one)): [Variant(one)] for one in REDUCTIONS}
    for kind in (*KINDS, *PARTS):
        if kind == LINEAR:
            continue  # its backbone is the frozen one
        seeds = SEEDS if kind in KINDS else SEEDS[:1]
        runs = ["no reduction"] if kind == FULL else ["as trained", "60 % of the cost"]
        for position, how in enumerate(runs):
            variants = [Variant(trained=MaskModel(kind, s), position=position) for s in seeds]
            rows[kind, how] = variants
    return rows


def _how(reduction: Reduction) -> str:
    return "no reduction" if reduction.family == "none" else reduction.family


def compute(variant: Variant, options: Options) -> None:
    """Measure one variant."""
    variant.measure(options)


def table(options: Options) -> list[dict[str, Any]]:
    """The rows: diversity by depth of each model."""
    frozen = Variant(Reduction()).measure(options)
    rows = []
    for (model, how), variants in groups().items():
        found = [variant.measure(options) for variant in variants]
        row: dict[str, Any] = {"model": model, "runs with": how, "seeds": len(found)}
        for name in ("distance", "rank share"):
            by_layer = np.mean([each[name].mean(axis=0) for each in found], axis=0)
            row[f"{name} by layer"] = by_layer.tolist()
            row[name] = over_pictures([each[name].mean(axis=1) for each in found])
            differences = [each[name] - frozen[name] for each in found]
            row[f"{name}, difference"] = over_pictures([d.mean(axis=1) for d in differences])
            row[f"{name} by layer, difference"] = [
                over_pictures([difference[:, layer] for difference in differences])
                for layer in range(DEPTH)
            ]
        row["tokens by layer"] = found[0]["num_tokens"].mean(axis=0).tolist()
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row as text, in percent."""
    seeds = "" if row["seeds"] > 1 or row["model"] == "frozen" else " (1 seed)"
    distances = row["distance by layer"]
    stages = (f"{100 * np.mean(distances[layers]):.1f}" for layers in STAGES.values())
    compared = (row["model"], row["runs with"]) != ("frozen", "no reduction")
    texts = [f"{row['model']}{seeds}", row["runs with"], *stages]
    for name in ("distance", "rank share"):
        difference = row[f"{name}, difference"].percent(sign=True)
        texts += [row[name].percent(), difference if compared else "-"]
    return tuple(texts)


def main(options: Options) -> None:
    """Measure, and write the table. The models of table `dense_trained` have to be there."""
    variants = itertools.chain.from_iterable(groups().values())
    in_processes(functools.partial(compute, options=options), variants, options)
    rows = table(options)
    write_table("diversity", HEADER, [cells(row) for row in rows], {"rows": plain(rows)})
