"""The table of best rates, on stored predictions: rates are chosen by held-out images alone."""

import numpy as np
import pytest

from benchmarks.evidence_real import best_rates, classifiers
from benchmarks.evidence_real.classifiers import Setting
from benchmarks.evidence_real.common import Options
from tokendial.measure import Resampling

IMAGES = 40
LABELS = np.arange(IMAGES) % 2


def store(options, classifier, part, right):
    """Write predictions of which the first `right` images of each class are right."""
    hits = np.arange(IMAGES) // 2 < right
    logits = np.eye(2)[np.where(hits, LABELS, 1 - LABELS)]
    path = options.out / "predictions" / classifier.name / f"{Setting().name}-{part}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, logits=logits, labels=LABELS)


@pytest.fixture
def options(tmp_path, monkeypatch):
    found = Options(out=tmp_path)
    draws = lambda data, images, seeds, options: Resampling(images, seeds)  # noqa: E731
    monkeypatch.setattr(classifiers, "resampling", draws)
    # Predictions are stored below, so nothing is left to train or to predict.
    monkeypatch.setattr(best_rates, "compute", lambda *asked, **part: None)
    for method in best_rates.METHODS:
        held_out = (
            {3e-4: 12, 1e-3: 16, 3e-3: 16} if method == "vpt" else {3e-4: 8, 1e-3: 9, 3e-3: 10}
        )
        for lr, right in held_out.items():
            store(found, best_rates.candidate("elpv", method, lr), "val", right)
            # The test images would choose another rate.
            for seed, one in enumerate(best_rates.finals("elpv", method, lr)):
                store(found, one, "test", (18 if lr == 3e-4 else 12) + seed)
    return found


def test_rates_are_chosen_on_held_out_images(options):
    rows = {row["method"]: row for row in best_rates.rows_of("elpv", options)}
    assert rows["vpt"]["rate"] == 1e-3  # as good as 3e-3, and smaller
    assert rows["lora"]["rate"] == 3e-3
    assert rows["vpt"]["score"].value == pytest.approx(13 / 20)  # mean of three seeds
    assert rows["vpt"]["difference"].value == pytest.approx(0)
    cells = best_rates.cells(rows["vpt"])
    assert len(cells) == len(best_rates.HEADER)
    assert cells[2:4] == ("60.0, 80.0, 80.0", "0.001")


def test_every_training_of_the_table_has_a_run_of_its_own():
    both = [(data, method) for data in best_rates.DATA for method in best_rates.METHODS]
    names = [best_rates.candidate(*each, lr).name for each in both for lr in best_rates.RATES]
    names += [one.name for each in both for one in best_rates.finals(*each, 1e-3)]
    assert len(set(names)) == len(names)
