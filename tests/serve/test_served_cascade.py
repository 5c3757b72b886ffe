"""A server with a cascade: the degrees in its answers, metrics, and what is refused."""

import math
import shutil
from contextlib import contextmanager
from unittest import mock

import pytest
from served_runs import alone, write_run
from serving import at_once, file, form, picture, serving, until

from tokendial.cascade import CascadeCalibration, CascadeStages
from tokendial.runs import Run
from tokendial.runtimes import Runtime
from tokendial.serve import starting
from tokendial.serve.scheduling.cost_model import CostModel
from tokendial.serve.settings import check_settings
from tokendial.serve.workers.models import load_models
from tokendial.serve.workers.served_runs import ServedRuns


def write_cascade(run: Run, degrees=(3, 0), threshold: float = 2.0) -> None:
    """A cascade that is unsure of every answer."""
    calibration = CascadeCalibration(
        *((threshold,), "changed", 0.05, 0.95, 800, 10, 0.02, (1.0,), ((0.9, 1.0),))
    )
    CascadeStages(degrees, calibration=calibration, revision=run.revision()).save(run.cascade_file)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    written = write_run(tmp_path_factory.mktemp("cascade") / "run", ["cat", "dog", "hamster"])
    write_cascade(written)
    return written


@contextmanager
def slow_at_0(name, run):
    """A server that takes degree 0 for so slow that even one request raises the dial."""
    costs = CostModel({(name, degree): {1: 0.001 if degree else 8.0} for degree in range(9)})
    with (
        mock.patch.object(starting, "measure_costs", return_value=costs),
        serving({name: run}, cascade=True, slo_ms=20_000) as running,
    ):
        running.ask("/v1/predict", file(picture()), "image/png")  # an idle server takes degree 0
        until(lambda: metric(running, "tokendial_degree") == 3)
        yield running


@pytest.fixture(scope="module")
def server(run):
    with slow_at_0("pets", run) as running:
        yield running


def metric(server, name: str) -> float:
    (line,) = (
        line
        for line in server.ask("/metrics").body.decode().splitlines()
        if line.startswith(f"{name} ")
    )
    return float(line.split()[1])


def test_under_load_an_unsure_image_is_answered_at_both_degrees(server, run):
    reply = server.ask("/v1/predict", file(picture()), "image/png")
    (found,) = reply.json["predictions"]
    assert (found["degree"], found["unsure_at"]) == (0, [3])
    best = found["classes"][0]
    probabilities = alone(run, picture(), 0).softmax(0)
    assert best["probability"] == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert best["name"] == run.classes()[int(probabilities.argmax())]
    assert metric(server, "tokendial_degree") == 3
    assert metric(server, "tokendial_second_answers_total") == 1
    assert metric(server, "tokendial_cascade_drifted") == 0
    assert 0 <= metric(server, "tokendial_sent_on_share") <= 1


def test_an_unsure_mask_is_made_again(masks, tmp_path):
    run = Run(shutil.copytree(masks.folder, tmp_path / "run"))
    write_cascade(run)
    with slow_at_0("masks", run) as server:
        (found,) = server.predict(file(picture())).json["predictions"]
        (whole,) = server.predict(file(picture()), query="?degree=0").json["predictions"]
    assert (found["degree"], found["unsure_at"]) == (0, [3])
    assert found["mask"] == whole["mask"]


def test_degrees_that_the_cascade_spans_are_for_requests_only(server):
    dial = server.engine._scheduler.rules.degrees
    assert (0 in dial, 3 in dial, {1, 2} & set(dial)) == (True, True, set())
    reply = server.ask("/v1/predict?degree=2", file(picture()), "image/png")
    (prediction,) = reply.json["predictions"]
    assert (prediction["degree"], prediction["unsure_at"]) == (2, [])
    reply = server.ask("/v1/predict?degree=3", file(picture()), "image/png")
    assert reply.json["predictions"][0]["unsure_at"] == []


def test_an_embedding_gets_no_second_answer(server):
    reply = server.ask("/v1/embeddings", file(picture()), "image/png")
    (found,) = reply.json["data"]
    assert (found["degree"], found["unsure_at"]) == (3, [])
    for _ in range(25):  # embeddings are neither sure nor unsure: too few answers to judge by
        server.ask("/v1/embeddings", *form(*[file(picture())] * 4))
    assert math.isnan(metric(server, "tokendial_unsure_share"))


def test_new_weights_need_a_new_calibration(run, tmp_path):
    changing = Run(shutil.copytree(run.folder, tmp_path / "run"))
    served = ServedRuns({"pets": changing}, check_settings({"cascade": True, "max_batch": 2}))

    def reload() -> list[str]:
        return served.reload(at_once)

    try:
        other = write_run(tmp_path / "other", ["cat", "dog", "hamster"], seed=7)
        other.model().save_pretrained(changing.best)
        with pytest.raises(ValueError, match="calibrated for other weights; run `tokendial casc"):
            reload()
        write_cascade(changing, degrees=(4, 0))
        with pytest.raises(ValueError, match="other classes, .* or stages of a cascade now"):
            reload()
        write_cascade(changing, threshold=0.5)
        assert reload() == ["pets"]
        assert served.supervisor.catalog.models["pets"].cascade.thresholds == (0.5,)
    finally:
        served.close()


def test_degrees_of_the_cascade_are_offered_on_a_long_dial(run, monkeypatch):
    """A long dial is offered at about ten of its degrees, and at those of the cascade."""
    monkeypatch.setattr("tokendial.serve.workers.models.degrees_to_show", lambda *_: [0, 4, 8])
    catalog = load_models({"a": run}, cascade=True).catalog
    assert catalog.degrees == (0, 3, 4, 8)
    assert tuple(catalog.models["a"].gmacs) == (0, 3, 4, 8)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["run"], {"degree": 3}, "degree cannot be combined with cascade, got 3"),
        (["run"], {"max_degree": 2}, "cascade: degree 3 is not offered; it must be 0, 1, 2"),
        (["run"], {"compensator": "x"}, "cascade is for one run without a compensator"),
        (["run", "pets"], {}, "cascade is for one run without a compensator"),
        (["pets"], {}, "there is no cascade; `tokendial cascade RUN` makes one"),
    ],
)
def test_what_does_not_go_together_is_refused(run, pets, names, options, message):
    runs = {name: {"run": run, "pets": pets}[name] for name in names}
    with pytest.raises(ValueError, match=message), serving(runs, cascade=True, **options):
        pass


def test_another_precision_than_that_of_the_calibration_is_refused(run):
    models = load_models({"pets": run}, cascade=True)
    with pytest.raises(ValueError, match="calibrated in fp32, not in torch bf16: choose"):
        models.prepare(Runtime(precision="bf16"))
