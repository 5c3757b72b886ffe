"""`tokendial fit` on a real run."""

import json
import shutil
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import tokendial as td
from tokendial.runs import Run
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import check_recipe


@pytest.fixture
def fit(cli, run):
    def call(*arguments):
        return cli("fit", run.folder, "--minutes", "0.05", *arguments)

    return call


def test_a_fitted_run_is_a_run(fit, cli, run, digits, tmp_path):
    whole = run.model().cost(0).gmacs
    out = tmp_path / "fitted"
    code, printed, err = fit("--gmacs", f"{0.8 * whole},{0.6 * whole}", "--out", out)
    assert (code, err) == (0, "")
    assert "constant" in printed
    assert (out / "fit.png").stat().st_size > 1000
    told = json.loads((out / "fit.json").read_text())
    model = td.load(out)
    assert (model.degree, model.degrees) == (1, (0, 1, 2))
    removed = [tuple(degree["found"]["removed"]) for degree in told["degrees"]]
    assert model.reduce_config.r == tuple(removed)
    code, printed, _ = cli("eval", out, "--degrees", "all")
    assert code == 0
    cells = [line.split()[1] for line in printed.splitlines() if line.startswith("│")]
    assert cells[:4] == [*"012", "digit"]  # the degrees; then the classes
    image = next(digits.glob("val/*/*.png"))
    code, printed, _ = cli("predict", out, image, "--degree", "2")
    assert (code, printed.count("digit")) == (0, 3)
    assert Run(out).recipe().reduce == model.reduce_config
    # A second fit may replace the first one, but no other files.
    assert fit("--gmacs", 0.7 * whole, "--out", out, "--reduce", "evit")[0] == 0
    assert isinstance(td.load(out).reduce_config, td.EViT)


def test_images_of_a_folder_replace_missing_training_images(cli, run, digits, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run.folder, moved)
    recipe = Run(moved).recipe_file
    recipe.write_text(recipe.read_text().replace(str(digits), str(tmp_path / "gone")))
    settings = ("--gmacs", 0.7 * run.model().cost(0).gmacs, "--minutes", "0.05")
    code, _, err = cli("fit", moved, *settings)
    assert code == 2
    assert err.startswith("error: ")
    assert err.endswith("Other images can be given by calibration.\n")
    assert cli("fit", moved, *settings, "--calibration", digits / "val", "--images", 30)[0] == 0
    assert td.load(moved / "fitted").degrees == (0, 1)


