"""Sweeps: names of runs, resuming, sharing between processes, stopping, tables."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from many_runs import TINY, marks, rows, trained
from processes import ended, start, wait_until

from tokendial.runs import Run
from tokendial.sweeps import sweep
from tokendial.sweeps.combinations import plan_runs, read_over, run_name
from tokendial.sweeps.parallel_runs import run_all


@pytest.fixture
def recipe(digits, tmp_path) -> Path:
    """A recipe with four training and two validation images of each digit."""
    for split, count in (("train", 4), ("val", 2)):
        for folder in (digits / split).iterdir():
            few = tmp_path / "few" / split / folder.name
            few.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, few)
    path = tmp_path / "tiny.yaml"
    data = {
        "data": {"name": "image_folder", "root": str(tmp_path / "few")},
        "output": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(TINY | data))
    return path


def test_values_are_yaml_and_may_be_lists():
    over = read_over(["reduce.layers=[4,7],[3, 6]", "train.lr=1e-3, 0.1", "adapt.name=lora,null"])
    assert over == {
        "reduce.layers": ["[4, 7]", "[3, 6]"],
        "train.lr": ['"1e-3"', "0.1"],
        "adapt.name": ['"lora"', "null"],
    }


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["seed"], "over must look like seed=0,1,2, got 'seed'"),
        (["seed="], "over must look like seed=0,1,2, got 'seed='"),
        (["seed=0", "seed=1"], "over: seed cannot be swept twice"),
        (["output=a,b"], "over: output cannot be swept"),
        (["seed=0,1,0"], "over: seed is 0 twice"),
        (["seed=[0"], r"over: seed: '\[0' is not a list of YAML values"),
        (["train.epoch=1,2"], "train.epoch is not a field of a recipe; did you mean train.epochs?"),
        (["train.lr=0.1,-1"], "train.lr: Input should be greater than 0, got -1"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_trained(recipe, over, message):
    with pytest.raises(ValueError, match=message):
        sweep(recipe, over=over)
    assert not (recipe.parent / "out").exists()


def test_names_of_folders_depend_on_the_settings_alone():
    assert run_name({"seed": "2", "adapt.scale": "0.1"}) == "adapt.scale=0.1,seed=2"
    assert run_name({"adapt.scale": "0.1", "seed": "2"}) == "adapt.scale=0.1,seed=2"
    odd = [
        run_name({"data.root": value}) for value in ('"a/b"', '"a b"', '"../b"', f'"{300 * "x"}"')
    ]
    assert len(set(odd)) == 4
    for name in odd:
        assert "/" not in name
        assert " " not in name
        assert len(name) < 150
    layers = run_name({"reduce.layers": "[4, 7]"})
    assert layers.startswith("reduce.layers=-4-7") or layers.startswith("reduce.layers=-4,-7")


def test_a_sweep_trains_each_combination_once_and_reports_failures(recipe, tmp_path, cli):
    command = ["sweep", recipe, "--over", "seed=0,1", "--over", "train.lr=0.001,1e30"]
    code, out, _ = cli(*command)
    assert code == 1
    assert len(trained(out)) == 4
    folder = tmp_path / "out"
    good = [folder / f"train.lr=0.001,seed={seed}" for seed in (0, 1)]
    found = rows(folder / "results.csv")
    assert [row["folder"] for row in found if not row["error"]] == [str(run) for run in good]
    for row in found[1::2]:
        assert row["train.lr"] == "1e30"
        assert row["error"].startswith("the loss is not finite at update")
    values = [Run(run).metrics()[-1]["val_accuracy"] for run in good]
    assert [float(row["accuracy_last"]) for row in found[::2]] == values
    (means,) = rows(folder / "means.csv")
    assert means["seeds"] == "2"
    assert float(means["accuracy_last_mean"]) == pytest.approx(sum(values) / 2)
    assert float(means["accuracy_last_std"]) == pytest.approx(
        abs(values[0] - values[1]) / 2**0.5  # sample standard deviation
    )
    written = (folder / "results.md").read_text()
    assert written in out
    assert f"{100 * values[0]:.2f}" in written
    assert "$\\pm$" in (folder / "results.tex").read_text()

    before = [marks(run) for run in good]
    code, out, _ = cli(*command)
    assert code == 1
    assert trained(out) == []
    assert rows(folder / "results.csv") == found  # the diverged run is still in the table
    assert [marks(run) for run in good] == before
    code, out, _ = cli(*command[:4])
    assert code == 0
    assert trained(out) == ["seed=0", "seed=1"]  # the recipe's learning rate makes them other runs


def test_a_sweep_leaves_another_run_alone(recipe, tmp_path, cli):
    assert cli("sweep", recipe, "--over", "seed=0")[0] == 0
    code, out, _ = cli("sweep", recipe, "train.epochs=2", "--over", "seed=0")
    assert code == 1
    assert "holds another run: its train.epochs is 1, not 2" in out
    run = tmp_path / "out" / "seed=0"
    code, _, err = cli("sweep", recipe, f"output={run}", "--over", "seed=1")
    assert code == 2
    assert "seed=0 holds a run; choose another output for the sweep" in err
    assert cli("sweep", recipe) == (2, "", "error: over: what is to be swept is missing, such as "
                                    "--over seed=0,1,2.\n")  # fmt: skip


@pytest.mark.parametrize("jobs", [None, 3])
def test_processes_get_a_gpu_each_in_turn(recipe, tmp_path, monkeypatch, jobs):
    """Two GPUs are faked. The processes print their GPU and fail."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "error: on $CUDA_VISIBLE_DEVICES"; sleep 0.3; exit 2\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    errors = run_all(plan_runs(recipe, [], {"seed": ["0", "1", "2"]}), jobs=jobs, quiet=True)
    assert [errors["seed=0"], errors["seed=1"]] == ["on 4", "on 7"]
    if jobs == 3:
        assert errors["seed=2"] == "on 4"


