"""Runs on data sets in their published formats, by unchanged recipes."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from tokendial.runs import read_recipe
from tokendial.train import train
from tokendial.train.fine_tuning import FineTuning


@pytest.fixture
def vtab(digits, tmp_path):
    """The digits as VTAB's task of four classes."""
    folder = tmp_path / "kitti"
    folder.mkdir()
    for split, name in (("train", "train800val200.txt"), ("val", "test.txt")):
        (folder / split).symlink_to(digits / split)
        lines = [
            f"{path.relative_to(digits)} {path.parent.name[-1]}"
            for path in sorted((digits / split).rglob("*.png"))
        ]
        (folder / name).write_text("\n".join(lines))
    return ["data.name=vtab", f"data.root={tmp_path}", "data.task=kitti", "data.check=false"]


@pytest.fixture
def shards(digits, tmp_path):
    """The digits as one shard for each class."""
    for path in sorted(digits.rglob("*.png")):
        split, label = path.parts[-3], path.parent.name[-1]
        with tarfile.open(tmp_path / f"{split}-{label}.tar", "a") as tar:
            for suffix, content in (("png", path.read_bytes()), ("cls", label.encode())):
                info = tarfile.TarInfo(f"{path.stem}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    patterns = (f'data.{split}="{tmp_path}/{split}-{{0..3}}.tar"' for split in ("train", "val"))
    return ["data.name=webdataset", *patterns, "data.classes=4", "train.workers=1"]


@pytest.mark.parametrize("settings", ["vtab", "shards"])
def test_two_epochs(request, settings, recipe_file, tmp_path):
    overrides = [*request.getfixturevalue(settings), "train.epochs=2", f"output={tmp_path}/run"]
    # The recipe names a folder, which shards have none of.
    overrides = ["data={}", *overrides]
    run = train(read_recipe(recipe_file, overrides), quiet=True)
    metrics = run.metrics()
    assert [line["epoch"] for line in metrics] == [1, 2]
    assert metrics[1]["train_loss"] < metrics[0]["train_loss"]
    assert run.classes() == ("class 0", "class 1", "class 2", "class 3")


def test_a_single_class_is_refused_in_one_line(cli, digits, recipe_file, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(digits / split / "digit 1", tmp_path / split / "one")
    code, _, err = cli("train", recipe_file, f"data.root={tmp_path}", f"output={tmp_path}/run")
    assert (code, err) == (
        2,
        "error: data: classification needs at least 2 classes to tell apart, got 1: 'one'.\n",
    )


def test_a_class_without_validation_images_is_reported(digits, recipe_file, tmp_path, caplog):
    shutil.copytree(digits, tmp_path / "digits")
    shutil.rmtree(tmp_path / "digits" / "val" / "digit 2")
    (tmp_path / "digits" / "val" / "digit 2").mkdir()
    shutil.rmtree(tmp_path / "digits" / "val" / "digit 3")
    FineTuning(read_recipe(recipe_file, [f"data.root={tmp_path / 'digits'}"]))
    assert caplog.messages == [
        "there is nothing to validate on of 2 of 4 classes ('digit 2', 'digit 3'): "
        "scores say nothing about such classes"
    ]


@pytest.fixture
def elsewhere(digits, recipe_file, tmp_path, monkeypatch):
    """A run that was trained on the relative path `digits`, from another working folder."""
    trained, other = tmp_path / "trained", tmp_path / "other"
    other.mkdir()
    shutil.copytree(digits, trained / "digits")
    monkeypatch.chdir(trained)
    settings = ["data.root=digits", "train.epochs=1", f"output={tmp_path / 'run'}"]
    run = train(read_recipe(recipe_file, settings), quiet=True)
    monkeypatch.chdir(other)
    return run


def test_relative_data_of_a_run_are_found_from_every_folder(elsewhere, cli):
    # The present folder has other data of the same name.
    (Path.cwd() / "digits").mkdir()
    code, out, _ = cli("eval", elsewhere.folder, "--degrees", "0")
    assert (code, "accuracy" in out) == (0, True)


def test_data_that_have_moved_are_looked_up_in_the_present_folder(elsewhere, tmp_path, cli):
    (tmp_path / "trained" / "digits").rename("digits")
    assert cli("eval", elsewhere.folder, "--degrees", "0")[0] == 0
    Path("digits").rename("gone")
    code, _, err = cli("eval", elsewhere.folder, "--degrees", "0")
    assert (code, err) == (
        2,
        f"error: data.root: no such folder: digits (looked up in {tmp_path / 'other'}).\n",
    )


def test_other_data_of_the_same_name_are_another_run(elsewhere, tmp_path, recipe_file, cli):
    shutil.copytree(tmp_path / "trained" / "digits", "digits")
    settings = ["data.root=digits", "train.epochs=1", f"output={elsewhere.folder}"]
    code, _, err = cli("train", recipe_file, *settings)
    assert code == 2
    assert "holds another run: its data were looked up in" in err


def test_a_run_is_not_evaluated_on_other_classes(elsewhere, tmp_path, cli):
    (tmp_path / "trained/digits/train/digit 1").rename(tmp_path / "trained/digits/train/new")
    shutil.rmtree(tmp_path / "trained/digits/val/digit 1")
    code, _, err = cli("eval", elsewhere.folder, "--degrees", "0")
    assert code == 2
    assert "are no longer those that" in err
    assert "(4 then, 4 now; what differs: digit 1)" in err
