"""Dry runs: two updates of a recipe, nothing kept."""

import pytest
import yaml

SMALL = ("data.train_size=24", "data.val_size=6", "train.batch_size=8", "data.items=shipped")


@pytest.mark.parametrize("command", ["train", "compensate"])
def test_a_dry_run_trains_and_evaluates_and_keeps_nothing(tmp_path, monkeypatch, cli, command):
    monkeypatch.chdir(tmp_path)
    recipe = {"train": "demo", "compensate": "tocom_scenes"}[command]
    code, printed, err = cli(command, recipe, *SMALL, "--dry-run")
    assert (code, err) == (0, "")
    assert printed.startswith("dry run in ")
    assert "train loss" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_raises_the_errors_of_training(tmp_path, cli):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": "demo", "train": {"degree": 99}}))
    code, _, err = cli("train", path, *SMALL, "--dry-run")
    assert (code, err) == (2, "error: degree must be an integer in [0, 9], got 99.\n")
    code, _, err = cli("train", "demo", *SMALL, "train.batch_size=64", "--dry-run")
    assert code == 2
    assert "one update takes 64 images, but the training set has 24" in err
