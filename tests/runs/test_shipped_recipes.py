"""Every shipped recipe: its full-size model compared with published counts, and a short run."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from clips import encode, panned
from layouts import (
    pieces_of_photographs,
    write_cifar100,
    write_elpv,
    write_fgvc,
    write_food101,
    write_images,
    write_svhn,
    write_vtab,
)
from PIL import Image
from safetensors.torch import save_file

from tokendial import wrap
from tokendial.compensate import Compensator
from tokendial.reproduce import (
    AGREES,
    ModelCounts,
    agreement,
    count_model,
    published_params,
    read_tables,
)
from tokendial.runs import CompensateRecipe, read_recipe
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe_file import explicit_fields, shipped_recipes

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
RECIPES = {name: explicit_fields(name) for name in shipped_recipes()}
COMPENSATORS = [name for name, fields in RECIPES.items() if "compensate" in fields]


class Row(NamedTuple):
    """A row of a table of the page."""

    table: str
    name: str
    params: str | None
    our_params: str | None
    cost: str
    our_cost: str


LINE = re.compile(
    r"\| (?P<name>[^|]+) \| `(?P<recipe>[^|]+)` \|"
    r"(?: (?P<params>[^|]+) \| (?P<our_params>[^|]+) \|)?"
    r" (?P<cost>[^|]+) \| (?P<our_cost>[^|]+) \| [^|]*\|"
)


def rows() -> Iterator[tuple[str, Row]]:
    """Recipes and rows of Sparse-Tuning's tables; those of videos have no parameters."""
    for part in PAGE.split("\n### Table ")[1:]:
        for found in filter(None, map(LINE.fullmatch, part.splitlines())):
            cells = found.groupdict()
            yield cells.pop("recipe"), Row(table=part.partition(":")[0], **cells)


ROWS: dict[str, list[Row]] = defaultdict(list)
for recipe_name, recipe_row in rows():
    ROWS[recipe_name].append(recipe_row)


def entry(row: Row) -> dict:
    """The same row in the shipped tables."""
    table, _, video = row.table.partition(", ")
    names = (f"{row.name} (video)",) if video else (row.name, f"{row.name} (image)")
    (found,) = (
        known
        for known in read_tables()
        if known["paper"] == "Sparse-Tuning" and known["table"] == table and known["row"] in names
    )
    return found


COUNTED: dict[str, ModelCounts] = {}


def counted(name: str) -> ModelCounts:
    """Parameters and cost at full size; recipes of the same model are counted once."""
    model = json.dumps([RECIPES[name].get(f) for f in ("model", "reduce", "adapt", "decode")])
    if model not in COUNTED:
        recipe = read_recipe(name, ["model.weights=null"])
        with torch.device("meta"):
            classes = recipe.decode.num_classes if recipe.decode else 100
            COUNTED[model] = count_model(build_model(recipe, classes))
    return COUNTED[model]


def test_the_page_names_every_experiment_and_no_other():
    folders = {name.split("/")[0] for name in RECIPES if "/" in name}
    named = {name for name in re.findall(r"`([a-z_0-9/]+)`", PAGE) if name.split("/")[0] in folders}
    assert named <= set(RECIPES)
    experiments = [name for name in RECIPES if "/" in name and not name.startswith("dar")]
    assert [name for name in experiments if name not in named] == []
    assert len(ROWS) > 50


@pytest.mark.parametrize("name", ROWS)
def test_models_have_the_published_parameters_and_cost(name):
    model = counted(name)
    for row in ROWS[name]:
        known = entry(row)
        params, gmacs = published_params(known["config"], model) / 1e6, model.macs / 1e9
        assert row.our_cost == f"{gmacs:.2f}"
        printed = [(row.cost, known["gflops"], known["gflops_verdict"], gmacs)]
        if row.params is not None:
            assert row.our_params == f"{model.params / 1e6:.2f}"
            printed.append((row.params, known["params_m"], known["params_verdict"], params))
        for text, published, verdict, ours in printed:
            star = "" if verdict in AGREES else r" \*"
            assert text == f"{published:.2f}{star}"
            assert star or agreement(published, ours) in AGREES