def test_a_fit_starts_from_an_earlier_one(fit, run, tmp_path):
    whole = run.model().cost(0).gmacs
    assert fit("--gmacs", 0.7 * whole, "--out", tmp_path / "first")[0] == 0
    first = td.load(tmp_path / "first").reduce_config.r
    again = ("--start-from", tmp_path / "first", "--reduce", "pitome", "--out", tmp_path / "next")
    code, _, err = fit("--gmacs", 0.7 * whole, *again)
    assert (code, err) == (0, "")
    told = json.loads((tmp_path / "next" / "fit.json").read_text())
    assert list(first[0]) in [point["removed"] for point in told["searched"]]
    assert told["reduce"]["name"] == "pitome"
    (tmp_path / "next" / "fit.json").write_text("{}")
    code, _, err = fit("--gmacs", 0.7 * whole, "--start-from", tmp_path / "next", "--out", "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "next/fit.json holds no fit" in err


def test_a_run_is_fitted_for_another_runtime(fit, run, tmp_path, monkeypatch):
    """Exports take long: models of known speed stand in for what the runtime starts."""
    started = []

    def start(runtime, model, images, *, degrees, quiet):
        started.append((runtime, images.shape[0]))
        seconds = 1e-4 * sum(model.cost().tokens_per_layer)
        return lambda images: time.sleep(seconds)

    monkeypatch.setattr(td.Runtime, "start", start)
    out = tmp_path / "fitted"
    arguments = ("--speedup", "1.2", "--runtime", "onnxruntime", "--precision", "int8")
    code, printed, err = fit(*arguments, "--batch-size", 2, "--out", out)
    assert (code, err) == (0, "")
    assert "timing up to" in printed
    assert set(started) == {(td.Runtime("onnxruntime", "int8"), 2)}
    told = json.loads((out / "fit.json").read_text())
    assert (told["runtime"], told["precision"]) == ("onnxruntime", "int8")
    model = Run(out).model()
    assert sum(model.cost(0).tokens_per_layer) > 1.1 * sum(model.cost(1).tokens_per_layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speedup", "2", "--runtime", "auto"], "runtime must be one of onnxruntime, openvino"),
        (["--gmacs", "1", "--runtime", "openvino"], "gmacs are counted, not timed: runtime"),
        (["--speedup", "2", "--precision", "int8"], "precision in torch must be one of"),
        (
            ["--gmacs", "0.001", "--start-from", "vit_unknown"],
            "start_from must be a folder that holds a fit, or a backbone with a preset (vit_small",
        ),
        ([], "give one of speedup, latency_ms, gmacs"),
        (["--speedup", "fast"], "speedup must look like 2 or 1.5,2,3, got 'fast'"),
        (["--speedup", "-1"], "speedup must be above 0, got -1"),
        (["--speedup", "1000"], "speedup must lie in [1, "),
        (
            ["--gmacs", "0.001", "--reduce", "dar"],
            "reduce must be a method that removes tokens by number",
        ),
        (["--gmacs", "0.001", "--reduce", "best"], "reduce.name must be one of"),
        (["--gmacs", "0.001", "--calibration", "/none"], "calibration: no such folder: /none"),
        (["--gmacs", "0.001", "--out", "/proc"], "out: /proc exists and holds no fit"),
    ],
)
def test_mistakes_are_one_line_and_code_2(fit, arguments, message):
    code, _, err = fit(*arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a tiny backbone of timm without a head, and what makes timm build it."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=3)
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture
def shallow(monkeypatch):
    """timm's DINOv2-S has 3 blocks."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **args: create(name, depth=3, **args))


def test_a_backbone_is_fitted_by_its_embeddings(cli, weights, shallow, digits, tmp_path):
    out = tmp_path / "fitted"
    model = ("vit_small_patch14_dinov2", "--weights", weights, "--img-size", 56)
    rest = ("--images", 24, "--minutes", "0.05", "--gmacs", 0.07, "--calibration", digits / "val")
    code, printed, err = cli("fit", *model, *rest, "--out", out)
    assert (code, err) == (0, "")
    assert "1 - cosine" in printed
    assert "same neighbours" in printed
    assert f"tokendial embed {out} IMAGES" in printed
    told = json.loads((out / "fit.json").read_text())
    assert told["agree_by"] == "embeddings"
    fitted = td.load(out)
    assert (fitted.degrees, fitted.num_classes) == ((0, 1), 0)
    assert fitted.cost(1).gmacs <= 0.07 < fitted.cost(0).gmacs
    assert fitted.backbone.weights == str(weights)
    # A saved model is fitted again, by something else.
    again = ("--agree-by", "feature_map", "--out", tmp_path / "again")
    code, printed, _ = cli("fit", out, *rest, *again)
    assert (code, "same neighbours" in printed) == (0, False)
    assert json.loads((tmp_path / "again" / "fit.json").read_text())["agree_by"] == "feature_map"


def test_a_run_of_masks_is_fitted_by_its_masks(cli, tmp_path):
    recipe = check_recipe(
        {
            "output": str(tmp_path / "run"),
            "model": {
                "name": "vit_tiny_patch16_224",
                "weights": None,
                "img_size": 48,
                "args": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
            },
            "adapt": {"name": "linear"},
            "decode": {"name": "linear"},
            "data": {"name": "scene_masks", "train_size": 12, "val_size": 4},
            # Windows of the image are run, so windows are compared.
            "dense": {"test": "slide"},
        }
    )
    run = Run(recipe.output)
    splits = recipe.data.build(0)
    run.claim(recipe, splits.classes, dense=True)
    model = build_model(recipe, len(splits.classes))
    torch.nn.init.normal_(model.decoder.weight, std=0.1)
    model.save_pretrained(run.best)
    settings = ("--gmacs", 0.7 * model.cost(0).gmacs, "--minutes", "0.05")
    (tmp_path / "wide").mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        pixels = draw.integers(0, 256, (60, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "wide" / f"{number}.png")
    wide = ("--calibration", tmp_path / "wide", "--out", tmp_path / "by windows")
    assert cli("fit", run.folder, *settings, *wide)[0] == 0
    code, printed, err = cli("fit", run.folder, *settings)
    assert (code, err) == (0, "")
    assert "mask overlap" in printed
    fitted = Run(run.folder / "fitted")
    assert fitted.model().degrees == (0, 1)
    assert fitted.model().decoder is not None
    assert fitted.recipe().dense.test == "slide"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/run"], "no/run: no such folder of a run or of a saved model"),
        (["vit_tinny"], "model.name 'vit_tinny' is not a timm model; did you mean"),
        (["vit_tiny_patch16_224", "--weights", "/none"], "model.weights"),
        (["scenes_vit", "--weights", "shipped"], "calibration must be a folder of images"),
        (["transformers.ViTModel"], "weights must be given for transformers.ViTModel"),
        (
            ["transformers.ViTModel", "--weights", "x", "--img-size", "32"],
            "img_size is for timm models, got transformers.ViTModel",
        ),
        (["RUN", "--weights", "x"], "weights is for backbones that are given by name"),
        (["RUN", "--agree-by", "masks"], "agree_by masks needs a model with a decoder"),
        (["EMPTY"], "holds neither a run nor a saved model"),
    ],
)
def test_a_model_that_cannot_be_fitted_is_one_line(cli, run, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"RUN": run.folder, "EMPTY": tmp_path / "empty"}
    words = [places.get(word, word) for word in arguments]
    code, _, err = cli("fit", *words, "--gmacs", 0.001, "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_backbone_needs_a_folder_for_its_fit(cli):
    code, _, err = cli("fit", "scenes_vit", "--weights", "shipped", "--gmacs", 0.01)
    assert (code, err) == (2, "error: out must be a folder for the fitted model of scenes_vit.\n")
