import csv
import dataclasses
import json
import math
import shutil
import tarfile
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from examples import images, tiny_vit
from PIL import Image

import tokendial as td
from tokendial.data import ImageError, find_sources, read_image
from tokendial.data.sets import labelled_images
from tokendial.runs import Run
from tokendial.runs import evaluate_compensator as evaluation
from tokendial.runs.degrees import degrees_to_show, parse_degrees, spread_by_cost
from tokendial.runs.evaluate import evaluate, time_degrees
from tokendial.runs.evaluate_compensator import evaluate_compensator
from tokendial.runs.evaluation_tables import class_scores
from tokendial.runs.predict import predict
from tokendial.runs.predict_ray import predict_on_ray


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("0,4,8", [0, 4, 8]),
        ("0..3", [0, 1, 2, 3]),
        ("0..8:4,1", [0, 4, 8, 1]),
        ("all", [*range(9)]),
    ],
)
def test_degrees_can_be_written_in_several_ways(text, degrees):
    assert parse_degrees(text, tuple(range(9))) == degrees


def test_all_of_a_long_dial_means_about_ten_degrees_evenly_spaced_in_cost():
    vit = tiny_vit(img_size=64, patch_size=4, depth=2)
    model = td.wrap(vit, reduce=td.ToMe(r=5))
    assert len(model.degrees) > 100
    found = degrees_to_show(model, "all")
    assert found[0] == 0
    assert found[-1] == model.degrees[-1]
    assert 5 in found  # the present degree
    assert len(found) <= 11
    costs = [model.cost(degree).macs for degree in found]
    assert max(a - b for a, b in pairwise(costs)) < 1.6 * (costs[0] - costs[-1]) / 9
    assert degrees_to_show(model, "every") == list(model.degrees)


def test_a_choice_of_degrees_asks_for_few_costs():
    asked = []

    def cost(degree):
        asked.append(degree)
        return 1000.0 - degree

    assert spread_by_cost(range(685), cost, 3) == [0, 342, 684]
    assert len(asked) == len(set(asked)) < 60


def test_a_dial_that_gets_no_cheaper_at_its_end_is_no_problem():
    costs = [9.0, 7.0, 5.0, 5.0, 5.0, 5.0]
    assert spread_by_cost(range(6), costs.__getitem__, 3) == [0, 1, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "degrees must look like"),
        ("3..", "must look"),
        ("0..99", r"lie in \[0, 8\], got 9"),
        ("8..0", "'8..0' names none"),
    ],
)
def test_degrees_that_make_no_sense_raise(text, message):
    with pytest.raises(ValueError, match=message):
        parse_degrees(text, tuple(range(9)))


def test_rows_hold_what_the_model_does_at_each_degree(run):
    rows = evaluate(run, "0,8")
    assert [row.degree for row in rows] == [0, 8]
    assert rows[1].gmacs < rows[0].gmacs
    assert (rows[0].tokens, rows[1].tokens) == (17, 3)
    assert rows[0].accuracy > 0.5
    assert all(row.images_per_s > 0 for row in rows)


def test_the_accuracy_at_the_trained_degree_is_the_one_of_the_run(run):
    best = max(line["val_accuracy"] for line in run.metrics())
    assert evaluate(run, "2")[0].accuracy == pytest.approx(best)


