import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import tokendial as td
from tokendial.data import find_sources
from tokendial.runs.cascade import calibrate_cascade
from tokendial.runs.evaluate import evaluate, validation_set
from tokendial.runs.predict import predict


@pytest.fixture(scope="module")
def report(run):
    return calibrate_cascade(run, [4, 0], max_changed=0.06)


def test_the_cascade_stands_beside_fixed_degrees(run, report):
    assert [row.name for row in report.rows] == [
        "cascade",
        *(f"degree {d}" for d in range(4, -1, -1)),
    ]
    fixed = {row.degree: row for row in evaluate(run, "0..4")}
    for row in report.rows[1:]:
        same = fixed[int(row.name.removeprefix("degree "))]
        assert row.accuracy.value == pytest.approx(same.accuracy)
        assert row.gmacs == same.gmacs
    assert report.rows[-1].minus_last.value == 0
    for row in report.rows:
        middle, high = row.percentiles_ms
        assert 0 < middle <= high
        assert len(row.timing.times) == 80


def test_the_saved_cascade_is_the_one_of_the_report(run, report):
    model = run.model()
    cascade = td.Cascade.load(model, run.cascade_file)
    assert cascade.calibration == report.calibration
    _, loader = validation_set(run, model, 64)
    right, early = [], []
    for images, labels in loader:
        found = cascade.answer(images)
        right.append((found.logits.argmax(1) == labels).float())
        early.append(torch.tensor([degree == 4 for degree in found.degrees]).float())
    assert torch.cat(right).mean() == pytest.approx(report.rows[0].accuracy.value)
    cheap, whole = (model.cost(degree).gmacs for degree in (4, 0))
    sent_on = 1 - float(torch.cat(early).mean())
    assert report.rows[0].gmacs == pytest.approx(cheap + sent_on * whole)


def test_the_command_calibrates_and_predict_uses_it(run, digits, cli):
    code, out, err = cli("cascade", run.folder, "--degrees", "4,0", "--max-lost", 0.06)
    assert code == 0, err
    assert "lost answers: " in out
    assert "allowed 6 %" in out
    assert "accuracy minus fixed degrees at the same time: " in out
    assert (run.folder / "eval" / "cascade.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = cli("predict", run.folder, digits / "val", "--cascade")
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 80
    by_degree = {}
    for degree in ("4", "0"):
        plain = list(
            csv.DictReader(
                io.StringIO(cli("predict", run.folder, digits / "val", "--degree", degree)[1])
            )
        )
        by_degree[degree] = {row["path"]: row for row in plain}
    for row in rows:
        degree = row.pop("degree")
        assert row == by_degree[degree][row["path"]]
    line = cli("predict", run.folder, digits / "val", "--cascade", "--format", "jsonl")[1].split(
        "\n"
    )
    assert json.loads(line[0])["degree"] in (0, 4)


def test_eval_judges_the_cascade_beside_degrees(run, report, digits, cli):
    found = td.Cascade.load(run.model(), run.cascade_file)
    code, out, err = cli("eval", run.folder, "--cascade", "--degrees", "0,2", "--batch-size", 32)
    assert code == 0, err
    assert "answered early" in out
    with (run.folder / "eval" / "cascade.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["degrees"] for row in rows] == ["4→0", "2", "0"]
    fixed = {str(row.degree): row for row in evaluate(run, "0,2")}
    for row in rows[1:]:
        assert float(row["accuracy"]) == pytest.approx(fixed[row["degrees"]].accuracy)
        assert row["early"] == ""
    answers = list(predict(run, find_sources([digits / "val"]), cascade=True))
    right = [Path(each.path).parent.name == each.classes[0] for each in answers]
    assert float(rows[0]["accuracy"]) == pytest.approx(sum(right) / len(right))
    early = [each.degree == found.degrees[0] for each in answers]
    assert float(rows[0]["early"]) == pytest.approx(sum(early) / len(early))
    assert float(rows[-1]["speedup"]) == 1
    assert all(float(row["images_per_s"]) > 0 for row in rows)
    for options in (("--compensator", "x"), ("--images", "x")):
        code, _, err = cli("eval", run.folder, "--cascade", *options)
        assert (code, "cannot be combined with --" in err, "ascade" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--degrees", "4,0"], "either max_changed or max_lost"),
        (["--degrees", "0,4", "--max-lost", "0.1"], "two or three, the cheapest first"),
        (["--degrees", "99,0", "--max-lost", "0.1"], "degrees must lie in"),
        (
            ["--degrees", "4,0", "--max-lost", "0.01"],
            "needs at least 375 images to calibrate on, got 80",
        ),
        (["--degrees", "4,0", "--max-lost", "2"], r"max_lost must lie in \(0, 1\), got 2"),
    ],
)
def test_mistakes_are_one_line(run, cli, arguments, message):
    code, _, err = cli("cascade", run.folder, *arguments)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert re.search(message, line)


def test_predict_says_what_does_not_go_together(run, digits, cli, tmp_path):
    code, _, err = cli("predict", run.folder, digits / "val", "--cascade", "--degree", 2)
    assert (code, err.strip()) == (2, "error: degree cannot be combined with cascade, got 2.")
    code, _, err = cli("predict", run.folder, digits / "val", "--cascade", "--ray")
    assert code == 2
    assert "ray predicts classes in PyTorch: leave out --runtime, " in err
    code, _, err = cli("predict", run.folder, digits / "val", "--cascade", "--precision", "bf16")
    assert (code, "calibrated in fp32, not in torch bf16: choose" in err) == (2, True)
    changed = tmp_path / "other"
    shutil.copytree(run.folder, changed)
    (changed / "best/config.json").write_text((run.best / "config.json").read_text() + " ")
    code, _, err = cli("predict", changed, digits / "val", "--cascade")
    assert (code, "calibrated for other weights" in err) == (2, True)
    run.cascade_file.rename(tmp_path / "kept")
    code, _, err = cli("predict", run.folder, digits / "val", "--cascade")
    (tmp_path / "kept").rename(run.cascade_file)
    assert code == 2
    assert "there is no cascade; `tokendial cascade RUN` makes one" in err
