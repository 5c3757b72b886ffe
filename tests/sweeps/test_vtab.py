"""VTAB-1k: search, final runs, restart after a kill, and the table with papers."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from many_runs import TINY, marks, rows, trained
from PIL import Image
from processes import ended, start, wait_until
from sklearn.datasets import load_digits

from tokendial.data import VTAB_GROUPS, VTAB_TASKS
from tokendial.runs import Run
from tokendial.sweeps import vtab
from tokendial.sweeps.vtab_results import means, read_published
from tokendial.train import fine_tuning


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """All 19 tasks with few images: 8 + 4 for the search, 12 + 6 for the final run."""
    root = tmp_path_factory.mktemp("vtab")
    data = load_digits()
    for number, task in enumerate(VTAB_TASKS):
        folder = root / task / "images"
        folder.mkdir(parents=True)
        lines = []
        for name in range(18):
            index = 18 * number + name
            grey = Image.fromarray((data.images[index] * 15.9).astype(np.uint8)).resize((16, 16))
            grey.save(folder / f"{name}.png")
            lines.append(f"images/{name}.png {data.target[index] % VTAB_TASKS[task].classes}\n")
        for split, part in (
            ("train800", lines[:8]),
            ("val200", lines[8:12]),
            ("train800val200", lines[:12]),
            ("test", lines[12:]),
        ):
            (root / task / f"{split}.txt").write_text("".join(part))
    return root


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    own = {"output": str(tmp_path / "out"), "train": {"epochs": 2, "batch_size": 4}}
    path.write_text(yaml.safe_dump(TINY | own))
    return path


@pytest.mark.slow
def test_all_tasks_killed_in_the_middle_and_started_again_end_with_the_table(
    root, recipe, tmp_path, cli
):
    command = ["vtab", recipe, root, "data.check=false"]
    process = start(tmp_path, *command)
    out = tmp_path / "out"
    runs = {task: Run(out / "final" / task) for task in VTAB_TASKS}
    wait_until(runs["sun397"].metrics, process)  # the seventh
    process.kill()
    assert ended(process) == -signal.SIGKILL
    done = [task for task, run in runs.items() if run.finished]
    assert 6 <= len(done) < 19
    before = {task: marks(runs[task].folder) for task in done}

    code, told, _ = cli(*command)
    assert code == 0
    assert trained(told) == [f"final/{task}" for task in VTAB_TASKS if task not in done]
    assert {task: marks(runs[task].folder) for task in done} == before

    # The result is that of the last epoch, and the test set was read once.
    accuracies = {}
    for task, run in runs.items():
        first, last = run.metrics()
        assert not any(name.startswith("val_") for name in first)
        assert run.recipe().data.split == "final"
        accuracies[task] = last["val_accuracy"]
    found = {row["task"]: float(row["accuracy"]) for row in rows(out / "results.csv")}
    assert found == accuracies
    assert len(set(accuracies.values())) > 2
    of = {row["mean_over"]: row for row in rows(out / "means.csv")}
    for group, tasks in VTAB_GROUPS.items():
        assert float(of[group]["mean"]) == pytest.approx(sum(map(found.get, tasks)) / len(tasks))
        assert int(of[group]["tasks"]) == len(tasks)
    assert float(of["tasks"]["mean"]) == pytest.approx(sum(found.values()) / 19)
    assert float(of["groups"]["mean"]) == pytest.approx(
        sum(float(of[group]["mean"]) for group in VTAB_GROUPS) / 3
    )
    table = (out / "results.md").read_text()
    assert table in told
    assert f"{100 * float(of['tasks']['mean']):.2f}" in table
    assert "75.64" in table
    assert "of 19 tasks" not in table
    assert cli(*command)[:2] == (0, f"\n{table}\n")


def test_settings_are_chosen_on_the_search_split_and_tested_on_the_final_one(
    root, recipe, tmp_path, cli
):
    command = ["vtab", recipe, root, "data.check=false", "--tasks", "kitti,svhn"]
    command += ["--over", "train.lr=0.001,0.03,1e30", "--seeds", "0,1"]
    code, told, _ = cli(*command)
    assert code == 0  # a learning rate whose loss diverges loses, which is no failure
    out = tmp_path / "out"
    assert len(trained(told)) == 2 * 3 + 2 * 2
    best = {}
    for task in ("svhn", "kitti"):
        for rate in ("0.001", "0.03"):
            run = Run(out / "search" / f"{task},train.lr={rate}")
            assert run.recipe().data.split == "search"
            best.setdefault(task, []).append((run.metrics()[-1]["val_accuracy"], rate))
    chosen = {task: max(pairs, key=lambda pair: pair[0])[1] for task, pairs in best.items()}
    found = rows(out / "results.csv")
    assert [(row["task"], row["train.lr"], row["seed"]) for row in found] == [
        (task, chosen[task], seed) for task in ("svhn", "kitti") for seed in ("0", "1")
    ]
    table = (out / "results.md").read_text()
    assert "mean, natural (1 of 7 tasks)" in table
    assert "mean, specialized (0 of 4 tasks)" in table
    assert "mean of the tasks (2 of 19 tasks)" in table
    assert "87.05" in table  # the paper's mean of these two tasks
    assert "diverged" in table
    assert "±" in table
    assert len(rows(out / "search.csv")) == 6


def test_a_signal_in_the_last_run_of_the_search_stops_the_final_runs(
    root, recipe, cli, monkeypatch
):
    evaluate = fine_tuning.evaluate_loader

    def ask_to_stop(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(fine_tuning, "evaluate_loader", ask_to_stop)
    command = ["vtab", recipe, root, "data.check=false", "--tasks", "dtd"]
    code, told, _ = cli(*command, "--over", "adapt.scale=1")
    assert code == 130
    assert trained(told) == ["search/dtd,adapt.scale=1"]
    assert "search/dtd,adapt.scale=1: finished" in told


def test_a_task_whose_search_failed_is_not_tested(root, recipe, tmp_path, cli):
    partial = tmp_path / "partial"
    partial.mkdir()
    (partial / "svhn").symlink_to(root / "svhn")
    command = ["vtab", recipe, partial, "data.check=false", "--tasks", "svhn,dtd"]
    code, told, _ = cli(*command, "--over", "adapt.scale=1", "train.epochs=1")
    assert code == 1
    assert "final/svhn,adapt.scale=1: finished" in told
    assert "final/dtd" not in told
    assert "data.root: no such folder" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["mnist"]}, "tasks must be some of cifar, .*, got 'mnist'"),
        ({"seeds": [0, 0]}, "seeds must differ, got 0, 0"),
        ({"over": ["seed=0,1"]}, "over: seed cannot be chosen"),
        ({"over": ["train.evaluate=every"]}, "train.evaluate is set by this command"),
        ({"overrides": ["data.split=search"]}, "data.split is set by this command"),
        ({"overrides": ["train.epoch=1"]}, "train.epoch is not a field of a recipe"),
    ],
)
def test_mistakes_are_reported_at_once(root, recipe, settings, message):
    with pytest.raises(ValueError, match=message):
        vtab(recipe, root, **settings)


def test_published_rows_agree_with_themselves():
    sources, papers = read_published()
    assert {paper.where for paper in papers} == set(sources)
    (sparse,) = (paper for paper in papers if paper.tasks)
    assert sparse.tasks.keys() == VTAB_TASKS.keys()
    assert means(sparse.tasks)["tasks"] == pytest.approx(sparse.mean_of_tasks, abs=0.005)
    assert means(sparse.tasks)["natural"] == pytest.approx(83.4)
    for paper in papers:
        assert paper.mean_of_tasks or paper.groups.keys() == VTAB_GROUPS.keys()


def test_means_are_over_the_finished_tasks():
    assert means({"cifar": 0.2, "dtd": 0.4, "kitti": 0.9}) == pytest.approx(
        {"natural": 0.3, "structured": 0.9, "groups": 0.6, "tasks": 0.5}
    )
    assert means({}) == {}
