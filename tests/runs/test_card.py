"""Files that document a run: versions and the draft of a model card."""

import json
import re
import shutil
from itertools import pairwise

import pytest
import torch
from examples import tiny_vit

import tokendial as td
from tokendial.runs import Run, read_recipe
from tokendial.runs.degrees import spread_degrees
from tokendial.train import train


def test_versions_are_those_that_ran(run):
    versions = json.loads((run.folder / "versions.json").read_text())
    assert versions["tokendial"] == td.__version__
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert {"timm", "python", "machine", "git"} <= versions.keys()


def test_the_card_shows_metrics_and_cost_of_the_best_model(run):
    card = (run.folder / "README.md").read_text()
    best = max(record["val_accuracy"] for record in run.metrics())
    assert f"| accuracy | {100 * best:.2f} |" in card
    assert "4 classes" in card.replace("\n", " ")
    model = run.model()
    assert "ToMe(r=2" in card
    for degree in (0, model.degree, model.degrees[-1]):
        assert f"| {degree} | {model.cost(degree).gmacs:.4g} | " in card


@pytest.mark.parametrize("trained", [0, 5, 32])
def test_degrees_of_the_card_are_evenly_spaced_in_cost(trained):
    model = td.wrap(tiny_vit(depth=3), reduce=td.ToMe(r=8))
    model.set_degree(trained)
    degrees = spread_degrees(model, 5)
    assert {0, trained, model.degrees[-1]} <= set(degrees)
    assert 5 <= len(degrees) <= 6
    costs = [model.cost(degree).macs for degree in degrees]
    gaps = [before - after for before, after in pairwise(costs)]
    even = (costs[0] - costs[-1]) / 4
    # Evenly spaced degrees would be up to two such gaps apart in cost.
    assert max(gaps) < 1.6 * even
    assert min(gaps) > 0.4 * even


def test_the_cost_of_a_run_is_recorded(run):
    assert run.cost_file.is_file()
    assert run.cost() == run.model().cost()


def test_a_run_is_finished_after_its_last_epoch_with_its_card(run, tmp_path):
    assert run.finished
    shutil.copytree(run.folder, tmp_path / "run")
    copy = Run(tmp_path / "run")
    copy.card_file.unlink()
    assert not copy.finished
    copy.card_file.write_text("mine")
    copy.record(copy.metrics()[-2])
    assert not copy.finished


def test_the_code_of_the_card_runs(run):
    code = re.search(r"```python\n(.*?)```", (run.folder / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code[1], names)
    assert names["model"](torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_a_card_that_was_edited_by_hand_is_kept(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "README.md").write_text("mine")
    train(read_recipe(run.recipe_file, [f"output={tmp_path / 'run'}"]), quiet=True)
    assert (Run(tmp_path / "run").folder / "README.md").read_text() == "mine"
