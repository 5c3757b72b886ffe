"""Runs on sets in their published formats, by recipes as they are."""

import io
import shutil
import tarfile

import pytest

from tokendial.train import read_recipe, train
from tokendial.train.finetune import FineTuning


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


def test_a_class_that_is_not_validated_on_is_told(digits, recipe_file, tmp_path, caplog):
    shutil.copytree(digits, tmp_path / "digits")
    shutil.rmtree(tmp_path / "digits" / "val" / "digit 2")
    (tmp_path / "digits" / "val" / "digit 2").mkdir()
    shutil.rmtree(tmp_path / "digits" / "val" / "digit 3")
    FineTuning(read_recipe(recipe_file, [f"data.root={tmp_path / 'digits'}"]))
    assert caplog.messages == [
        "there is nothing to validate on of 2 of 4 classes ('digit 2', 'digit 3'): "
        "scores say nothing about such classes"
    ]