TRAINED = re.findall(r"^\| .+ \| `(tocom/.+)` \| (\d+\.\d\d) \| .*$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("name", "trained"), TRAINED)
def test_models_of_tocom_train_what_the_page_says(name, trained):
    assert trained == f"{counted(name).params / 1e6:.2f}"


@pytest.mark.parametrize("name", [name for name in COMPENSATORS if name.startswith("tocom/")])
def test_compensators_have_the_parameters_of_the_page(name):
    recipe = read_recipe(name, kind=CompensateRecipe)
    backbone = replace(recipe.model.backbone(None), weights=None)
    with torch.device("meta"):
        model = wrap(backbone.create(), reduce=recipe.reduce, backbone=backbone)
        plugin = Compensator.for_model(model, recipe.compensate, recipe.steps)
    (line,) = (line for line in PAGE.splitlines() if f"| `{name}` |" in line)
    assert line.endswith(f" {sum(p.numel() for p in plugin.parameters()):,} |")


OF_EMBEDDINGS = ("real/embeddings", "real/learnt_metric")


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name.startswith(("real/elpv/", *OF_EMBEDDINGS))]
)
def test_models_of_112_pixels_have_the_weights_and_the_cost_of_the_page(name):
    classes = 0 if name in OF_EMBEDDINGS else 2
    with torch.device("meta"):
        cost = build_model(read_recipe(name, ["model.weights=null"]), classes).cost()
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    _, trained, gmacs, *_ = line.strip("| ").split(" | ")
    fixed = {"real/elpv/linear": "the head", "real/elpv/full": "all"}
    share = cost.trainable_params / cost.params
    assert trained == fixed.get(name, f"{share:.2%}".replace("%", " %"))
    assert gmacs == f"{cost.gmacs:.2f}"
    assert share < 0.02 or name == "real/elpv/full"


