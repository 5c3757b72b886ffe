"""Mask tasks from the recipe to files: training, resuming, evaluation, prediction."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from examples import perturbed
from PIL import Image
from processes import command_in, together
from safetensors.torch import load_file

import tokendial as td
from tokendial.runs import Run, read_recipe
from tokendial.train import train
from tokendial.train.fine_tuning import FineTuning

RECIPE = {
    "model": {"name": "scenes_vit", "weights": "shipped", "img_size": 48},
    "reduce": {"name": "dar", "target_ratio": 0.5},
    "adapt": {"name": "dar", "dims": [8, 6]},
    "decode": {"name": "dar", "channels": 16},
    "distill": {"weight": 0.1},
    "data": {"name": "scene_masks", "train_size": 24, "val_size": 6, "img_size": 64},
    "train": {"epochs": 2, "batch_size": 6, "lr": 0.003},
}
SEMANTIC = (
    "decode={name: mask_transformer, dim: 32, depth: 1}",
    "reduce={name: evit, r: 4}",
    "adapt={name: full}",
    "distill=null",
    "data.task=kinds",
    "dense.test=slide",
    "train.degree=2",
    "train.epochs=1",
    "train.lr=0.02",
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "masks.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def binary(file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "binary"
    return train(read_recipe(file, [f"output={output}", "train.ema=0.5"]), quiet=True)


@pytest.fixture(scope="module")
def semantic(file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "semantic"
    return train(read_recipe(file, [f"output={output}", *SEMANTIC]), quiet=True)


def test_training_records_the_metrics_of_the_task(binary, semantic):
    metrics = binary.metrics()[-1]
    assert {"val_s_measure", "val_max_f", "val_weighted_f", "val_mean_e", "val_mae"} <= set(metrics)
    assert metrics["train_loss"] < binary.metrics()[0]["train_loss"]
    assert {"val_mean_iou", "val_pixel_accuracy", "val_iou_10"} <= set(semantic.metrics()[0])
    assert binary.classes() == ("item",)
    assert len(semantic.classes()) == semantic.model().num_classes == 11


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_bits(binary, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(binary.folder, folder)
    newest = max((folder / "checkpoints").iterdir())
    newest.unlink()
    shutil.rmtree(folder / "last")
    again = train(read_recipe(folder / "recipe.yaml", [f"output={folder}"]), quiet=True)
    expected = load_file(binary.last / "model.safetensors")
    found = load_file(again.last / "model.safetensors")
    assert any("running_mean" in name for name in found)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_dial_is_calibrated_unless_another_degree_was_trained(binary, file, tmp_path):
    for folder in (binary.best, binary.last):
        calibration = td.load(folder).reducer.calibration
        assert list(calibration.thresholds) == sorted(calibration.thresholds)
        assert calibration.shares[0] > calibration.shares[-1]
    job = FineTuning(read_recipe(file, ["output=none", "train.degree=7"]))
    shutil.copytree(binary.folder, tmp_path / "run")
    copied = Run(tmp_path / "run")
    job.calibrate(copied, torch.device("cpu"))
    assert (copied.best / "config.json").read_bytes() == (binary.best / "config.json").read_bytes()


def test_the_heads_of_distillation_are_trained_but_not_saved(file):
    job = FineTuning(read_recipe(file, ["output=none"]))
    names = {n for n, p in job.module.named_parameters() if p.requires_grad}
    assert {"distillation.heads.student.0.weight", "distillation.heads.teacher.2.bias"} <= names
    trained = {id(p) for group in job.parameter_groups() for p in group["params"]}
    assert trained == {id(p) for p in job.module.parameters() if p.requires_grad}


def test_eval_prints_the_metrics_at_each_degree(semantic, cli):
    code, out, _ = cli("eval", semantic.folder, "--degrees", "0,2,4", "--batch-size", 4)
    assert code == 0
    assert "mean iou" in out
    with (semantic.folder / "eval" / "degrees.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["degree"] for row in rows] == ["0", "2", "4"]
    recorded = semantic.metrics()[-1]["val_mean_iou"]
    assert float(rows[1]["mean_iou"]) == pytest.approx(recorded, abs=1e-6)


def test_a_compensator_works_for_a_run_on_masks(semantic, tmp_path, cli):
    plugin = td.Compensator.for_model(semantic.model(), td.ToCom(rank=2), steps=4)
    perturbed(plugin).save_pretrained(tmp_path)
    options = ("--compensator", tmp_path, "--degrees", "2,4", "--batch-size", 4)
    code, _, err = cli("eval", semantic.folder, *options)
    assert (code, err) == (0, "")
    with (semantic.folder / "eval" / "bridged.csv").open(newline="") as table:
        at_source, beyond = csv.DictReader(table)
    assert at_source["plain"] == at_source["accuracy"]
    assert beyond["plain"] != beyond["accuracy"]


@pytest.fixture
def pictures(tmp_path):
    """Images of every mode, two of them with the same name, and a file that is no image."""
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    sizes = {"a.png": (333, 177), "thin.png": (1, 300), "more/a.jpg": (40, 60), "grey.png": (9, 9)}
    for name, (height, width) in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        (image.convert("L") if name == "grey.png" else image).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.mark.parametrize("kind", ["binary", "semantic"])
@pytest.mark.parametrize("tiles", [(), ("--tiles",)])
def test_predict_writes_a_mask_of_each_images_size(request, pictures, tmp_path, cli, kind, tiles):
    run, out = request.getfixturevalue(kind), tmp_path / "masks"
    options = ("--out", out, "--overlay", "--degree", 1 if kind == "binary" else 3)
    code, printed, err = cli("predict", run.folder, pictures, *options, *tiles)
    assert code == 1
    assert "broken.png is not an image" in err
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert len(rows) == 4
    assert len({row["mask"] for row in rows}) == 4
    for row in rows:
        with Image.open(row["path"]) as image, Image.open(row["mask"]) as mask:
            assert mask.size == image.size
            assert mask.mode == ("L" if kind == "binary" else "P")
            values = np.asarray(mask)
        inside = values > 127 if kind == "binary" else values > 0
        assert float(row["share"]) == pytest.approx(inside.mean(), abs=0.01)
        if kind == "semantic":
            assert values.max() <= 10
    assert sum(path.name.endswith(".overlay.png") for path in out.iterdir()) == 4


def test_a_cascade_answers_for_masks(binary, semantic, pictures, tmp_path, cli):
    run = Run(shutil.copytree(binary.folder, tmp_path / "run"))
    recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    recipe["data"]["val_size"] = 32
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    degree = run.model().degrees[-1]
    options = ("--degrees", f"{degree},0", "--max-changed", 0.6)
    code, out, err = cli("cascade", run.folder, *options)
    assert code == 0, err
    assert "IoU (%)" in out
    assert "IoU minus sending on at random" in out
    code, out, err = cli("eval", run.folder, "--cascade", "--batch-size", 8)
    assert code == 0, err
    by_cascade, *fixed = read_rows(run.folder / "eval" / "cascade.csv")
    assert [row["degrees"] for row in (by_cascade, *fixed)] == [f"{degree}→0", str(degree), "0"]
    assert "s_measure" in by_cascade
    assert 0 < float(by_cascade["early"]) < 1
    assert cli("eval", run.folder, "--degrees", f"0,{degree}")[0] == 0
    last, cheap = read_rows(run.folder / "eval" / "degrees.csv")
    for row, same in zip(fixed, (cheap, last), strict=True):
        assert float(row["s_measure"]) == pytest.approx(float(same["s_measure"]), abs=1e-6)
    expected = float(cheap["gmacs"]) + (1 - float(by_cascade["early"])) * float(last["gmacs"])
    assert float(by_cascade["gmacs"]) == pytest.approx(expected, rel=1e-4)

    def masks(*options):
        out = tmp_path / "-".join(map(str, options))
        printed = cli("predict", run.folder, pictures, "--out", out, *options)[1]
        rows = csv.DictReader(io.StringIO(printed))
        return {row["path"]: (row.get("degree"), Path(row["mask"]).read_bytes()) for row in rows}

    of_degree = {str(each): masks("--degree", each) for each in (degree, 0)}
    found = masks("--cascade")
    assert len(found) == 4
    assert all(of_degree[by][path][1] == mask for path, (by, mask) in found.items())
    for asked, options, message in (
        (run, ("predict", pictures, "--out", tmp_path / "m", "--cascade", "--tiles"), "with tiles"),
        (
            run,
            ("cascade", "--degrees", f"{degree},0", "--max-lost", 0.6),
            "max_lost is for classes",
        ),
        (semantic, ("cascade", "--degrees", "2,0", "--max-changed", 0.6), "slide: windows"),
    ):
        code, _, err = cli(options[0], asked.folder, *options[1:])
        assert (code, message in err) == (2, True)


def read_rows(path):
    with path.open(newline="") as table:
        return list(csv.DictReader(table))


def test_masks_are_predicted_in_another_precision(semantic, pictures, tmp_path, cli):
    masks = {}
    for precision in ("fp32", "bf16"):
        options = ("--out", tmp_path / precision, "--precision", precision)
        code, printed, _ = cli("predict", semantic.folder, pictures / "a.png", *options)
        assert code == 0
        (row,) = csv.DictReader(io.StringIO(printed))
        with Image.open(row["mask"]) as mask:
            masks[precision] = np.asarray(mask)
    assert 0.98 < (masks["fp32"] == masks["bf16"]).mean() < 1


def test_a_photograph_of_24_megapixels_fits_in_memory(binary, semantic, tmp_path):
    (tmp_path / "images").mkdir()
    small = Image.effect_noise((60, 40), 64).convert("RGB")
    small.resize((6000, 4000)).save(tmp_path / "images" / "large.jpg")
    for run in (binary, semantic):
        out = tmp_path / run.folder.name
        options = ("--out", str(out), "--overlay")
        together(
            1, command_in, 1.5e9, "predict", str(run.folder), str(tmp_path / "images"), *options
        )
        with Image.open(out / "large.overlay.png") as overlay:
            assert overlay.size == (6000, 4000)


def test_masks_never_overwrite_images(binary, pictures, cli):
    before = {path: path.read_bytes() for path in pictures.rglob("*.png")}
    code, _, err = cli("predict", binary.folder, pictures, "--out", pictures)
    assert code == 2
    assert "out must be another folder than that of the images, " in err
    assert {path: path.read_bytes() for path in pictures.rglob("*.png")} == before


def test_show_draws_which_tokens_were_processed(binary, pictures, tmp_path, cli):
    for options in ((), ("--diversity",)):
        out = tmp_path / "tokens.png"
        code, _, err = cli("show", binary.folder, pictures / "a.png", "--out", out, *options)
        assert (code, err) == (0, "")
        assert out.stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "predicts masks, not classes: give a folder for them"),
        (("--tiles",), "overlay and tiles are for masks, which need a folder: --out"),
    ],
)
def test_masks_need_a_folder(binary, pictures, cli, options, message):
    code, _, err = cli("predict", binary.folder, pictures, *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decode=null", "distill=null"], "decode must be a decoder for the data SceneMasks"),
        (["data={name: scenes}"], "decode must be null for the data Scenes, which have no masks"),
        (["decode=null"], "distill needs a decoder, but decode is null"),
        (["augment.flip=0.1"], "augment is for classification: with a decoder, use dense"),
        (["decode.num_classes=7"], "decode.num_classes must be 1, the number in the data, got 7"),
        (["data.img_size=20"], r"img_size must lie in \[48, 160\], got 20"),
        (["data.task=all"], "Input should be 'items' or 'kinds'"),
        (["dense.test=half"], "Input should be 'whole', 'crop' or 'slide'"),
    ],
)
def test_a_mistake_is_one_line(file, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(read_recipe(file, [f"output={tmp_path / 'run'}", *overrides]), quiet=True)


def test_a_classifier_predicts_no_masks(run, tmp_path, cli):
    code, _, err = cli("predict", run.folder, tmp_path, "--out", tmp_path / "masks")
    assert code == 2
    assert "no images found" in err
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    code, _, err = cli("predict", Run(run.folder).folder, tmp_path / "x.png", "--out", tmp_path)
    assert (code, "predicts classes, not masks" in err) == (2, True)
