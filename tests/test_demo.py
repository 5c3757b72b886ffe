import csv
import re

import pytest

from tokendial.demo import run_demo, run_masks_demo
from tokendial.runs import evaluate


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Measure speed for as short a time as possible."""
    monkeypatch.setattr(evaluate, "_TIMING_SECONDS", 0.0)


def test_the_demo_trains_evaluates_every_degree_and_reports(tmp_path):
    small = ("data.train_size=100", "data.val_size=60", "train.epochs=1", "train.warmup_epochs=0")
    report = run_demo(tmp_path / "demo", small)
    page = report.read_text()
    assert page.count("<img") == 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    with (tmp_path / "demo" / "degrees.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["degree"] for row in rows] == [str(degree) for degree in range(10)]
    # The model was trained at degree 3, where the compensator does nothing.
    assert [row["plain"] == row["accuracy"] for row in rows].count(True) < 10
    assert rows[3]["plain"] == rows[3]["accuracy"]
    assert float(rows[9]["gmacs"]) < 0.6 * float(rows[0]["gmacs"])
    assert (tmp_path / "demo" / "run" / "best" / "model.safetensors").exists()


def test_the_mask_demo_trains_evaluates_every_degree_and_reports(tmp_path):
    small = ("data.train_size=40", "data.val_size=4", "train.epochs=1", "model.img_size=48")
    report = run_masks_demo(tmp_path / "demo", small)
    page = report.read_text()
    assert page.count("<img") == 7
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    with (tmp_path / "demo" / "degrees.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["degree"] for row in rows] == [str(degree) for degree in range(10)]
    shares = [float(row["share"]) for row in rows]
    assert shares[0] == 1
    assert shares[1] > 0.5 > shares[-1]
    assert float(rows[-1]["gmacs"]) < float(rows[0]["gmacs"])