@pytest.mark.slow
def test_two_processes_share_a_sweep(recipe, tmp_path, cli):
    command = ["sweep", recipe, "--over", "seed=0,1,2,3", "train.epochs=4"]
    other = start(tmp_path, *command)
    runs = [Run(tmp_path / "out" / f"seed={seed}") for seed in range(4)]
    wait_until(runs[0].folder.exists, other)
    code, mine, _ = cli(*command)
    assert (code, ended(other)) == (0, 0)
    theirs = (tmp_path / "stdout").read_text()
    assert sorted(trained(mine) + trained(theirs)) == [f"seed={seed}" for seed in range(4)]
    assert "seed=0" in trained(theirs)
    assert trained(mine)
    for run in runs:
        assert len(list((run.folder / "logs" / "tokendial").glob("events*"))) == 1
        # Each process reports all runs, also those that the other one trained.
        accuracy = f"{100 * run.metrics()[-1]['val_accuracy']:.2f}"
        assert all(
            f"| {run.folder.name[-1]}    |" in out and accuracy in out for out in (mine, theirs)
        )


def ask_to_stop(number: int, when: Callable[[], object]) -> None:
    """Send this process a signal as soon as a condition holds."""

    def watch() -> None:
        while not when():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.slow
def test_a_sweep_stops_on_a_signal_and_continues_later(recipe, tmp_path, cli):
    command = ["sweep", recipe, "train.epochs=5000", "--over", "seed=0,1"]
    runs = [Run(tmp_path / "out" / f"seed={seed}") for seed in (0, 1)]
    ask_to_stop(signal.SIGINT, lambda: all(run.metrics() for run in runs))
    code, _, err = cli(*command, "--jobs", 2)
    assert (code, err) == (130, "stopped; the same command continues from here\n")
    before = [run.metrics() for run in runs]
    # No other process holds a lock any more, so this one resumes the first run.
    ask_to_stop(signal.SIGTERM, lambda: len(runs[0].metrics()) > len(before[0]))
    code, out, err = cli(*command)
    assert (code, err) == (130, "stopped; the same command continues from here\n")
    assert trained(out) == ["seed=0"]
    assert "resuming at update" in out
    assert runs[0].metrics()[: len(before[0])] == before[0]
    assert runs[1].metrics() == before[1]