def test_predictions_come_in_order_with_errors_in_their_place(run, digits, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    files = sorted((digits / "val" / "digit 0").iterdir())[:3]
    answers = list(predict(run, [files[0], broken, files[1]], top=4, batch_size=2))
    assert [getattr(answer, "path", None) for answer in answers] == [
        str(files[0]),
        None,
        str(files[1]),
    ]
    assert "broken.png is not an image" in str(answers[1])
    assert sum(answers[0].probabilities) == pytest.approx(1.0, abs=1e-5)
    assert list(answers[0].probabilities) == sorted(answers[0].probabilities, reverse=True)


def test_predictions_are_mostly_right(run, digits):
    files = sorted(digits.glob("val/*/*.png"))
    answers = list(predict(run, files))
    right = [
        answer.classes[0] == file.parent.name for answer, file in zip(answers, files, strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(evaluate(run, "2")[0].accuracy)


def shard_of(files, path):
    with tarfile.open(path, "w") as shard:
        for number, file in enumerate(files):
            shard.add(file, arcname=f"{number:03d}.png")
    return path


def test_images_in_shards_are_predicted_like_files(run, digits, tmp_path, cli):
    files = sorted(digits.glob("val/*/*.png"))[:5]
    shard = shard_of(files, tmp_path / "images.tar")
    in_files, in_shard = list(predict(run, files)), list(predict(run, find_sources([tmp_path])))
    assert [a.classes for a in in_shard] == [a.classes for a in in_files]
    assert [a.probabilities for a in in_shard] == [a.probabilities for a in in_files]
    code, out, _ = cli("predict", run.folder, shard)
    assert code == 0
    assert out.splitlines()[1].startswith(f'"{shard}, sample 000",')
    shard.write_bytes(shard.read_bytes()[:700])
    code, _, err = cli("predict", run.folder, shard)
    assert code == 2
    assert "is not a whole, uncompressed tar file" in err


def test_files_and_frames_that_predict_leaves_out_are_reported(run, tmp_path, caplog):
    pages = [Image.new("L", (32, 32), grey) for grey in (0, 200)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    for name in ("b.heic", "._a.tif", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    shard_of([tmp_path / "a.tif"], tmp_path / "d.tar")
    assert len(list(predict(run, find_sources([tmp_path])))) == 2
    assert caplog.messages == [
        f"{tmp_path}: left out 2 files without image endings: 1 .heic, 1 .txt",
        f"{tmp_path}/a.tif holds 2 pictures, the first one is read",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_answers_of_one_process_in_their_order(run, digits, tmp_path):
    files = sorted(digits.glob("val/*/*.png"))[:9]
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    shard = shard_of(files[5:], tmp_path / "images.tar")
    sources = [*files[:3], broken, *files[3:5], *find_sources([shard])]
    settings = {"degree": 4, "top": 2, "batch_size": 4}
    plain = list(predict(run, sources, **settings))
    answers = list(predict_on_ray(run, sources, **settings))
    assert len(answers) == len(plain) == 10
    for ours, theirs in zip(answers, plain, strict=True):
        if isinstance(theirs, ImageError):
            assert str(ours) == str(theirs)
            continue
        assert (ours.path, ours.classes) == (theirs.path, theirs.classes)
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-6)


def test_mistakes_are_reported_before_ray_starts(run, digits):
    with pytest.raises(ValueError, match=r"top must lie in \[1, 4\] \(classes\), got 5"):
        list(predict_on_ray(run, sorted(digits.glob("val/*/*.png")), top=5))


def test_top_above_the_number_of_classes_raises(run, digits):
    with pytest.raises(ValueError, match=r"top must lie in \[1, 4\] \(classes\), got 5"):
        list(predict(run, sorted(digits.glob("val/*/*.png")), top=5))


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        evaluate(Run(tmp_path))


def test_the_command_line_evaluates(cli, run):
    code, out, _ = cli("eval", run.folder, "--degrees", "0..8:4")
    assert code == 0
    with (run.folder / "eval" / "degrees.csv").open() as file:
        assert [row["degree"] for row in csv.DictReader(file)] == ["0", "4", "8"]
    assert read_image(run.folder / "eval" / "degrees.png").size[0] > 400
    assert "images/s" in out
    assert read_image(run.folder / "eval" / "confusion.png").size[0] > 400
    with (run.folder / "eval" / "classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [row["class"] for row in classes[:4]] == [f"digit {digit}" for digit in range(4)]
    with (run.folder / "eval" / "degrees.csv").open() as file:
        first = next(csv.DictReader(file))
    right = sum(float(row["recall"]) * int(row["images"]) for row in classes[:4])
    assert right / 80 == pytest.approx(float(first["accuracy"]), abs=1e-4)
    assert float(first["speedup"]) == 1.0
    assert all(len(text) <= 12 for text in first.values())  # rounded to six digits


def test_scores_of_each_class_name_the_class_it_is_mistaken_for(run):
    row = evaluate(run, "0")[0]
    confusion = torch.tensor([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    a, b, c = class_scores(dataclasses.replace(row, confusion=confusion), ["a", "b", "c"])
    assert (a.images, a.recall, a.precision, a.mistaken_for, a.times) == (10, 0.8, 1.0, "b", 2)
    assert (b.images, b.recall, b.mistaken_for, b.times) == (5, 1.0, None, 0)
    assert b.precision == pytest.approx(5 / 7)
    assert c.images == 0
    assert math.isnan(c.recall)


def test_progress_is_reported_batch_by_batch(run):
    told = []
    evaluate(run, "0,8", batch_size=32, progress=lambda *state: told.append(state))
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5, 6, 6]
    assert {total for _, total, _ in told} == {6}
    assert told[0][2] == "degree 0"


def test_the_command_line_predicts_csv_and_json(cli, run, digits, tmp_path):
    picture = digits / "val" / "digit 3" / "0.png"
    code, out, _ = cli("predict", run.folder, picture, "--top", 2)
    rows = list(csv.DictReader(out.splitlines()))
    assert (code, len(rows)) == (0, 2)
    assert rows[0]["path"] == str(picture)
    code, out, _ = cli("predict", run.folder, picture, "--format", "jsonl", "--degree", 8)
    assert json.loads(out)["path"] == str(picture)


def test_the_command_line_finds_the_fastest_way_first(cli, run, digits):
    for command in (["eval", run.folder, "--degrees", "0,8"], ["predict", run.folder, digits]):
        table = run.folder / "eval" / "degrees.csv"

        def answers(*flags, command=command, table=table):
            code, out, err = cli(*command, *flags)
            assert code == 0
            assert ("packed weights: " in err) == bool(flags)
            if command[0] == "predict":
                return [line.rpartition(",")[0] for line in out.splitlines()]
            with table.open() as file:
                return [row["accuracy"] for row in csv.DictReader(file)]

        assert answers("--optimize") == answers()
    code, _, err = cli("predict", run.folder, digits, "--compile", "--ray")
    assert (code, err.strip()) == (
        2,
        "error: ray predicts classes in PyTorch: leave out --runtime, --precision, --optimize, "
        "--compile and --cascade.",
    )


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_command_line_uses_other_runtimes(cli, run, digits):
    assert cli("eval", run.folder, "--degrees", "0,8")[0] == 0
    with (run.folder / "eval" / "degrees.csv").open() as file:
        plain = [row["accuracy"] for row in csv.DictReader(file)]
    code, _, err = cli("eval", run.folder, "--degrees", "0,8", "--runtime", "openvino")
    assert (code, "exporting the model at degree 0, 8" in err) == (0, True)
    with (run.folder / "eval" / "degrees.csv").open() as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == plain
    answers = []
    for runtime, precision in (
        ("torch", "fp32"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", "int8"),
    ):
        flags = ("--runtime", runtime, "--precision", precision)
        code, out, err = cli("predict", run.folder, digits, "--degree", 8, *flags)
        assert (code, "exporting" in err) == (0, False)  # the files are there
        # Without the run's training images, OpenVINO would have zeros to calibrate on.
        calibrated = (runtime, precision) == ("openvino", "int8")
        assert ("in 8 bits on 128 images" in err) == calibrated
        answers.append([row["class"] for row in csv.DictReader(out.splitlines())])
    plain, whole, *quantized = answers
    assert whole == plain
    for each in quantized:
        assert np.mean([a == b for a, b in zip(each, plain, strict=True)]) > 0.9
    code, _, err = cli(
        "predict", run.folder, digits, "--runtime", "openvino", "--precision", "fp16"
    )
    assert (code, err.strip()) == (
        2,
        "error: precision in openvino must be one of fp32, bf16, int8, got 'fp16'.",
    )


def test_the_command_line_uses_half_precision(cli, run, digits):
    def classes(*flags):
        code, out, err = cli("predict", run.folder, digits, *flags)
        assert (code, "packed weights: " in err) == (0, bool(flags))
        return [row["class"] for row in csv.DictReader(out.splitlines())]

    whole, half = classes(), classes("--precision", "bf16")
    assert np.mean([a == b for a, b in zip(whole, half, strict=True)]) > 0.9
    code, _, err = cli("predict", run.folder, digits, "--precision", "int8")
    assert code == 2
    assert "int8" in err


def test_unreadable_images_are_reported_and_the_others_predicted(cli, run, digits, tmp_path):
    shutil.copy(digits / "val" / "digit 3" / "0.png", tmp_path / "z.png")
    (tmp_path / "a.jpg").write_text("text")
    code, out, err = cli("predict", run.folder, tmp_path)
    assert code == 1
    assert err.strip() == f"error: {tmp_path / 'a.jpg'} is not an image."
    assert len(out.splitlines()) == 2


def test_the_command_line_draws_tokens(cli, run, digits, tmp_path):
    out = tmp_path / "picture.png"
    code, _, _ = cli("show", run.folder, digits / "val" / "digit 3" / "0.png", "--out", out)
    assert code == 0
    assert read_image(out).size[0] > 400


def test_the_command_line_profiles(cli):
    code, out, _ = cli("profile", "deit_base_patch16_224", "--reduce", "tome", "--degrees", "8,16")
    assert code == 0
    assert "13.12" in out
    assert "8.78" in out
    code, out, _ = cli(
        "profile", "vit_base_patch16_224", "reduce.name=evit", "--adapt", "dense_adapter", "--json"
    )
    cost = json.loads(out.splitlines()[-1])
    assert 11.6e9 < cost["macs"] < 11.76e9
    assert 1.08e6 < cost["trainable_params"] < 1.12e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no such recipe: nowhere.yaml."),
        (["train", "demo", "train.epoch=1"], "train.epoch is not a field of a recipe"),
        (["train", "demo", "data={name: image_folder, root: /none}"], "no such folder: /none."),
        (["train", "demo", "reduce.layers=[4, 13]"], "layers must lie in [1, 12]"),
        (["train", "demo", "train.degree=20"], "degree must be an integer in [0, 9], got 20."),
        (["train", "demo", "model.img_size=50"], "img_size must be divisible by the patch size"),
        (["eval", "/none"], "/none is not the folder of a run: recipe.yaml is missing."),
        (
            ["predict", "/none", "/none"],
            "/none is not the folder of a run: recipe.yaml is missing.",
        ),
        (["profile", "resnet50"], "This model is not supported: ResNet is of"),
        (["profile", "deit_base_patch16_224", "model=8"], "model: must be a mapping of settings"),
        (["profile", "deit_base_patch16_224", "data.x=1"], "data: profile takes settings of model"),
        (
            ["profile", "deit_base_patch16_224", "reduce.name=evit", "reduce.keep_rate=0"],
            "keep_rate",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(cli, tmp_path, arguments, message):
    extra = [f"output={tmp_path / 'run'}"] if arguments[0] == "train" else []
    code, _, err = cli(*arguments, *extra)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_image_that_breaks_during_a_run_is_one_line_too(
    cli, digits, recipe_file, tmp_path, monkeypatch
):
    """It breaks in a loading process, after the check at the start, which is skipped here."""
    monkeypatch.setattr(labelled_images, "find_broken_images", lambda *args: {})
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "digits" / "train" / "digit 1" / "5.png").write_text("text")
    code, _, err = cli(
        "train", recipe_file, f"data.root={tmp_path / 'digits'}", f"output={tmp_path / 'run'}",
        "train.workers=1",
    )  # fmt: skip
    assert code == 2
    assert err.splitlines()[-1].endswith("digit 1/5.png is not an image.")
    assert err.splitlines()[-1].startswith("error: /")


def test_the_version_is_printed(cli):
    code, out, _ = cli("--version")
    assert (code, out.split()[0]) == (0, "tokendial")


def test_speed_is_measured_on_the_device_of_the_model(run):
    first, last = time_degrees(run.model(), torch.rand(2, 3, 32, 32), [0, 8])
    assert first.seconds > 0
    assert last.seconds > 0


def test_a_compensator_is_detached_when_the_evaluation_with_it_fails(monkeypatch):
    """The run and its data are stand-ins: only the model and the compensator are real."""
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4))
    plugin = td.Compensator.for_model(model, td.ToCom())
    recipe = SimpleNamespace(reduce=model.reduce_config, output="run")
    run = SimpleNamespace(recipe=lambda: recipe, model=lambda: model)

    def scores(model, loader, task, after_batch):
        if model.compensation:
            raise RuntimeError("out of memory")
        return {"top1": 1.0}

    monkeypatch.setattr(evaluation, "validation_set", lambda *args: (None, []))
    monkeypatch.setattr(evaluation, "first_images", lambda *args: images())
    monkeypatch.setattr(evaluation, "evaluate_loader", scores)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_compensator([run], plugin, "2", device="cpu")
    assert model.compensation is None
