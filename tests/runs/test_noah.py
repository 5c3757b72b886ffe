"""NOAH from the command line: train the supernet, search its best subnet, train that anew."""

import json

import pytest
import torch

import tokendial as td
from tokendial.runs import Run, read_recipe
from tokendial.runs.evaluate import evaluate_loader, validation_set
from tokendial.runs.noah import search_subnet
from tokendial.train import train
from tokendial.train.loop import Trainer
from tokendial.tune.subnet_search import Evolution

SUPERNET = "{name: noah_supernet, prompts: [1, 3], rank: [1, 2], dim: [1, 4], depths: [1, 3]}"
SEARCH = ["--population", 6, "--parents", 2, "--mutations", 2, "--crossovers", 2, "--rounds", 2]
SMALL = Evolution(population=6, parents=2, mutations=2, crossovers=2, rounds=2)
LIMIT = 1500


@pytest.fixture(scope="module")
def supernet(recipe_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("noah") / "supernet"
    changes = [f"adapt={SUPERNET}", "train.epochs=2", "reduce=null", f"output={output}"]
    return train(read_recipe(recipe_file, changes), quiet=True)


def test_the_whole_chain(supernet, cli):
    code, out, err = cli("noah", supernet.folder, "--max-parameters", "1.5k", *SEARCH)
    assert code == 0, err
    assert "round 2: 18 subnets, best" in err
    recipe = supernet.folder / "subnet.yaml"
    assert f"wrote {recipe}: tokendial train {recipe}" in out
    subnet = read_recipe(recipe).adapt
    assert isinstance(subnet, td.NOAH)
    for name in ("prompts", "rank", "dim"):
        assert " │ ".join(map(str, getattr(subnet, name))) in out
    code, out, err = cli("train", recipe, "train.epochs=1")
    assert code == 0, err
    model = Run(supernet.folder / "subnet").model()
    count = sum(parameter.numel() for parameter in model.adapter.parameters())
    assert count <= LIMIT
    _, out, _ = cli("noah", supernet.folder, "--max-parameters", LIMIT, *SEARCH)
    assert f"{count:,} parameters" in out


def test_the_score_is_that_of_the_subnet_in_the_supernet(supernet):
    found = search_subnet(supernet, LIMIT, evolution=SMALL, device="cpu")
    model = supernet.model()
    task, loader = validation_set(supernet, model, 64)
    model.adapter.use(found.subnet)
    assert evaluate_loader(model, loader, task)[found.metric] == found.score
    assert found.widths == found.subnet.widths(3)
    assert found.judged == 18


def test_a_search_that_was_stopped_continues_and_finds_the_same(supernet, monkeypatch, tmp_path):
    file = supernet.folder / "noah.json"
    file.unlink(missing_ok=True)
    whole = search_subnet(supernet, LIMIT, evolution=SMALL, device="cpu")
    written = file.read_text()
    file.unlink()
    judged = []

    def stop_after(count):
        def judge(*arguments):
            if len(judged) == count:
                raise KeyboardInterrupt
            judged.append(1)
            return evaluate_loader(*arguments)

        monkeypatch.setattr("tokendial.runs.noah.evaluate_loader", judge)

    stop_after(7)
    with pytest.raises(KeyboardInterrupt):
        search_subnet(supernet, LIMIT, evolution=SMALL, device="cpu")
    stop_after(99)
    assert search_subnet(supernet, LIMIT, evolution=SMALL, device="cpu") == whole
    assert len(judged) == 18
    assert file.read_text() == written
    assert search_subnet(supernet, LIMIT, evolution=SMALL, device="cpu") == whole
    assert len(judged) == 18  # all were known
    file.write_text(json.dumps(json.loads(written) | {"revision": "another"}))
    search_subnet(supernet, LIMIT, evolution=SMALL, device="cpu", out=tmp_path / "other.yaml")
    assert len(judged) == 36  # scores of other weights do not count
    assert read_recipe(tmp_path / "other.yaml").adapt == whole.subnet
    file.write_text("{")
    with pytest.raises(ValueError, match="noah.json is damaged"):
        search_subnet(supernet, LIMIT, evolution=SMALL, device="cpu")
    file.unlink()


def test_an_interrupted_run_of_the_supernet_ends_with_the_same_weights(
    supernet, recipe_file, tmp_path, monkeypatch
):
    """The subnets that updates draw depend on nothing but seed and update."""
    changes = [f"adapt={SUPERNET}", "train.epochs=2", "reduce=null", f"output={tmp_path / 'run'}"]
    recipe = read_recipe(recipe_file, [*changes, "train.checkpoint_every=5"])
    update = Trainer._update

    def stopped(trainer):
        if trainer.position.update == 17:
            raise KeyboardInterrupt
        return update(trainer)

    monkeypatch.setattr(Trainer, "_update", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, quiet=True)
    monkeypatch.undo()
    again = train(recipe, quiet=True).model().state_dict()
    for name, value in supernet.model().state_dict().items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-parameters", "many"], "max_parameters must look like 640000, 640k or 0.64M, got"),
        (["--max-parameters", "10"], "max_parameters must be at least 257, which the smallest"),
        (["--max-parameters", "1M", "--rounds", "-1"], "rounds must be an integer of at least 0"),
    ],
)
def test_mistakes_are_one_line(supernet, cli, arguments, message):
    code, _, err = cli("noah", supernet.folder, *arguments)
    assert code == 2
    assert message in err


def test_other_runs_are_refused(run, cli):
    code, _, err = cli("noah", run.folder, "--max-parameters", "1M")
    assert code == 2
    assert "is no run of a supernet: its adapt is not noah_supernet." in err
