import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import tokendial as td
from tokendial.runs import Run, tuning
from tokendial.runs.evaluate import evaluate_loader, validation_set
from tokendial.runs.tuning import tune_run
from tokendial.runs.ways import Way
from tokendial.runtimes import Runtime

# The exporter's own warnings are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def copied(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "copied"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("runtime", "cascade.json"))
    return Run(folder)


@pytest.fixture(scope="module", autouse=True)
def torch_only():
    """Try PyTorch only, because exporting takes long."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning, "RUNTIMES", (Runtime(), Runtime("torch", "bf16")))
        yield


@pytest.fixture(scope="module")
def tuned(copied):
    return tune_run(copied, speedup=0.0, max_loss=0.03, minutes=10)


def test_the_fastest_way_within_the_loss_is_chosen(tuned):
    assert tuned.best is not None
    speeds = [row.speedup for row in tuned.rows]
    assert speeds == sorted(speeds, reverse=True)
    within = [row for row in tuned.rows if row.most_lost <= 0.03]
    assert tuned.best is max(within, key=lambda row: row.speedup)
    for row in tuned.rows:
        assert row.lost == pytest.approx(tuned.base_score - row.score)
        assert row.accuracy_lost.value == pytest.approx(row.lost, abs=1e-6)


def test_the_tuned_folder_is_a_run_that_scores_what_was_promised(tuned, copied):
    way, folder = tuned.best.way, copied.folder / "tuned"
    run = Run(folder)
    model = run.model().eval()
    assert model.degree == way.degrees[0] == run.recipe().train.degree
    record = json.loads((folder / "tuned.json").read_text())
    assert (record["runtime"], record["precision"]) == (way.runtime.name, way.runtime.precision)
    assert len(record["tried"]) == len(tuned.rows)
    task, loader = validation_set(run, model, 8)
    images = next(iter(loader))[0]
    started = way.runtime.start(model, images, degrees=way.degrees)
    started.set_degree(way.degrees[0])
    answering = started
    if len(way.degrees) > 1:
        answering = td.Cascade.load(started, run.cascade_file)
        assert answering.degrees == way.degrees
    scores = evaluate_loader(answering, loader, task)
    assert scores[tuned.metric] == pytest.approx(tuned.best.score, abs=0.02)
    assert run.cascade_file.exists() == (len(way.degrees) > 1)


def test_nothing_is_written_if_nothing_is_fast_enough(copied, cli, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = cli("tune", copied.folder, "--speedup", 1e6, "--out", out, "--minutes", 0)
    assert code == 1
    assert "nothing that was tried is 1e+06 times as fast" in printed
    assert "torch bf16, own schedules: no time left" in printed
    assert not out.exists()


def test_the_command_says_how_to_run_the_best_way(copied, digits, cli, monkeypatch):
    monkeypatch.setattr(tuning, "RUNTIMES", (Runtime(),))
    code, out, err = cli("tune", copied.folder, "--max-loss", 100, "--speedup", 0)
    assert code == 0, err
    words = re.search(r"tokendial (predict .*)", out)[1].replace("IMAGES", str(digits / "val"))
    code, out, err = cli(*words.split())
    assert code == 0, err
    assert len(out.splitlines()) == 81
    assert "as tuned" not in err  # it was the plain runtime


def test_a_tuned_run_computes_as_it_was_tuned(tuned, copied, digits, cli, tmp_path):
    folder = shutil.copytree(copied.folder / "tuned", tmp_path / "tuned")
    record = json.loads((folder / "tuned.json").read_text())
    chosen = record | {"runtime": "torch", "precision": "bf16"}
    (folder / "tuned.json").write_text(json.dumps(chosen))

    def predict(*options):
        code, out, err = cli("predict", folder, digits / "val", *options)
        assert code == 0, err
        return out, "runtime torch, precision bf16, as tuned" in err

    def difference(printed, other):
        texts = [csv.DictReader(io.StringIO(text)) for text in (printed, other)]
        pairs = zip(*texts, strict=True)
        return max(abs(float(a["probability"]) - float(b["probability"])) for a, b in pairs)

    own, asked, whole = predict(), predict("--precision", "bf16"), predict("--runtime", "torch")
    assert (own[1], asked[1], whole[1]) == (True, False, False)
    # Two starts may choose different layouts, which round to bfloat16 at different places.
    assert difference(own[0], asked[0]) < 2e-3
    assert difference(own[0], whole[0]) > 1e-5
    code, _, err = cli("eval", folder, "--degrees", "0")
    assert code == 0, err
    assert "as tuned" in err
    (folder / "tuned.json").write_text(json.dumps(chosen | {"precision": "fp8"}))
    code, _, err = cli("predict", folder, digits / "val")
    assert code == 2
    assert re.search(r"tuned.json is damaged: precision in torch must be .*, got 'fp8'", err)


def test_a_compensator_is_tried(copied, digits, cli, monkeypatch, tmp_path):
    """Only ways with it are left to choose from, and degree 1 is said to be the fastest."""
    monkeypatch.setattr(tuning, "RUNTIMES", (Runtime(),))
    plugin = td.Compensator.for_model(copied.model(), td.ToCom(rank=2), steps=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter += 3 * torch.randn(parameter.shape, generator=generator)
    plugin.save_pretrained(tmp_path / "plugin")
    evaluate = tuning.evaluate_ways

    def evaluate_compensated(trial, *arguments):
        base = trial.seconds[trial.base.way]
        ways = [way for way in trial.seconds if way.schedule == "compensated"]
        assert {way.degrees for way in ways} == {(0,), (1,), (2,)}
        trial.seconds = {way: base / (1 + (way.degrees == (1,))) for way in ways}
        trial.seconds[trial.base.way] = base
        return evaluate(trial, *arguments)

    monkeypatch.setattr(tuning, "evaluate_ways", evaluate_compensated)
    out = tmp_path / "tuned"
    chosen = ("--max-loss", 100, "--speedup", 0, "--out", out)
    code, printed, err = cli("tune", copied.folder, *chosen, "--compensator", tmp_path / "plugin")
    assert code == 0, err
    record = json.loads((out / "tuned.json").read_text())
    assert record["compensator"] == str(tmp_path / "plugin")
    (row,) = record["tried"]
    assert row["way"] == "torch fp32, degree 1 (compensated)"
    # The printed command gives the score that was measured: the run keeps its trained degree.
    words = re.search(r"tokendial (predict .*)", printed)[1].replace("IMAGES", str(digits / "val"))
    code, given, err = cli(*words.split())
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(given)))
    right = [row["class"] == Path(row["path"]).parent.name for row in rows]
    assert sum(right) / len(right) == pytest.approx(row["accuracy"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speedup", "-1"], "speedup must be a number of at least 0, got -1"),
        (["--max-loss", "nan"], "max_loss must be a number of at least 0, got nan"),
    ],
)
def test_mistakes_are_one_line(copied, cli, arguments, message):
    code, _, err = cli("tune", copied.folder, *arguments)
    assert code == 2
    assert message in err


def test_files_of_others_are_not_replaced(copied, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no tuned model"):
        tune_run(copied, out=tmp_path)


def test_a_way_reads_like_what_it_is():
    fast = Runtime("openvino", "bf16")
    assert str(Way("own", fast, (5,))) == "openvino bf16, degree 5"
    assert str(Way("fitted", fast, (5, 0))) == "openvino bf16, cascade 5→0 (fitted)"
    assert str(Way("compensated", fast, (5,))) == "openvino bf16, degree 5 (compensated)"
