"""Videos from MP4 files to predictions on the command line, for both kinds of video model."""

import csv
import io
import json
import shutil

import pytest
import torch
import yaml
from clips import encode, panned

import tokendial as td
from tokendial.runs import CompensateRecipe, Run, read_recipe, tuning
from tokendial.runtimes import Runtime
from tokendial.train.compensator_training import CompensatorTraining
from tokendial.train.fine_tuning import FineTuning

ARGS = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
RECIPE = {
    "seed": 1,
    "model": {
        "name": "vit_base_patch16_224",
        "weights": None,
        "img_size": 32,
        "frames": 4,
        "args": ARGS,
    },
    "reduce": {"name": "tome", "r": 1},
    "adapt": {"name": "full"},
    "data": {"name": "video_folder", "root": None},
    "augment": {"randaugment": "rand-m7-n2-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8},
    "clip": {"test_clips": 2, "test_crops": 3},
    "train": {"epochs": 1, "batch_size": 4, "lr": 0.003},
}
# Twelve tokens are left of both time steps of a clip together.
TUBELETS = ["model.name=videomae_base_patch16_224", "clip.sampling=dense", "clip.sampling_rate=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A camera moves over one of two images: four training and two validation videos of each."""
    root = tmp_path_factory.mktemp("videos")
    for name in ("coffee", "rocket"):
        for number in range(6):
            split = "train" if number < 4 else "val"
            pictures = panned(name, 16 + number, step=3 + number, zoom=0.01 * number)
            encode(root / split / name / f"{number}.mp4", pictures, bf="2")
    return root


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "videos.yaml"
    data = {"name": "video_folder", "root": str(folder)}
    path.write_text(yaml.safe_dump(RECIPE | {"data": data}))
    return path


@pytest.mark.parametrize("settings", [[], TUBELETS], ids=["per frame", "tubelets"])
def test_train_eval_and_predict(file, folder, tmp_path, cli, settings):
    run = tmp_path / "run"
    code, _, err = cli("train", file, f"output={run}", *settings)
    assert code == 0, err
    (metrics,) = Run(run).metrics()
    assert metrics["update"] == 2
    assert {"val_accuracy", "train_loss"} <= set(metrics)
    assert "## Cost of a clip" in (run / "README.md").read_text()

    code, out, err = cli("eval", run, "--degrees", "0,1", "--batch-size", 4)
    assert code == 0, err
    assert "clips/s" in out
    with (run / "eval" / "degrees.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["degree"] for row in rows] == ["0", "1"]
    assert float(rows[1]["accuracy"]) == pytest.approx(metrics["val_accuracy"])

    videos = sorted((folder / "val").rglob("*.mp4"))
    code, out, err = cli("predict", run, folder / "val", "--top", 2)
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["path"] for row in rows] == [str(path) for path in videos for _ in range(2)]
    right = [row["class"] == path.parent.name for row, path in zip(rows[::2], videos, strict=True)]
    assert sum(right) / 4 == pytest.approx(metrics["val_accuracy"])
    assert float(rows[0]["probability"]) + float(rows[1]["probability"]) == pytest.approx(1, 1e-4)


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    return td.train.train(read_recipe(file, [f"output={output}"]), quiet=True)


def test_unreadable_videos_are_reported_and_the_others_predicted(run, folder, tmp_path, cli):
    whole = folder / "val" / "coffee" / "4.mp4"
    shutil.copy(whole, tmp_path / "b.mp4")
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "c.mp4").write_bytes(whole.read_bytes()[:500])
    code, out, err = cli("predict", run.folder, tmp_path, "--format", "jsonl")
    assert code == 1
    assert json.loads(out)["path"] == str(tmp_path / "b.mp4")
    assert [line.split(" is ")[0] for line in err.splitlines()] == [
        f"error: {tmp_path / 'a.mp4'}",
        f"error: {tmp_path / 'c.mp4'}",
    ]


def test_a_truncated_video_stops_training_with_its_name(file, folder, tmp_path, cli):
    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    broken = root / "train" / "rocket" / "2.mp4"
    broken.write_bytes(broken.read_bytes()[:-200])
    settings = [f"data.root={root}", f"output={tmp_path / 'run'}", "train.workers=1"]
    code, _, err = cli("train", file, *settings)
    assert (code, err) == (2, f"error: {broken} is not a video, or its end is missing.\n")
    code, _, err = cli(
        "train", file, *settings, "data.broken=skip", "train.batch_size=2", "--dry-run"
    )
    assert code == 0, err


def test_compensators_refuse_videos(folder, tmp_path):
    data = f"data={{name: video_folder, root: {folder}}}"
    recipe = read_recipe("tocom_scenes", [data, "output=none"], kind=CompensateRecipe)
    with pytest.raises(ValueError, match="compensators are trained on images"):
        CompensatorTraining(recipe)


def test_a_run_on_videos_is_fitted_and_tuned(run, folder, tmp_path, cli, monkeypatch):
    fitted, budget = tmp_path / "fitted", 0.8 * run.model().cost(0).gmacs
    code, out, err = cli("fit", run.folder, "--gmacs", budget, "--minutes", 0.1, "--out", fitted)
    assert (code, err) == (0, "")
    assert "same answer" in out
    assert Run(fitted).model().cost(1).gmacs <= budget
    assert cli("predict", fitted, folder / "val")[0] == 0
    calibration = ("--calibration", folder / "val", "--out", tmp_path / "by folder")
    assert cli("fit", run.folder, "--gmacs", budget, "--minutes", 0.1, *calibration)[0] == 0
    empty = ("--calibration", tmp_path, "--out", tmp_path / "none")
    code, _, err = cli("fit", run.folder, "--gmacs", budget, *empty)
    assert (code, err) == (2, f"error: calibration: {tmp_path} holds no videos.\n")

    monkeypatch.setattr(tuning, "RUNTIMES", (Runtime(), Runtime("torch", "bf16")))
    tuned = tmp_path / "tuned"
    arguments = ("--max-loss", 100, "--speedup", 0, "--batch-size", 4, "--out", tuned)
    code, out, err = cli("tune", run.folder, *arguments)
    assert code == 0, err
    assert "cascade" not in out
    assert cli("predict", tuned, folder / "val")[0] == 0


def test_commands_for_images_refuse_runs_on_videos(run, folder, cli):
    code, _, err = cli("show", run.folder, folder / "val" / "coffee" / "4.mp4")
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"{run.folder} is a run on videos" in err
    code, _, err = cli("predict", run.folder, folder, "--out", folder / "masks")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "predicts classes, not masks" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.frames=null"], "model.frames must be a number such as 8 for a data set of videos"),
        (["augment.test_crop_ratio=1"], "augment.test_crop_ratio is for images"),
        (["clip.test_clips=0"], "clip: test_clips must be at least 1, got 0"),
        (
            ["clip.test_clip=2"],
            "clip.test_clip is not a field of a recipe; did you mean clip.test_clips",
        ),
        (["data={name: scenes}"], "clip is for videos, but the data Scenes are not"),
        (
            ["data={name: scenes}", "clip={}"],
            "data must be a data set of videos for a model of 4 fra",
        ),
        (
            ["decode={name: linear}", "augment={}"],
            "decode must be null for the data VideoFolder, which have",
        ),
    ],
)
def test_recipes_that_do_not_fit_videos_are_one_line(file, settings, message):
    with pytest.raises(ValueError, match=message):
        FineTuning(read_recipe(file, ["output=none", *settings]))


def test_a_dial_by_threshold_is_calibrated_on_clips(file, tmp_path):
    settings = ["reduce={name: dyt}", "adapt={name: adaptformer, dim: 8}", "augment={}"]
    run = td.train.train(read_recipe(file, [f"output={tmp_path / 'run'}", *settings]), quiet=True)
    calibration = td.load(run.best).reducer.calibration
    assert list(calibration.thresholds) == sorted(calibration.thresholds)


def test_a_run_with_loading_processes_sees_the_same_clips(run, file, tmp_path):
    settings = [f"output={tmp_path / 'run'}", "train.workers=2"]
    again = td.train.train(read_recipe(file, settings), quiet=True)
    expected = dict(td.load(run.last).named_parameters())
    for name, value in td.load(again.last).named_parameters():
        assert torch.equal(value, expected[name])
