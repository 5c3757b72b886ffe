"""The parameter and cost columns of the papers' tables, recomputed on the real models.

`assets/paper_tables.json` holds every row: the values that the paper prints, the configuration
behind them, and how well a formula fits. Here each configuration becomes a model on the meta
device, whose parameters and operators are counted. Layers that can be merged into the backbone for
inference (LoRA, SSF, FacT) are merged before the cost is counted, as in the papers.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import tokendial as td
from tokendial.adapt.base import AdapterConfig
from tokendial.atomic import atomic_write
from tokendial.backbones import video_vit
from tokendial.decode import DecoderConfig
from tokendial.measure.cost import count_macs
from tokendial.reduce.base import ReducerConfig
from tokendial.reduce.dyt import DyTReducer

AGREES = ("exact", "within 2%")
"""Verdicts of values that agree with the paper."""
_BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-B/16": ("vit_base_patch16_224", {"num_classes": 100}),
    "ViT-L/16": ("vit_large_patch16_224", {"num_classes": 100}),
    "DeiT-B/16": ("deit_base_patch16_224", {}),
    "DeiT-S/16": ("deit_small_patch16_224", {}),
    "DeiT-B/16 (384 weights) at 512x512, 1025 tokens": (
        "deit_base_patch16_384",
        {"img_size": 512, "num_classes": 0},
    ),
    "DINOv2 ViT-B/14": ("vit_base_patch14_dinov2", {}),
}
_FRAMES, _VIDEO_CLASSES, _SEGMENTED_CLASSES = 8, 400, 150


@dataclass(frozen=True, slots=True)
class CostRow:
    """One row of a paper's table beside our values.

    Parameters are in millions, costs in 1e9 multiply-accumulates. None: the paper has no value, or
    the row has nothing that we can count.
    """

    paper: str
    """Short name of the paper."""
    table: str
    """Number of the table in the paper."""
    row: str
    """Name of the row in the table."""
    params_paper: float | None
    """Parameters as printed in the paper, in millions."""
    params: float | None
    """Parameters counted on the real model, in millions."""
    params_difference: float | None
    """Counted minus printed parameters, in millions."""
    params_agree: str
    """Agreement of the parameters: "exact", "within 2%", the difference in percent, or empty."""
    cost_paper: float | None
    """Cost as printed in the paper, in 1e9 multiply-accumulates."""
    cost: float | None
    """Cost counted on the real model, in 1e9 multiply-accumulates."""
    cost_difference: float | None
    """Counted minus printed cost, in 1e9 multiply-accumulates."""
    cost_agree: str
    """Agreement of the cost: "exact", "within 2%", the difference in percent, or empty."""
    verdict: str
    """What is known about the row: exact, within 2%, unexplained, inconsistent in the paper, ..."""
    should_agree: bool
    """Whether our values should agree: the paper neither contradicts the row nor leaves it
    unexplained."""
    note: str
    """Explanation of the verdict."""


def cost_rows() -> Iterator[CostRow]:
    """Compute the rows of all tables, one after the other."""
    for entry in read_tables():
        params, cost = _our_values(entry)
        params_paper, cost_paper = entry["params_m"], entry["gflops"]
        yield CostRow(
            paper=entry["paper"],
            table=entry["table"],
            row=entry["row"],
            params_paper=params_paper,
            params=params,
            params_difference=_difference(params_paper, params),
            params_agree=agreement(params_paper, params),
            cost_paper=cost_paper,
            cost=cost,
            cost_difference=_difference(cost_paper, cost),
            cost_agree=agreement(cost_paper, cost),
            verdict=entry["verdict"],
            should_agree=entry["verdict"] in AGREES,
            note=entry["note"],
        )


def read_tables() -> list[dict[str, Any]]:
    """Read the rows of the papers' tables, which are shipped with the package."""
    text = (files("tokendial") / "assets" / "paper_tables.json").read_text()
    rows: list[dict[str, Any]] = json.loads(text)
    return rows


def agreement(paper: float | None, ours: float | None) -> str:
    """Compare a value with the one that a paper prints with two decimals.

    Returns:
        "exact", "within 2%", the difference in percent, or an empty text if a value is missing.
    """
    if paper is None or ours is None:
        return ""
    if abs(ours - paper) < 0.00505:
        return "exact"
    relative = (ours - paper) / paper if paper else float("inf")
    return "within 2%" if abs(relative) <= 0.02 else f"{relative:+.1%}"


