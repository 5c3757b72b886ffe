import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from benchmarks.evidence_real import common
from benchmarks.evidence_real.classifiers import Setting
from benchmarks.evidence_real.common import Options, cached
from benchmarks.evidence_real.statistics import (
    accuracy,
    auroc,
    balanced_accuracy,
    interval,
    mean,
    resampled_scores,
)
from tokendial.measure import Resampling
from tokendial.runs import Run, read_recipe


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
        draws = Resampling(60, 1, resamples=300, seed=trial)
        found = interval(resampled_scores(draws, mean, [sample], np.zeros(60)))
        assert found.value == pytest.approx(sample.mean())
        hits += found.low <= 0 <= found.high
    assert 0.9 <= hits / 200 <= 0.98


def test_paired_differences_vary_less_than_their_parts(rng):
    labels, hard = np.zeros(300, int), rng.normal(size=300)
    worse = [hard + rng.normal(scale=0.1, size=300) for _ in range(3)]
    better = [values + 0.2 for values in worse]
    draws = Resampling(300, 3)
    first, second = (resampled_scores(draws, mean, values, labels) for values in (worse, better))
    difference, alone = interval(second - first), interval(second)
    assert (difference.low, difference.high) == pytest.approx((0.2, 0.2))
    assert alone.high - alone.low > 0.15


def test_the_interval_widens_with_the_spread_of_seeds(rng):
    values, labels = rng.normal(size=100), np.zeros(100, int)
    draws = Resampling(100, 3)
    alike = interval(resampled_scores(draws, mean, [values] * 3, labels))
    apart = interval(resampled_scores(draws, mean, [values - 1, values, values + 1], labels))
    assert apart.value == pytest.approx(alike.value)
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_images_of_one_object_count_as_one(rng):
    objects, labels = np.repeat(np.arange(40), 5), np.zeros(200, int)
    values = [np.repeat(rng.normal(size=40), 5)]
    single, grouped = (
        interval(resampled_scores(Resampling(200, 1, groups=groups), mean, values, labels))
        for groups in (None, objects)
    )
    assert grouped.value == pytest.approx(single.value)
    ratio = (grouped.high - grouped.low) / (single.high - single.low)
    assert ratio == pytest.approx(5**0.5, rel=0.15)


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


TABLE = """
import sys, time
from pathlib import Path
from benchmarks.evidence_real.common import Options, cached, in_processes

def answer(number):
    def compute():
        with (folder / "computed").open("a") as file:
            print(number, file=file)
        time.sleep(60 * (number == stuck))
        return {"square": number**2}
    return cached(folder / f"{number}.json", compute)["square"]

folder, stuck = Path(sys.argv[1]), int(sys.argv[2])
if __name__ == "__main__":
    print(in_processes(answer, range(4), Options(jobs=1)))
"""


def test_a_killed_table_goes_on_where_it_was(tmp_path):
    def start(stuck: int) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), str(tmp_path), str(stuck)]
        return subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment
        )

    script = tmp_path / "table.py"
    script.write_text(TABLE)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = start(stuck=2)
    for _ in range(600):
        if (tmp_path / "computed").exists() and "2" in (tmp_path / "computed").read_text():
            break
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert {path.name for path in tmp_path.glob("*.json")} == {"0.json", "1.json"}
    printed, _ = start(stuck=-1).communicate()
    assert printed == "[0, 1, 4, 9]\n"
    assert (tmp_path / "computed").read_text().split() == ["0", "1", "2", "2", "3"]


def test_a_finished_run_is_taken_only_with_the_settings_it_was_trained_with(tmp_path, monkeypatch):
    options = Options(out=tmp_path)
    folder = tmp_path / "runs" / "linear"
    monkeypatch.setattr(common, "run_tokendial", lambda *words: pytest.fail("was trained again"))
    recipe = read_recipe("real/elpv/linear", [f"output={folder}", "seed=1", "train.trackers=[]"])
    Run(folder).claim(recipe, ["intact", "defective"])
    (folder / "finished").touch()
    assert common.train("linear", "real/elpv/linear", {"seed": 1}, options) == folder
    with pytest.raises(ValueError, match=r"linear holds another run: its seed is 1, not 2"):
        common.train("linear", "real/elpv/linear", {"seed": 2}, options)


def test_predictions_of_every_setting_have_a_file_of_their_own():
    settings = [
        Setting(dial, degree, compensator, scale)
        for dial in (None, "tome", "evit")
        for degree in (0, 3)
        for compensator in (None, "runs/compensator-a/last", "runs/compensator-b/last")
        for scale in (0.5, 1.0)
        if compensator or scale == 1
    ]
    assert len({each.name for each in settings}) == len(settings)
