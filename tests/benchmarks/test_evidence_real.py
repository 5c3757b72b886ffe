import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from benchmarks.evidence_real.common import Options, cached
from benchmarks.evidence_real.statistics import (
    Resampling,
    accuracy,
    auroc,
    balanced_accuracy,
    interval,
    mean,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 5])
def test_metrics_are_those_of_scikit_learn(rng, classes):
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=200)])
    logits = rng.normal(size=(len(labels), classes)).round(1)  # rounded, so that there are ties
    logits[np.arange(len(labels)), labels] += 0.7
    predicted = logits.argmax(1)
    assert accuracy(logits, labels) == pytest.approx(accuracy_score(labels, predicted))
    assert balanced_accuracy(logits, labels) == pytest.approx(
        balanced_accuracy_score(labels, predicted)
    )
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if classes == 2:
        expected = roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    else:
        expected = roc_auc_score(labels, probabilities, multi_class="ovr")
    assert auroc(logits, labels) == pytest.approx(expected)


def test_an_interval_holds_the_mean_of_its_population_in_nineteen_of_twenty_samples(rng):
    hits = 0
    for trial in range(200):
        sample = rng.normal(size=60)
        draws = Resampling(60, 1, replicates=300, seed=trial)
        found = interval(draws.scores(mean, [sample], np.zeros(60)))
        assert found.value == pytest.approx(sample.mean())
        hits += found.low <= 0 <= found.high
    assert 0.9 <= hits / 200 <= 0.98


def test_paired_differences_vary_less_than_their_parts(rng):
    labels, hard = np.zeros(300, int), rng.normal(size=300)
    worse = [hard + rng.normal(scale=0.1, size=300) for _ in range(3)]
    better = [values + 0.2 for values in worse]
    draws = Resampling(300, 3)
    first, second = (draws.scores(mean, values, labels) for values in (worse, better))
    difference, alone = interval(second - first), interval(second)
    assert (difference.low, difference.high) == pytest.approx((0.2, 0.2))
    assert alone.high - alone.low > 0.15


def test_the_interval_widens_with_the_spread_of_seeds(rng):
    values, labels = rng.normal(size=100), np.zeros(100, int)
    draws = Resampling(100, 3)
    alike = interval(draws.scores(mean, [values] * 3, labels))
    apart = interval(draws.scores(mean, [values - 1, values, values + 1], labels))
    assert apart.value == pytest.approx(alike.value)
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


@pytest.mark.parametrize("name", ["numbers.json", "arrays.npz"])
def test_a_result_is_computed_once_and_a_failure_leaves_nothing(tmp_path, name):
    path = tmp_path / "results" / name
    value = 3 if name.endswith("json") else np.arange(3)

    def stopped() -> dict[str, object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(path, stopped)
    assert not path.exists()
    for compute in (lambda: {"value": value}, stopped):
        assert np.array_equal(cached(path, compute)["value"], value)


def test_options_are_those_of_the_dataclass(capsys):
    options = Options.parse("tocom", "", ["--jobs", "1", "--out", "here"])
    assert json.dumps([options.jobs, str(options.out)]) == '[1, "here"]'
    with pytest.raises(SystemExit):
        Options.parse("tocom", "", ["--help"])
    assert "--cutouts" in capsys.readouterr().out
