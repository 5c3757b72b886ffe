"""Training of compensators: losses, resuming, several processes, the command line."""

import csv
import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from examples import perturbed
from PIL import Image
from processes import ended, start, wait_until
from typer.testing import CliRunner

import tokendial as td
from tokendial.cli import app
from tokendial.compensate.distillation import binary_distillation
from tokendial.runs import CompensateRecipe, Run, read_recipe
from tokendial.train import compensate, train
from tokendial.train.compensator_training import CompensatorTraining

RECIPE = {
    "model": {"name": "scenes_vit", "weights": "shipped"},
    "reduce": {"name": "evit", "r": 6},
    "compensate": {"name": "tocom", "rank": 2, "scale": 1.0, "dropout": 0.0},
    "loss": "binary_distillation",
    "data": {"name": "scenes", "task": "present", "train_size": 64, "val_size": 16},
    "augment": {"crop": False, "test_crop_ratio": 1.0},
    "train": {"epochs": 2, "batch_size": 16, "lr": 0.01},
}


def recipe(tmp_path, *overrides, name="run"):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return read_recipe(path, [f"output={tmp_path / name}", *overrides], kind=CompensateRecipe)


def weights(run):
    return td.Compensator.from_pretrained(run.last).state_dict()


def test_the_teacher_is_the_plain_model_at_the_source_and_the_student_is_compensated(tmp_path):
    job = CompensatorTraining(recipe(tmp_path))
    perturbed(job.module, std=0.3)
    objective, model = job.objective.eval(), job.objective.model
    job.module.detach(model)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        model.set_degree(1)
        teacher = model(images)
        model.set_degree(1)
        job.module.attach(model, source=1)
        model.set_degree(5)
        student = model(images)
        job.module.detach(model)
        job.module.attach(model, merge=False)
        objective.pair = (1, 5)
        loss, _ = objective(images, torch.zeros(2))
    torch.testing.assert_close(loss, binary_distillation(student, teacher), rtol=1e-3, atol=1e-6)


def test_all_weights_of_the_compensator_are_trained_and_no_others(tmp_path):
    job = CompensatorTraining(recipe(tmp_path))
    objective = job.objective.train()
    assert not any(p.requires_grad for p in objective.model.parameters())
    perturbed(job.module)
    before = objective.model.state_dict()
    seen = set()
    for update in range(40):
        job.before_update(update, 100)
        seen.add(objective.pair)
        loss, _ = objective(torch.randn(2, 3, 48, 48), torch.zeros(2))
        loss.backward()
    assert all(p.grad.abs().sum(dim).min() > 0 for p in job.module.parameters() for dim in (0, 1))
    assert all(source != target for source, target in seen)
    assert {degree for pair in seen for degree in pair} == set(range(7))
    assert all(torch.equal(before[n], t) for n, t in objective.model.state_dict().items())


def test_feature_maps_are_compared_at_every_patch(tmp_path):
    job = CompensatorTraining(recipe(tmp_path, "loss=feature_map", "reduce={name: tome, r: 4}"))
    perturbed(job.module, std=0.3)
    objective, model = job.objective.eval(), job.objective.model
    images = torch.randn(2, 3, 48, 48)
    objective.pair = (0, 4)
    loss, agreement = objective(images, torch.zeros(2))
    with torch.no_grad():
        model.set_degree(4)
        student = model.feature_map(images)
        model.set_degree(0)
        teacher = model.feature_map(images)
    assert student.shape == (2, 96, 8, 8)
    torch.testing.assert_close(loss, (student - teacher).abs().mean())
    cosine = F.cosine_similarity(student, teacher, dim=1)
    torch.testing.assert_close(agreement, cosine.mean((1, 2)))


def test_a_finished_run_is_left_as_it_is(tmp_path):
    whole = compensate(recipe(tmp_path, name="whole"), quiet=True)
    losses = [line["train_loss"] for line in whole.metrics()]
    assert len(losses) == 2
    names = {"agreement", "agreement_without", "mismatch", "mismatch_without"}
    assert {f"val_{name}" for name in names} <= whole.metrics()[-1].keys()
    plugin = td.Compensator.from_pretrained(whole.best)
    assert plugin.origin.reduce["name"] == "evit"
    assert compensate(recipe(tmp_path, name="whole"), quiet=True).metrics() == whole.metrics()


def test_a_run_killed_in_between_ends_with_the_same_bits(tmp_path):
    quick = ("train.checkpoint_every=1", "train.epochs=4")
    alone = compensate(recipe(tmp_path, *quick, name="alone"), quiet=True)
    killed = Run(tmp_path / "killed")
    command = ("compensate", tmp_path / "recipe.yaml", f"output={killed.folder}", *quick)
    process = start(tmp_path, *command)
    wait_until(lambda: list(killed.checkpoints.glob("update-0000000[3-9].pt")), process)
    process.kill()
    assert ended(process) == -signal.SIGKILL
    assert ended(start(tmp_path, *command)) == 0
    assert all(torch.equal(weights(killed)[n], t) for n, t in weights(alone).items())


