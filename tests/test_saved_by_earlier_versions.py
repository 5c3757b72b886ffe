"""What earlier versions wrote is read as they read it.

`fixtures/saved_by_0_1` holds what 0.1 wrote: a saved model for each reduction method and several
adapters, a compensator, and a run folder with a checkpoint in mid-epoch. `logits.safetensors`
holds what 0.1 computed with the models. A renamed setting, method, weight or file fails here.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from examples import images
from safetensors.torch import load_file

import tokendial as td
from tokendial.runs import Run
from tokendial.train import train

SAVED = Path(__file__).parent / "fixtures" / "saved_by_0_1"
LOGITS = load_file(SAVED / "logits.safetensors")
MODELS = sorted(path.name for path in SAVED.iterdir() if path.name in LOGITS)


def assert_same(actual: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual, LOGITS[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_give_the_same_logits(name):
    assert_same(td.load(SAVED / name)(images(2)), name)


@torch.no_grad()
def test_a_compensator_gives_the_same_logits():
    model = td.load(SAVED / "adaptformer")
    td.Compensator.from_pretrained(SAVED / "compensator").attach(model)
    model.set_degree(2)
    assert_same(model(images(2)), "adaptformer with compensator")


def test_every_model_was_looked_at():
    assert len(MODELS) == 10


@pytest.fixture
def run(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED / "run", tmp_path / "run"))


def test_a_run_is_evaluated_as_before(cli, run):
    code, _, _ = cli("eval", run)
    assert code == 0
    table = Path("eval", "degrees.csv")
    rows, before = (
        list(csv.DictReader((f / table).read_text().splitlines())) for f in (run, SAVED / "run")
    )
    same = ("degree", "accuracy", "tokens")
    assert [[row[n] for n in same] for row in rows] == [[row[n] for n in same] for row in before]
    # ToMe has compared prefix tokens with others then, and does not any more.
    now, then = ([float(row["gmacs"]) for row in each] for each in (rows, before))
    assert now == pytest.approx(then, rel=1e-3)


def test_a_run_goes_on_from_its_checkpoint(run):
    expected = load_file(run / "last" / "model.safetensors")
    shutil.rmtree(run / "last")
    metrics = run / "metrics.jsonl"
    losses = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text(json.dumps(losses[0]) + "\n")
    recipe = Run(run).recipe()
    train(recipe.model_copy(update={"output": str(run)}), quiet=True)
    found = load_file(run / "last" / "model.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)
    assert [line["epoch"] for line in Run(run).metrics()] == [1, 2]