CLASSES = 4
BATCH, TEST = 4, 2
TRAIN = 2 * BATCH
LABELS = [number % CLASSES for number in range(TRAIN + TEST)]
FGVC = {"cub": "images", "cars": "", "dogs": "Images", "flowers": ""}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """Every data set in its published layout, with images for two updates and two test images."""
    folder, pieces = tmp_path_factory.mktemp("datasets"), pieces_of_photographs()
    train, test = LABELS[:TRAIN], LABELS[TRAIN:]
    write_cifar100(folder / "cifar100", pieces, train, test)
    write_svhn(folder / "svhn", "train", pieces[:TRAIN], [label + 1 for label in train])
    write_svhn(folder / "svhn", "test", pieces[TRAIN:][:TEST], [label + 1 for label in test])
    # One cell of each kind is drawn as a test image.
    kinds = ["0.0 mono", "1.0 poly"] * (TRAIN // 2 + TEST // 2)
    cells = [f"images/{number}.png {kind}" for number, kind in enumerate(kinds)]
    write_elpv(folder / "elpv", pieces, cells)
    dishes = [f"dish {label}/{number}" for number, label in enumerate(LABELS)]
    write_food101(folder / "food101", pieces, dishes[:TRAIN], dishes[TRAIN:])
    lines = [f"images/{number}.jpg {label}" for number, label in enumerate(LABELS)]
    lists = {"train800val200.txt": lines[:TRAIN], "test.txt": lines[TRAIN:]}
    lists |= {"train800.txt": lines[:TRAIN], "val200.txt": lines[TRAIN:]}
    write_vtab(folder / "vtab", pieces, "cifar", lists)
    for task, images in FGVC.items():
        write_fgvc(folder / task, pieces, images, TRAIN, TEST)
    names = [f"{label}/{number}.jpg" for number, label in enumerate(LABELS)]
    for root in ("imagenet", "image_folder"):
        for split in ("train", "val"):
            write_images(folder / root / split, pieces, names)
    write_images(folder / "unlabelled", pieces, names)
    write_pairs(folder / "pairs", pieces)
    for root in ("k400", "ssv2"):
        write_videos(folder / root)
    return {path.name: path for path in folder.iterdir()}


def write_videos(root: Path) -> None:
    """Lists of videos in the format of VideoMAE, which all name one clip."""
    encode(root / "clip.mp4", panned("coffee", 12, step=4))
    for split, labels in (("train", LABELS[:TRAIN]), ("val", LABELS[TRAIN:])):
        (root / f"{split}.csv").write_text("".join(f"clip.mp4 {label}\n" for label in labels))


def write_pairs(root: Path, pieces: np.ndarray) -> None:
    """Masks of two values, which suit binary masks and class indices alike."""
    for split, some in (("training", pieces[:TRAIN]), ("validation", pieces[TRAIN:][:TEST])):
        write_images(
            root / "images" / split, some, (f"{number}.jpg" for number in range(len(some)))
        )
        masks = root / "annotations" / split
        masks.mkdir(parents=True)
        for number, piece in enumerate(some):
            bright = piece.mean(axis=2) > piece.mean()
            Image.fromarray(bright.astype(np.uint8)).save(masks / f"{number}.png")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Files of small models with and without a head, for recipes that need weights."""
    folder = tmp_path_factory.mktemp("weights")
    for name, model, classes in (
        ("head", "vit_tiny_patch16_224", CLASSES),
        ("none", "vit_tiny_patch16_224", 0),
        ("dinov2", "vit_small_patch14_dinov2", 0),
    ):
        vit = timm.create_model(model, num_classes=classes, img_size=32, **SMALL)
        save_file(vit.state_dict(), folder / f"{name}.safetensors")
    return {path.stem: path for path in folder.iterdir()}


# The full depth, because recipes name layers.
SMALL = {"patch_size": 4, "embed_dim": 24, "num_heads": 3}
# Enough images to contain every kind of item.
SCENES = ("train.batch_size=16", "data.train_size=32", "data.val_size=16", "data.items=shipped")


def shrunk(name: str, roots: dict[str, Path], weights: dict[str, Path]) -> list[str]:
    """Overrides that shorten a recipe to two small updates."""
    fields = RECIPES[name]
    data, compensates = fields["data"]["name"], "compensate" in fields
    out = [f"train.batch_size={BATCH}", "train.accumulate=1"]
    if data.startswith("scene"):
        return [*out, *SCENES, *(["model.weights=null"] if name == "pretrain_scenes" else [])]
    out += [f"data.root={roots[fields['data'].get('task') if data == 'fgvc' else data]}"]
    if data == "fgvc":
        out.append("data.lists=json")
    if data not in ("image_folder", "unlabelled", "pairs"):
        out.append("data.check=false")
    headless = "dinov2" if "dinov2" in fields["model"]["name"] else "none"
    keeps_embeddings = data == "unlabelled" and not compensates
    if keeps_embeddings:
        out.append("data.val_every=3")  # so that there are enough images to compare
    without_head = keeps_embeddings or fields.get("loss") == "features"
    file = weights[headless if without_head else "head"]
    out.append(f"model.weights={file if compensates or keeps_embeddings else 'null'}")
    out += ["model.img_size=32", *(f"model.args.{key}={value}" for key, value in SMALL.items())]
    if fields["reduce"] and fields["reduce"]["name"] == "ffn_merge":
        out += ["reduce.r=16", "reduce.step=1"]  # of 64 patches, where there are 1,024
    if "frames" in fields["model"]:
        out += ["model.frames=2", "clip.test_clips=1"]
    return out


@pytest.mark.parametrize("name", RECIPES)
def test_two_updates_of_every_recipe(name, roots, weights, cli):
    command = "compensate" if name in COMPENSATORS else "train"
    code, printed, err = cli(command, name, *shrunk(name, roots, weights), "--dry-run")
    assert (code, err) == (0, "")
    assert re.search(r"train loss \d+\.\d+", printed)