def test_two_processes_learn_what_one_does(tmp_path, in_two_processes):
    one = compensate(recipe(tmp_path, "train.lr=0.001", name="one"), quiet=True)
    command = ["-m", "tokendial.cli", "compensate", str(tmp_path / "recipe.yaml")]
    overrides = [f"output={tmp_path / 'two'}", "train.lr=0.001", "train.batch_size=8"]
    subprocess.run(
        [*in_two_processes, *command, *overrides],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        timeout=240,
        check=True,
    )
    two = type(one)(tmp_path / "two")
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, atol=1e-4, rtol=0)
    assert two.metrics()[-1]["val_agreement"] == pytest.approx(
        one.metrics()[-1]["val_agreement"], abs=1e-3
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("data={name: scenes, task: which, train_size: 16, val_size: 8}", "loss=classification"),
        ("loss=classification",),
        ("model.args.num_classes=0", "loss=features"),
        ("loss=distillation", "temperature=3", "mean_over=batch", "model.drop_path=0.2"),
        ("compensate={name: tocom, shared: true, rank: 8}",),
        ("compensate={name: tocom, inversion: false}", "steps=3"),
    ],
)
def test_variants_train(tmp_path, overrides):
    run = compensate(
        recipe(tmp_path, "train.epochs=1", "train.batch_size=8", *overrides), quiet=True
    )
    assert np.isfinite(run.metrics()[0]["train_loss"])
    fresh = CompensatorTraining(
        recipe(tmp_path, "train.batch_size=8", *overrides)
    ).module.state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in weights(run).items())


def test_a_folder_of_unlabelled_images_is_enough(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "images" / "some" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    data = f"data={{name: unlabelled, root: {tmp_path / 'images'}, val_every: 4}}"
    overrides = (data, "train.batch_size=4", "train.epochs=1")
    run = compensate(recipe(tmp_path, *overrides), quiet=True)
    assert run.best.is_dir()


def test_weights_of_a_run_keep_their_head(tmp_path):
    model = td.wrap(
        td.Backbone(name="scenes_vit", weights="shipped").create(), adapt=td.FullFineTuning()
    )
    model.save_pretrained(tmp_path / "mine")
    job = CompensatorTraining(recipe(tmp_path, f"model.weights={tmp_path / 'mine'}"))
    head = job.objective.model.vit.head.weight
    assert torch.equal(head, model.vit.head.weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.weights=null", "model.weights must name pre-trained weights"),
        ("reduce=null", "reduce must be a reduction method"),
        ("train.degree=3", "train.degree has no meaning for a compensator, got 3"),
        ("loss=features", "loss must be one of the others for a model with a head of 10 classes"),
        (
            "model.args.num_classes=0",
            "loss must be features or feature_map for a model with a head of 0 classes",
        ),
        ("steps=99", "steps must be at most 32, got 99"),
        ("adapt={name: full}", "adapt is not a field"),
        ("data={name: unlabelled, root: nowhere}", "no such folder: nowhere"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        compensate(recipe(tmp_path, override), quiet=True)


def test_labels_have_to_be_those_of_the_head(tmp_path):
    count = recipe(tmp_path, "loss=classification", "data.task=count")
    with pytest.raises(ValueError, match="labels of the model's 10 classes, but the data have 5"):
        compensate(count, quiet=True)


def test_a_recipe_for_the_other_command_names_that_command():
    with pytest.raises(ValueError, match="recipe demo.yaml is one for `tokendial train`"):
        read_recipe("demo", kind=CompensateRecipe)
    with pytest.raises(ValueError, match="tocom_scenes.yaml is one for `tokendial compensate`"):
        read_recipe("tocom_scenes")


@pytest.fixture(scope="module")
def bridged(tmp_path_factory):
    """Two runs, trained without reduction and at degree 6, and a compensator of their backbone."""
    folder = tmp_path_factory.mktemp("bridged")
    plugin = compensate(recipe(folder, "train.epochs=1", name="plugin"), quiet=True)
    fine_tuning = {name: RECIPE[name] for name in ("model", "reduce", "augment")}
    fine_tuning |= {
        "adapt": {"name": "adaptformer", "dim": 4},
        "data": {"name": "scenes", "task": "count", "train_size": 32, "val_size": 16},
        "train": {"epochs": 1, "batch_size": 16},
    }
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(fine_tuning))
    for name, override in (("0", "reduce=null"), ("6", "train.degree=6")):
        train(read_recipe(path, [f"output={folder / name}", override]), quiet=True)
    return folder, plugin


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_command_line_prints_the_grid_of_sources_and_targets(bridged):
    folder, plugin = bridged
    runs = (folder / "0", folder / "6")
    done = invoke(*runs, "--compensator", plugin.best, "--degrees", "0,3,6")
    assert done.exit_code == 0, done.output
    with (folder / "0" / "eval" / "bridged.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = [(int(row["source"]), int(row["degree"])) for row in rows]
    assert pairs == [(source, target) for source in (0, 6) for target in (0, 3, 6)]
    for row in rows:
        if row["source"] == row["degree"]:
            assert row["plain"] == row["accuracy"]
    metrics = json.loads((folder / "0" / "metrics.jsonl").read_text())
    assert float(rows[0]["plain"]) == pytest.approx(metrics["val_accuracy"])
    assert (folder / "0" / "eval" / "bridged.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--degrees", "0..9"), r"degrees must lie in \[0, 6\], got 7"),
        (("--sources", "0,3"), "sources must be one degree for each of the 1 runs, got 2"),
    ],
)
def test_options_that_do_not_go_together_raise(bridged, options, message):
    folder, plugin = bridged
    done = invoke(folder / "0", "--compensator", plugin.best, *options)
    assert isinstance(done.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise done.exception


def test_several_runs_need_a_compensator(bridged):
    folder, _ = bridged
    done = invoke(folder / "0", folder / "6")
    assert "need --compensator" in str(done.exception)
