"""Run folders: one process at a time, damaged files, leftovers of killed processes."""

import logging
import os
import re
import shutil
import signal

import pytest
import torch
from limits import files_of_at_most
from processes import start_to_hold
from safetensors.torch import load_file

from tokendial.model.loading import write_files
from tokendial.runs import Run, read_recipe
from tokendial.train import train
from tokendial.train.checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint


def state(number):
    names = ("position", "buffers", "optimizer", "ema", "scaler")
    draw = torch.Generator().manual_seed(number)
    return dict.fromkeys(names) | {"weights": {"w": torch.randn(50, 50, generator=draw)}}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_two_bits(path):
    data = bytearray(path.read_bytes())
    weights = state(2)["weights"]["w"].numpy().tobytes()
    first = data.index(weights)
    data[first + 2] ^= 64
    data[first + 4003] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 50),
    "another file": lambda path: torch.save({"weights": {}}, path),
    "two bits": flip_two_bits,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_and_named(tmp_path, caplog, damage):
    for number in (1, 2):
        save_checkpoint(tmp_path, number, state(number))
    first, second = sorted(tmp_path.iterdir())
    DAMAGES[damage](second)
    assert newest_checkpoint(tmp_path) == first
    assert torch.equal(read_checkpoint(first)["weights"]["w"], state(1)["weights"]["w"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages[0].startswith(f"{second} is damaged (")
    DAMAGES["cut"](first)
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be read; remove"):
        newest_checkpoint(tmp_path)


def test_the_newest_two_checkpoints_are_kept_and_later_ones_deleted(tmp_path):
    for number in (1, 2, 9, 3):
        save_checkpoint(tmp_path, number, state(number))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "update-00000002.pt",
        "update-00000003.pt",
    ]


def test_a_run_whose_last_checkpoint_is_damaged_ends_with_the_same_bits(
    recipe_file, tmp_path, caplog
):
    recipe = read_recipe(recipe_file, [f"output={tmp_path / 'run'}", "train.epochs=2"])
    run = train(recipe, quiet=True)
    weights, metrics = load_file(run.last / "model.safetensors"), run.metrics()
    cut(max(run.checkpoints.iterdir()))
    train(recipe, quiet=True)
    assert "update-00000024.pt is damaged" in caplog.text
    again = load_file(run.last / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in again.items())
    assert [line["train_loss"] for line in run.metrics()] == [m["train_loss"] for m in metrics]


@pytest.mark.parametrize("name", ["recipe.yaml", "classes.json", "metrics.jsonl"])
def test_damaged_records_are_named(run, tmp_path, name):
    copied = Run(shutil.copytree(run.folder, tmp_path / "run"))
    (copied.folder / name).write_text("{[")
    with pytest.raises(ValueError, match=re.escape(name) + " is damaged: "):
        copied.recipe(), copied.classes(), copied.metrics()


def test_a_run_belongs_to_one_process_until_it_ends(recipe_file, tmp_path):
    run = Run(tmp_path / "run")
    recipe = read_recipe(recipe_file, [f"output={run.folder}", "train.epochs=1"])
    other = start_to_hold(run)
    try:
        refused = rf"output: .*run is in use by process {other.pid} on .*, which may be suspended"
        with pytest.raises(ValueError, match=refused):
            train(recipe, quiet=True)
        os.kill(other.pid, signal.SIGSTOP)
        with pytest.raises(ValueError, match=refused):
            train(recipe, quiet=True)
        assert not run.recipe_file.exists()
    finally:
        other.kill()
        other.join()
    assert train(recipe, quiet=True).metrics()


def test_a_disk_without_locks_is_reported_and_used(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with Run(tmp_path / "run").locked():
        pass
    assert "takes no locks" in caplog.text


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(run, tmp_path):
    copied = Run(shutil.copytree(run.folder, tmp_path / "run"))
    left = [
        copied.folder / ".metrics.jsonl.ab1_z9xx",
        copied.checkpoints / ".update-00000024.pt.abcdefgh",
        copied.best / ".model.safetensors.01234567",
        copied.last / ".config.json.abcdefgh",
    ]
    for path in left:
        path.write_text("half")
    mine = copied.folder / ".notes.metrics.jsonl.abcdefgh"
    mine.write_text("mine")
    before = {path for path in copied.folder.rglob("*") if path not in left}
    with copied.locked():
        assert set(copied.folder.rglob("*")) == before


def test_a_folder_with_other_files_gets_no_lock(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"), Run(tmp_path).locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda folder: save_checkpoint(folder, 1, state(2)), "update-00000001.pt"),
        (
            lambda folder: write_files(folder, {}, {"w": torch.zeros(50, 50)}),
            "model.safetensors",
        ),
    ],
    ids=["checkpoint", "model"],
)
def test_a_full_disk_is_reported_in_one_line_and_the_old_file_stays(tmp_path, write, name):
    (tmp_path / name).write_text("old")
    with files_of_at_most(4000), pytest.raises(OSError, match="the file stays as it was") as told:
        write(tmp_path)
    assert told.value.filename == str(tmp_path / name)
    assert len(str(told.value).splitlines()) == 1
    assert (tmp_path / name).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [name]
