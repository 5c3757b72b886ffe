"""Several processes give the results of one: with DDP, with FSDP, in dry runs, with few images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from processes import FSDP, command, evaluate_every_task, together, train_spread
from safetensors.torch import load_file

import tokendial as td
from tokendial.runs import Run, read_recipe
from tokendial.train import train

# Adapters and head are trained, with everything that keeps state; the backbone is frozen.
RECIPE = {
    "seed": 1,
    "model": {
        "name": "vit_tiny_patch16_224",
        "weights": None,
        "img_size": 24,
        "args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    },
    "reduce": {"name": "tome", "r": 3},
    "adapt": {"name": "adaptformer", "dim": 5},
    "augment": {"crop": False, "flip": 0.5},
    "train": {
        "epochs": 2,
        "lr": 0.003,
        "accumulate": 2,
        "ema": 0.9,
        "clip_grad": 1.0,
        "degrees": {"sandwich": 1},  # several passes per update, too
    },
}
ONE, EACH_OF_TWO = "train.batch_size=20", "train.batch_size=10"


@pytest.fixture(scope="module")
def recipe_file(digits, tmp_path_factory) -> Path:
    """A recipe with 79 validation images, which two processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("odd")
    shutil.copytree(digits, folder / "digits")
    (folder / "digits" / "val" / "digit 2" / "7.png").unlink()
    path = folder / "recipe.yaml"
    data = {"name": "image_folder", "root": str(folder / "digits")}
    path.write_text(yaml.safe_dump(RECIPE | {"data": data}))
    return path


@pytest.fixture(scope="module")
def one(recipe_file) -> Run:
    output = recipe_file.parent / "one"
    return train(read_recipe(recipe_file, [f"output={output}", ONE]), quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(run: Run, one: Run) -> None:
    for mine, theirs in zip(run.metrics(), one.metrics(), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-4)
        assert mine["val_accuracy"] == theirs["val_accuracy"]
    for which in ("best", "last"):
        expected = weights(one.folder / which)
        for name, value in weights(run.folder / which).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_train_like_one_with_twice_the_batch(recipe_file, one, tmp_path, environment):
    run = Run(tmp_path / "two")
    arguments = ("train", str(recipe_file), f"output={run.folder}", EACH_OF_TWO)
    together(2, command, tmp_path, *arguments, environment=environment)
    assert_same(run, one)


def test_a_killed_fsdp_run_is_resumed_with_fsdp_or_without(recipe_file, one, tmp_path):
    settings = [EACH_OF_TWO, "train.checkpoint_every=4"]
    recipe = read_recipe(recipe_file, [f"output={tmp_path / 'killed'}", *settings])
    together(2, train_spread, recipe, 9, environment=FSDP)
    killed, copied = Run(recipe.output), Run(tmp_path / "copied")
    assert [line["epoch"] for line in killed.metrics()] == [1]
    shutil.copytree(killed.folder, copied.folder)
    together(2, train_spread, recipe, None, environment=FSDP)
    arguments = ("train", str(recipe_file), f"output={copied.folder}", *settings)
    together(2, command, tmp_path, *arguments)
    images = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for run in (killed, copied):
        assert_same(run, one)
        torch.testing.assert_close(
            td.load(run.best)(images), td.load(one.best)(images), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version must be 2, got 1"),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fsdp_activation_checkpointing must be false, got true",
        ),
    ],
)
def test_fsdp_in_another_form_is_refused(recipe_file, tmp_path, monkeypatch, flag, message):
    for name, value in (FSDP | flag).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(read_recipe(recipe_file, [f"output={tmp_path / 'run'}", ONE]), quiet=True)


def test_every_image_counts_alike_in_the_metrics_of_every_task(tmp_path):
    sizes = [7, 1]  # an odd number, and fewer images than processes
    evaluate_every_task(tmp_path, sizes)
    expected = json.loads((tmp_path / "0 of 1.json").read_text())
    together(2, evaluate_every_task, tmp_path, sizes)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank} of 2.json").read_text())
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-6, nan_ok=True)


def test_a_dry_run_in_two_processes_reports_once(recipe_file, tmp_path):
    output = tmp_path / "run"
    together(2, command, tmp_path, "train", str(recipe_file), f"output={output}", ONE, "--dry-run")
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first.startswith("dry run in ")
    assert second == ""
    assert not output.exists()
