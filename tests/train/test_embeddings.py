"""Training on images without labels: embeddings stay those of the backbone, whatever the degree."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import tokendial as td
from tokendial.backbones import Backbone
from tokendial.cli import app
from tokendial.data.sets.scenes import Scenes
from tokendial.measure.neighbours import embedding_scores
from tokendial.runs import Run, read_recipe
from tokendial.runs.evaluate import evaluate, validation_set
from tokendial.runs.export_facts import run_facts
from tokendial.train import train
from tokendial.train.fine_tuning import FineTuning

RECIPE = {
    "model": {"name": "scenes_vit", "weights": "shipped"},
    "reduce": {"name": "tome", "r": 4},
    "adapt": {"name": "lora", "rank": 4},
    "data": {"name": "unlabelled", "val_every": 4},
    "augment": {"crop": False, "test_crop_ratio": 1.0},
    "train": {"epochs": 3, "batch_size": 16, "lr": 0.003, "degrees": {"random": True}},
}
PLAIN = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "200"})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    scenes = Scenes(task="present", train_size=96, val_size=2).build(0).train
    for number in range(96):
        image, _ = scenes[number]
        image.save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return train(recipe(tmp_path_factory.mktemp("runs"), photos), quiet=True)


def recipe(tmp_path, photos, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return read_recipe(path, [f"output={tmp_path / 'run'}", f"data.root={photos}", *overrides])


def backbone():
    return Backbone(name="scenes_vit", weights="shipped", args={"num_classes": 0}).create().eval()


def embeddings(model, run):
    _, loader = validation_set(run, run.model(), 64)
    with torch.no_grad():
        return torch.cat([model(images) for images, _ in loader])


def test_the_embeddings_of_high_degrees_come_nearer_to_those_of_the_backbone(run):
    wanted = embeddings(backbone(), run)
    trained, untrained = run.model(), td.wrap(backbone(), reduce=td.ToMe(r=4))
    assert trained.degree == 4
    found = {}
    for model in (trained, untrained):
        model.set_degree(4)
        found[model] = F.cosine_similarity(embeddings(model, run), wanted).mean()
    assert 1 - found[trained] < 0.8 * (1 - found[untrained])
    trained.set_degree(0)
    assert F.cosine_similarity(embeddings(trained, run), wanted).mean() > found[trained]


def test_a_metric_that_learns_alone_is_saved_and_comes_nearer_to_the_backbone(photos, tmp_path):
    """As recipe real/learnt_metric: a frozen backbone, one degree."""
    methods = ["reduce={name: learnt_metric, r: 4, dim: 8}", "adapt={name: linear}"]
    settings = ["train.degrees=null", "train.epochs=2", "train.lr=0.02"]
    run = train(recipe(tmp_path, photos, *methods, *settings), quiet=True)
    wanted, model = embeddings(backbone(), run), run.model()
    vit = backbone().state_dict()
    assert all(torch.equal(value, vit[name]) for name, value in model.vit.state_dict().items())
    again = td.load(run.best)
    pictures = torch.randn(4, 3, *model.anatomy.image_size)
    assert torch.equal(again(pictures), model(pictures))
    torch.manual_seed(0)
    untrained = td.wrap(backbone(), reduce=td.LearntMetric(r=4, dim=8)).eval()
    found, before = (
        float(F.cosine_similarity(embeddings(each, run), wanted).mean())
        for each in (model, untrained)
    )
    assert 1 - found < 0.7 * (1 - before)
    (row,) = evaluate(run, "4", batch_size=16)
    assert row.scores["cosine_to_frozen"] == pytest.approx(found, abs=1e-5)
    assert run.best_record()["val_cosine_to_frozen"] == pytest.approx(found, abs=1e-5)


def test_a_run_is_judged_by_the_backbone_itself(run):
    wanted, model = embeddings(backbone(), run), run.model()
    for row in evaluate(run, "0,2,4", batch_size=16):
        model.set_degree(row.degree)
        scores = embedding_scores(embeddings(model, run), wanted)
        expected = {
            "cosine_to_frozen": scores["cosine"],
            "neighbours_of_frozen": scores["same_neighbours"],
        }
        assert list(row.scores) == list(expected)
        assert row.scores == pytest.approx(expected, abs=1e-5)
    best = run.best_record()
    assert best["val_cosine_to_frozen"] == pytest.approx(row.accuracy, abs=1e-5)
    assert 0.5 < best["train_cosine"] < 1
    assert run.model().reducer.trained_degrees == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "degrees", [{"sandwich": 1}, {"each": [1, 4], "task_weight": 0.5}, {"random": True}]
)
def test_the_loss_of_degree_0_is_that_to_the_backbone_and_others_learn_from_it(
    photos, tmp_path, degrees
):
    given = f"train.degrees={json.dumps(degrees)}"
    job = FineTuning(recipe(tmp_path, photos, given))
    several = job.objective
    images = torch.randn(2, 3, *job.anatomy.image_size)
    with torch.no_grad():
        job.module.train()
        for parameter in job.model.trainable_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        _, targets = job.augment_batch(images, torch.zeros(2))
        torch.testing.assert_close(targets, backbone()(images), rtol=1e-4, atol=1e-5)
        job.before_update(3, 10)
        taught = None
        for number, degree in enumerate(several.degrees):
            job.before_pass(number)
            loss, found = several(images, targets)
            job.model.set_degree(degree)
            torch.testing.assert_close(found, job.model(images), rtol=1e-4, atol=1e-5)
            expected = 1 - F.cosine_similarity(found, targets).mean()
            if taught is not None:
                expected = degrees.get("task_weight", 0) * expected
                expected = expected + 1 - F.cosine_similarity(found, taught).mean()
            taught = found if taught is None else taught
            torch.testing.assert_close(len(several.degrees) * loss, expected)


def test_commands_take_the_run_or_say_what_to_use(run, photos, tmp_path, cli):
    where = str(run.folder)
    embedded = PLAIN.invoke(app, ["embed", where, str(photos), "--out", f"{tmp_path}/e.parquet"])
    assert embedded.exit_code == 0, embedded.output
    evaluated = PLAIN.invoke(app, ["eval", where, "--degrees", "0,4"])
    assert evaluated.exit_code == 0, evaluated.output
    assert "cosine to frozen" in evaluated.output
    assert "neighbours of frozen" in evaluated.output
    assert run_facts(run, run.model())["task"] == "embeddings"
    card = run.card_file.read_text()
    assert "to keep its embeddings when tokens are reduced" in card
    assert f"tokendial embed {run.folder} images/" in card
    for command, message in (
        (["predict", where, str(photos)], "has no classes to predict: use tokendial embed."),
        (
            ["predict", where, str(photos), "--out", f"{tmp_path}/masks"],
            "predicts embeddings, not masks.",
        ),
        (
            ["cascade", where, "--degrees", "4,0", "--max-changed", "0.1"],
            "gives images classes or masks, not embeddings",
        ),
    ):
        code, _, error = cli(*command)
        assert code == 2, error
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reduce=null", "reduce must be a reduction method for the data Unlabelled, which have no"),
        ("model.weights=null", "model.weights must name pre-trained weights for the data Unlab"),
        ("metrics=[accuracy]", "metrics must be null for the data Unlabelled"),
        ("train.class_weights=balanced", "train.class_weights must be null for the data Unl"),
        ("train.images_per_class=4", "train.images_per_class must be null for the data Un"),
        ("augment.mixup=0.2", "augment: mixup, cutmix and smoothing need images with labels."),
        ("data.val_every=60", "compared on at least 3 validation images, got 2;"),
        ("adapt={name: linear}", "adapt must be a method that trains more than a head"),
    ],
)
def test_what_does_not_fit_is_refused(photos, tmp_path, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(recipe(tmp_path, photos, override), quiet=True)
    assert not Run(tmp_path / "run").recipe_file.exists()


def test_the_backbone_is_found_from_any_folder(photos, tmp_path, monkeypatch):
    """Its weights are named relative to the folder where training was started."""
    started = tmp_path / "started"
    started.mkdir()
    monkeypatch.chdir(started)
    save_file(backbone().state_dict(), "weights.safetensors")
    settings = ("model.weights=weights.safetensors", "train.epochs=1")
    trained = train(recipe(tmp_path, photos, *settings), quiet=True)
    before = evaluate(trained, "4")[0].scores
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_text("another file")
    assert evaluate(Run(trained.folder), "4")[0].scores == before


def test_loading_the_backbone_draws_no_random_numbers(photos, tmp_path):
    """A resumed run would draw others for dropout than one that was not interrupted."""
    job = FineTuning(recipe(tmp_path, photos))
    images = torch.randn(2, 3, *job.anatomy.image_size)
    before = torch.random.get_rng_state()
    job.augment_batch(images, torch.zeros(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_degree_0_leaves_nothing_to_learn(photos, tmp_path):
    settings = ("train.degrees=null", "train.degree=0")
    with pytest.raises(ValueError, match=r"train\.degree must be at least 1 for images without"):
        train(recipe(tmp_path, photos, *settings), quiet=True)


def test_a_method_that_compares_logits_has_to_leave_that_out(photos, tmp_path):
    settings = ("train.degrees=null", "reduce={name: dyt}")
    with pytest.raises(ValueError, match=r"reduce\.complete must be false for images without"):
        train(recipe(tmp_path, photos, *settings), quiet=True)
    without = ("train.degrees=null", "reduce={name: dyt, complete: false}", "train.epochs=1")
    assert train(recipe(tmp_path, photos, *without), quiet=True).finished
