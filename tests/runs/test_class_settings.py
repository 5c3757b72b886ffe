"""Metrics and class weights that a recipe chooses, from training to the reopened run."""

import csv
import json
from collections import Counter

import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score

from tokendial.runs import CompensateRecipe, Run, read_recipe
from tokendial.runs.run import task_of
from tokendial.tasks import VideoClassification
from tokendial.train import train

CHOSEN = ["f1", "balanced_accuracy", "accuracy", "auroc"]


@pytest.fixture(scope="module")
def unequal(digits, tmp_path_factory):
    """Two digits, of one of which there are few training images."""
    root = tmp_path_factory.mktemp("unequal")
    for split, count in (("train", 6), ("val", 20)):
        for name, images in (("digit 0", 30), ("digit 1", count)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for path in sorted((digits / "train" / name).iterdir())[:images]:
                Image.open(path).save(folder / path.name)
    return root


@pytest.fixture(scope="module")
def chosen(unequal, recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "chosen"
    settings = [f"data.root={unequal}", f"output={folder}", f"metrics={CHOSEN}"]
    settings += ["train.class_weights=balanced", "train.epochs=3", "train.warmup_epochs=0"]
    return train(read_recipe(recipe_file, settings), quiet=True)


def test_the_first_metric_selects_the_best_epoch(chosen):
    records = chosen.metrics()
    scores = [name for name in records[0] if name.startswith("val_")]
    assert scores == [f"val_{name}" for name in CHOSEN]
    assert chosen.best_record() == max(records, key=lambda record: record["val_f1"])


def test_recorded_metrics_are_those_of_the_predictions(chosen):
    model, task, data = chosen.model(), chosen.task(), chosen.data()
    transform = task.eval_transform(model.anatomy)
    with torch.no_grad():
        predicted = [int(model(transform(*sample)[0][None]).argmax()) for sample in data.val]
    labels, best = [label for _, label in data.val], chosen.best_record()
    assert best["val_f1"] == pytest.approx(f1_score(labels, predicted))
    balanced = balanced_accuracy_score(labels, predicted)
    assert best["val_balanced_accuracy"] == pytest.approx(balanced)


def test_a_reopened_run_has_the_weights_without_the_data(chosen, unequal, tmp_path):
    labels = Counter(label for _, label in chosen.data().train)
    weights = [36 / (2 * labels[label]) for label in (0, 1)]
    assert json.loads(chosen.classes_file.read_text())["class_weights"] == weights == [0.6, 3.0]
    moved = Run(tmp_path)
    for file in (chosen.recipe_file, chosen.classes_file):
        text = file.read_text().replace(str(unequal), "nowhere")
        (tmp_path / file.name).write_text(text)
    assert list(moved.task().class_weights) == weights
    logits, targets = torch.randn(4, 2), torch.tensor([0, 1, 1, 1])
    assert torch.equal(moved.task().loss(logits, targets), chosen.task().loss(logits, targets))


def test_a_run_without_these_settings_records_nothing_new(run):
    kind = json.loads(run.classes_file.read_text())
    assert kind.keys() == {"classes", "multi_label", "dense", "video", "working_folder"}
    assert run.task().class_weights is None
    old = yaml.safe_load(run.recipe_file.read_text())
    assert old.pop("metrics") is None
    assert old["train"].pop("class_weights") is None


def test_an_evaluation_shows_every_chosen_metric(chosen, cli):
    code, printed, _ = cli("eval", str(chosen.folder), "--degrees", "0,2")
    assert code == 0
    table = " ".join(printed.split())
    assert all(title in table for title in ("F1", "balanced", "accuracy", "AUROC"))
    with (chosen.folder / "eval" / "degrees.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[1:5] == CHOSEN
    best = chosen.best_record()
    assert [float(rows[1][name]) for name in CHOSEN] == pytest.approx(
        [best[f"val_{name}"] for name in CHOSEN], abs=1e-5
    )


def test_the_card_names_the_chosen_metrics(chosen):
    card, best = chosen.card_file.read_text(), chosen.best_record()
    assert f"| F1 | {100 * best['val_f1']:.2f} |" in card
    assert f"| AUROC | {100 * best['val_auroc']:.2f} |" in card


def test_the_training_prints_the_chosen_metrics(cli, unequal, recipe_file, tmp_path):
    settings = [f"data.root={unequal}", f"output={tmp_path / 'run'}", "metrics=[auroc,f1]"]
    settings += ["train.epochs=1", "train.warmup_epochs=0"]
    code, printed, _ = cli("train", str(recipe_file), *settings)
    assert code == 0
    (record,) = Run(tmp_path / "run").metrics()
    wanted = f"val AUROC {record['val_auroc']:.2%}, val F1 {record['val_f1']:.2%}"
    assert wanted in " ".join(printed.split())


def test_a_run_is_not_continued_with_other_metrics(chosen, unequal, recipe_file):
    settings = yaml.safe_load(chosen.recipe_file.read_text())
    settings["metrics"] = ["accuracy"]
    path = chosen.folder.parent / "other.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="holds another run: its metrics is .* not .'accuracy'"):
        train(read_recipe(path), quiet=True)


def test_videos_take_the_same_settings(tmp_path):
    settings = ["data={name: video_folder, root: clips}", "metrics=[f1]", "model.frames=2"]
    recipe = read_recipe("image_folder", [*settings, f"output={tmp_path}"])
    task = task_of(recipe, 2, multi_label=False, dense=False, video=True, class_weights=(1.0, 2.0))
    assert isinstance(task, VideoClassification)
    assert task.class_weights == (1.0, 2.0)
    assert list(task.metrics()) == ["f1"]


@pytest.mark.parametrize(
    ("name", "settings", "kind", "message"),
    [
        ("demo_masks", ["metrics=[f1]"], None, r"^metrics must be null with a decoder, got"),
        (
            "demo_masks",
            ["train.class_weights=balanced"],
            None,
            r"^train.class_weights must be null with a decoder, got 'balanced'",
        ),
        (
            "tocom_scenes",
            ["train.class_weights=balanced"],
            CompensateRecipe,
            r"^train.class_weights has no meaning for a compensator",
        ),
    ],
)
def test_other_tasks_refuse_them(name, settings, kind, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(name, settings, **({"kind": kind} if kind else {}))