def _difference(paper: float | None, ours: float | None) -> float | None:
    return None if paper is None or ours is None else ours - paper


def write_csv(rows: list[CostRow], path: Path) -> None:
    """Write the rows as CSV."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(CostRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_markdown(rows: list[CostRow], path: Path) -> None:
    """Write the rows as a Markdown table with their notes."""
    lines = [f"| {' | '.join(HEADER)} | note |", "|---" * (len(HEADER) + 1) + "|"]
    lines += [f"| {' | '.join(cells(row))} | {row.note} |" for row in rows]
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


HEADER = (
    "table",
    "row",
    "params (M)",
    "ours",
    "difference",
    "agrees",
    "cost (G)",
    "ours",
    "difference",
    "agrees",
    "known of the row",
)
"""Names of the columns of `cells`."""


def cells(row: CostRow) -> tuple[str, ...]:
    """The cells of a row as text."""
    return (
        f"{row.paper} {row.table}",
        row.row,
        _number(row.params_paper, 2),
        _number(row.params, 4),
        _number(row.params_difference, 4, sign="+"),
        row.params_agree,
        _number(row.cost_paper, 2),
        _number(row.cost, 4),
        _number(row.cost_difference, 4, sign="+"),
        row.cost_agree,
        row.verdict,
    )


def _number(value: float | None, digits: int, *, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


# In this row of the paper, the parameters are those of narrower adapters than the cost.
_COUNTED_WITH = {("IV", "AdaptFormer + EViT"): {"dim": 8}}


def _our_values(entry: dict[str, Any]) -> tuple[float | None, float | None]:
    """Parameters (in millions) and cost (in 1e9) of a row; None where nothing can be counted."""
    config = entry["config"]
    params = cost = None
    if entry["params_m_computed"] is not None:
        other = _COUNTED_WITH.get((entry["table"], entry["row"]), {})
        params = _our_params(config | other, entry["row"]) / 1e6
    if entry["gflops_computed"] is not None:
        use = "video" if "video" in config else "segmenter" if "decoder" in config else "image"
        adapt = _adapter(config, entry["row"])
        cost = _count_model(config["backbone"], _reducer(config), adapt, use).macs / 1e9
    return params, cost


def _our_params(config: dict[str, Any], row: str) -> int:
    if "groups" in config:
        shape = _wrap_model(config["backbone"], None, td.LinearProbe()).anatomy.shape
        with torch.device("meta"):
            compensator = td.Compensator(
                td.ToCom(rank=config["rank"]), shape.depth, shape.embed_dim, config["groups"]
            )
        return sum(p.numel() for p in compensator.parameters())
    if "adapter_dim" in config:
        adapt = td.DARAdapter(dims=(config["adapter_dim"], config["compensator_dim"]))
        return _count_model("DINOv2 ViT-B/14", td.DAR(), adapt, "image").params
    counted = _count_model(config["backbone"], _reducer(config), _adapter(config, row), "image")
    return published_params(config, counted)


def published_params(config: dict[str, Any], counted: "ModelCounts") -> int:
    """Parameters of a model as its row counts them.

    Some rows include a head. No row includes DyT's dispatchers.

    Args:
        config: Configuration of the row.
        counted: Counts of its model.
    """
    heads = 0
    if config.get("head_counted") == "CIFAR-100":
        heads = 100
    elif config.get("inferred") == ["mean head of 50 classes"]:
        heads = 50
    return counted.params - counted.dispatchers + heads * (counted.embed_dim + 1)


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """Parameters and cost of a model."""

    embed_dim: int
    """Width of the tokens."""
    params: int
    """Trainable parameters, without the head."""
    dispatchers: int
    """Trainable parameters of DyT's dispatchers, which published counts leave out."""
    macs: int
    """Multiply-accumulates for one input."""


@cache
def _count_model(
    backbone: str, reduce: ReducerConfig | None, adapt: AdapterConfig, use: str
) -> ModelCounts:
    """Parameters and cost of the model of a row. Rows with the same model are counted once."""
    decode = td.MaskTransformer(num_classes=_SEGMENTED_CLASSES) if use == "segmenter" else None
    model = _wrap_model(backbone, reduce, adapt, decode, video=use == "video")
    counted = count_model(model)
    return replace(counted, macs=_macs_of_segmenter(model)) if decode else counted


