"""The table of embeddings, on made ones: what is compared with the stored ones of degree 0."""

import numpy as np
import pytest

from benchmarks.evidence_real import embeddings
from benchmarks.evidence_real.common import Options
from tokendial.measure import Resampling

LABELS = np.arange(40) % 2
STORED = np.eye(2)[LABELS]


def parts(wrong):
    """Embeddings of training and test images, of which the first `wrong` are of the other class."""
    test = np.where(np.arange(40)[:, None] < wrong, 1 - STORED, STORED)
    both = {"train": STORED, "test": test}
    both = {name: each.astype(np.float32) for name, each in both.items()}
    return both | {"train labels": LABELS, "test labels": LABELS, "share": np.array(0.5)}


def test_adapters_are_compared_with_the_stored_embeddings_of_the_frozen_model(monkeypatch):
    wrong = {"plain": [10], "ToCom": [4], "adapter": [1, 2, 3]}
    monkeypatch.setattr(embeddings, "features", lambda *asked: parts(0))
    made = lambda data, method, seed, degree, options: parts(wrong[method][seed])  # noqa: E731
    monkeypatch.setattr(embeddings, "embeddings", made)
    draws = lambda data, options, seeds: Resampling(40, seeds)  # noqa: E731
    monkeypatch.setattr(embeddings, "resampling", draws)
    rows = embeddings.rows_of("elpv", Options())
    assert [(row["method"], row["r"]) for row in rows] == [
        (method, degree) for method in wrong for degree in embeddings.DEGREES
    ]
    for row in rows:
        share = 1 - np.mean(wrong[row["method"]]) / 40
        for name in embeddings.MEASURES:
            assert row[name].value == pytest.approx(share, abs=1e-6)
        assert row[embeddings.HEADER[-1]].value == pytest.approx(share - 1, abs=1e-6)
        cells = embeddings.cells(row)
        assert len(cells) == len(embeddings.HEADER)
        assert cells[3] == "50%"
