"""The table of models for all degrees: which model and compensator stands in which column.

Scores are made here, one for each model and setting; whether they are right is for other tests.
"""

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evidence_all_degrees as scenes
from benchmarks.evidence_real import all_degrees
from benchmarks.evidence_real.classifiers import Setting

COMPENSATORS = {dial: Path(f"compensator-{dial}-features/last") for dial in all_degrees.DIALS}
SCALES = {0.3: 0.5, 0.6: 0.9, 1.0: 0.7}
"""Made scores on the search set, by scale of the compensator."""


def test_each_column_is_compared_with_the_model_that_was_trained_there(monkeypatch):
    asked = {}

    def score(each, metric, options):
        models, settings = zip(*each, strict=True)
        assert [one.seed for one in models] == [0, 1, 2]
        (setting,) = set(settings)
        number = len(asked)
        asked[models[0].name, setting] = models[0], setting
        return np.full(10, 0.5 + 0.01 * number)

    def best_scale(one, dial, degree, compensator, options):
        assert (one.degree, compensator) == (0, COMPENSATORS[dial])
        return Setting(dial, degree, str(compensator), max(SCALES, key=SCALES.__getitem__))

    monkeypatch.setattr(all_degrees, "bootstrap", score)
    monkeypatch.setattr(all_degrees, "best_scale", best_scale)
    row = all_degrees.row("elpv", "tome", 6, COMPENSATORS, None)
    assert len(row["cells"]) == len(all_degrees.HEADER)
    assert row["cells"][:6] == ["elpv", "tome", "6", "50.0", "51.0", "52.0"]
    np.testing.assert_allclose(row["differences"], [0.01, 0.02, 0.03, 0.04, 0.05])
    models, settings = zip(*asked.values(), strict=True)
    assert [one.degree for one in models] == [6, 0, 0, 6, 6, 6]
    assert [one.all_degrees for one in models] == [None] * 3 + [*all_degrees.ALL_DEGREES]
    assert [setting.scale for setting in settings] == [1.0, 1.0, 0.6, 1.0, 1.0, 1.0]
    assert [setting.compensator is None for setting in settings] == [True] * 2 + [False] + [
        True
    ] * 3


def test_on_scenes_each_column_is_compared_with_the_model_that_was_trained_there(monkeypatch):
    """Answers are made here: whether the right models give them is asked."""
    asked = []

    def right(kind, task, seed, dial, degree, out):
        asked.append((kind, scenes.of_kind(kind, task, seed, dial, degree)))
        share = {"trained there": 0.5, "ToCom": 0.4}.get(kind, 0.3)
        return [number < share * scenes.TEST for number in range(scenes.TEST)]

    monkeypatch.setattr(scenes, "right_answers", right)
    row = scenes.row("count", "tome", 16, Path())
    assert row["accuracy"] == pytest.approx(
        {**dict.fromkeys(scenes.KINDS, 0.3), "trained there": 0.5, "ToCom": 0.4}
    )
    assert row["minus trained there"]["ToCom"].startswith("-10.0 (")
    of_seed = {kind: model for kind, model in asked if model.seed == 1}
    assert [of_seed[kind].source for kind in scenes.KINDS] == [16, 0, 0, 16, 16, 16]
    options = argparse.Namespace(out=Path("out"), scenes=3000)
    settings = {kind: of_seed[kind].settings(options) for kind in scenes.KINDS}
    assert [each["data.train_size"] for each in settings.values()] == [3000] * 5 + [750]
    assert settings["short sandwich"]["train.degrees"] == {"sandwich": 2}
    assert "train.degrees" not in settings["trained there"]
    assert len({each["output"] for each in settings.values()}) == 5  # ToCom's is trained at 0


def test_a_compensator_adds_nothing_where_nothing_is_reduced():
    one = all_degrees.of_kind("ToCom", "elpv", "tome", 0, 1)
    found = all_degrees.setting("ToCom", one, "tome", 0, COMPENSATORS, None)
    assert found == Setting("tome", 0)