def count_model(model: td.DialViT) -> ModelCounts:
    """Count a model as the papers do: layers that can be merged for inference are merged first."""
    if isinstance(model.adapt_config, td.LoRA | td.SSF | td.FacT):
        model.merge_adapters()
    cost = model.cost()
    dispatchers = [part for part in model.modules() if isinstance(part, DyTReducer)]
    return ModelCounts(
        embed_dim=model.anatomy.shape.embed_dim,
        params=cost.trainable_params,
        dispatchers=sum(p.numel() for part in dispatchers for p in part.parameters()),
        macs=cost.macs,
    )


def _wrap_model(
    backbone: str,
    reduce: ReducerConfig | None,
    adapt: AdapterConfig,
    decode: DecoderConfig | None = None,
    *,
    video: bool = False,
) -> td.DialViT:
    name, args = _BACKBONES[backbone]
    with torch.device("meta"):
        # Weights on the meta device have no values to initialise.
        vit = timm.create_model(name, weight_init="skip", **args)
        if video:
            vit = video_vit(vit, frames=_FRAMES, num_classes=_VIDEO_CLASSES)
        return td.wrap(vit, reduce=reduce, adapt=adapt, decode=decode)


def _macs_of_segmenter(model: td.DialViT) -> int:
    size = model.anatomy.image_size
    images = torch.empty(1, model.anatomy.in_chans, *size, device="meta")

    def run(module: nn.Module) -> None:
        nn.functional.interpolate(module(images), size, mode="bilinear")

    # The published cost leaves out products of two activations, as in attention.
    return count_macs(model, run, products=False)


def _reducer(config: dict[str, Any]) -> ReducerConfig | None:
    kind = config.get("reducer", "")
    layers, rate = tuple(config.get("positions", (4, 7, 10))), config.get("keep_rate", 0.7)
    if kind == "EViT":
        if "fused" in config:
            return td.EViT(keep_rate=rate, layers=layers, rest="argmax")
        fuses = config.get("fused_token", True)
        return td.EViT(keep_rate=rate, layers=layers, rest="merge" if fuses else "drop")
    if kind == "DynamicViT":
        return td.DynamicViT(keep_rate=rate, layers=layers)
    if kind.startswith("ToMe merge before each FFN"):
        return td.FFNMerge(r=config["r"])
    if kind == "PYRA":
        return td.PYRA(r=config["r"])
    if kind.startswith("ToMe"):
        return td.ToMe(r=config["r"])
    if kind.startswith("DyT"):
        return td.DyT(target_ratio=config.get("ratio", 0.5), selection="topk")
    return None


def _adapter(config: dict[str, Any], row: str) -> AdapterConfig:
    kind = config.get("adapter", "")
    if not kind:
        return td.FullFineTuning() if row.startswith("Full fine-tuning") else td.LinearProbe()
    makers: dict[str, Callable[[], AdapterConfig]] = {
        "Adapter": lambda: td.Houlsby(dim=config["dim"]),
        "AdaptFormer": lambda: td.AdaptFormer(dim=config["dim"], experts=config.get("experts", 1)),
        # Two rows have no rank in the paper: they take that of the neighbouring rows.
        "LoRA": lambda: td.LoRA(rank=config.get("rank", 4 if "reducer" in config else 32)),
        "VPT-deep": lambda: td.VPT(prompts=config.get("prompts", 8)),
        "SSF": lambda: td.SSF(patch_embedding=False),
        "all": td.BitFit,
        "ConvPass": lambda: td.ConvPass(dim=config["dim"]),
        "FacT-TT": lambda: td.FacT(rank=config["rank"]),
        "ResTuning": lambda: td.ResTuning(dim=config["dim"]),
        "SynQT": lambda: td.SynQT(queries=config["queries"]),
        "NOAH:": lambda: td.NOAH(prompts=config["prompts"], rank=config["rank"], dim=config["dim"]),
        "Dense": lambda: _dense_adapter(config),
    }
    return makers[kind.replace(",", " ").split()[0]]()


def _dense_adapter(config: dict[str, Any]) -> td.DenseAdapter:
    downs, fusion = config["downs_per_layer"], config.get("fusion", "")
    merged_first = fusion.startswith("sum features")
    previous = merged_first or downs[1] == 2
    earlier = merged_first or downs[-1] == 2 + previous
    reads: tuple[Any, ...] = ("previous",) * previous + ("earlier",) * earlier
    return td.DenseAdapter(
        dim=config["dim"],
        start=config["start"],
        reads=reads,
        fusion="input" if merged_first else "output" if fusion.startswith("one down") else "inner",
        channel_scale=config["extra_D_vectors_per_layer"] == 2,
    )
