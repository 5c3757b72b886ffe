"""The commands about serving, against a server that stands in for `tokendial serve`."""

import itertools
import json
import os
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from local_server import local_server

from benchmarks import answers, serving, soak
from benchmarks.load import Exchange
from benchmarks.outage import longest_outage
from benchmarks.server import Server, at_degree, capacity, serve
from benchmarks.workload import Workload
from tokendial.runs import Run

BUSY_S = 0.004


class StandIn:
    """Answers one request after another in 4 ms; wrong is every image whose number mod 4 is below
    the degree, which is the fixed one, or 1 without one."""

    def __init__(self, run: Run, *, status=lambda number: 200, output=None) -> None:
        self.workload = Workload(run, 1000)
        self.numbers = {json.loads(self.workload.body([n]))["images"][0]: n for n in range(16)}
        self.status, self.output, self.count = status, output, itertools.count()
        self.started: list[tuple[str, ...]] = []

    @contextmanager
    def served(self, runs, *options):
        self.started.append(options)
        degree = int(options[options.index("--degree") + 1]) if "--degree" in options else 1
        with local_server(lambda path, body: self.behave(server, path, body, degree)) as server:
            yield Server(server.url, os.getpid())

    def behave(self, server, path, body, degree):
        if path != "/v1/predict":
            told = {
                "/v1/live": {"slo_ms": 10_000},
                "/v1/degrees": {"degrees": [{"degree": degree} for degree in range(5)]},
                "/v1/models": {"models": [{"name": "scenes"}]},
            }
            return 200, json.dumps(told[path]).encode()
        with server.lock:
            time.sleep(BUSY_S)
            if (status := self.status(next(self.count))) != 200:
                return status, b"{}"
            asked = json.loads(body)
            degree = asked.get("degree", degree)
            degree = {"auto": 1, "best": 0}.get(degree, degree)
            images = [self.numbers[image] for image in asked["images"]]
            rows = [self.prediction(number, degree) for number in images]
            return 200, json.dumps({"predictions": rows}).encode()

    def prediction(self, number, degree):
        names = self.workload.classes
        if self.output is None:
            right = int(self.workload.targets[number])
            classes = {names[right - (number % 4 < degree)]: 0.8}
        else:
            classes = dict(zip(names, self.output(number, degree).tolist(), strict=True))
        told = [{"name": name, "probability": value} for name, value in classes.items()]
        return {
            "degree": degree,
            "batch": 1,
            "queue_ms": 0.0,
            "compute_ms": 1.0,
            "unsure_at": [],
            "classes": told,
        }


@pytest.fixture
def scenes(make_run):
    return make_run("scenes", task="count")


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run a command against a stand-in; returns what it wrote."""
    monkeypatch.setattr("benchmarks.server.CLIENTS", (2,))

    def call(module, stand_in, run, *options):
        monkeypatch.setattr(module, "serve", stand_in.served)
        out = tmp_path / "out"
        told = [str(run.folder), "--out", str(out), *options]
        try:
            module.main([*told])
        finally:
            found = {path.suffix: path for path in out.iterdir()} if out.exists() else {}
        assert set(found) == {".json", ".md", ".png"}
        return json.loads(found[".json"].read_text())

    return call


def test_every_policy_gets_the_same_load(command, scenes):
    stand_in = StandIn(scenes)
    load = "--images-per-request 4 --probe 0.1 --seconds 0.1,0.4,0.1 --load 1.2 --server-threads 1"
    found = command(serving, stand_in, scenes, *load.split(), "--serve", "--max-queue 9")
    rows = {row["policy"]: row for row in found["rows"]}
    assert list(rows) == ["degree 0", "degree 2", "degree 4", "controller"]
    common = ("--threads", "1", "--max-queue", "9")
    dials = [("--degree", "0")] * 2 + [("--degree", "2"), ("--degree", "4"), ()]
    assert stand_in.started == [(*common, *dial) for dial in dials]
    assert len({row["requests"] for row in rows.values()}) == 1
    for row in rows.values():
        assert row["answered"] == row["requests"] > 0
        assert row["goodput"] == pytest.approx(4 * row["answered"] / 0.4)
        assert (row["refused"], row["errors"], row["within"], row["ratio"]) == (0, 0, 1.0, 1.0)
    assert [row["degree"] for row in rows.values()] == [0, 2, 4, 1]
    # Of each four images in a request, as many are wrong as the degree says.
    assert [row["accuracy"] for row in rows.values()] == pytest.approx([1, 0.5, 0, 0.75])
    assert [row["back_s"] is None for row in rows.values()] == [False, True, True, True]


def test_a_cascade_and_a_runtime_get_servers_of_their_own():
    dials = serving.dials((0, 2, 4), cascade=True, runtime="auto")
    assert list(dials)[:4] == ["degree 0", "degree 2", "degree 4", "controller"]
    assert dials["cascade"] == ["--cascade"]
    assert dials["controller, auto"] == ["--runtime", "auto"]


def test_a_capacity_at_one_degree_is_that_without_the_cascade():
    told = ["--threads", "1", "--cascade", "--slo-ms", "500"]
    assert at_degree(0, told) == ["--threads", "1", "--slo-ms", "500", "--degree", "0"]


def test_capacity_is_not_above_what_the_server_can_do(scenes):
    stand_in = StandIn(scenes)
    bodies = [stand_in.workload.body(range(4))]
    with stand_in.served([]) as server:
        found = capacity(server, bodies, each=4, seconds=0.1)
    assert 0 < found <= 4 / BUSY_S


def test_a_server_without_capacity_is_told(scenes):
    stand_in = StandIn(scenes, status=lambda _: 503)
    bodies = [stand_in.workload.body(range(4))]
    with stand_in.served([]) as server, pytest.raises(ValueError, match="objective of 10000 ms"):
        capacity(server, bodies, each=4, seconds=0.02)


@pytest.mark.parametrize("trace", ["poisson", "bursts", "diurnal"])
def test_traces_are_as_long_as_asked(trace):
    asked = serving._parse_arguments(["RUN", "--trace", trace, "--seconds", "5,30,15"])
    load = serving.load_of(asked, 100.0)
    assert (load.start, load.end, load.seconds) == (0, 50, 50)
    assert 0.5 * 100 * 40 < len(load.times) < 3 * 100 * 60


def test_a_recorded_trace_is_played_as_it_is(tmp_path):
    (tmp_path / "times.txt").write_text("7\n5\n5.5\n")
    load = serving.load_of(
        serving._parse_arguments(["RUN", "--trace", str(tmp_path / "times.txt")]), 100.0
    )
    assert load.times.tolist() == [0, 0.5, 2]
    assert (load.start, load.end, load.seconds) == (0, 3, 3)


def test_quick_is_short_but_for_what_is_given():
    asked = serving._parse_arguments(["RUN", "--quick", "--probe", "9"])
    assert (sum(asked.seconds), asked.probe) == (14, 9)


SOAK = ["--images-per-request", "4", "--probe", "0.1", "--minutes", "0.02", "--growth", "1"]


def test_refusals_are_no_errors_in_a_soak(command, scenes):
    stand_in = StandIn(scenes, status=lambda number: (200, 200, 429, 503)[number % 4])
    [row] = command(soak, stand_in, scenes, *SOAK)["rows"]
    assert row["errors"] == 0
    assert row["answered"] + row["refused"] == row["requests"]
    assert row["refused"] > 0
    assert row["memory_mib"] > 10


def test_another_status_fails_a_soak(command, scenes):
    stand_in = StandIn(scenes, status=lambda number: 500 if number % 5 == 4 else 200)
    with pytest.raises(SystemExit, match=r"soak: \d+ x status 500"):
        command(soak, stand_in, scenes, *SOAK)


def test_growth_counts_after_the_first_part():
    memory = [*np.linspace(100, 200, 60), *[200.0] * 50, *[204.0] * 60]
    assert soak.memory_growth(memory, settle=60) == pytest.approx(0.02)


def test_right_answers_are_found_right(command, scenes):
    offline = answers.Offline(scenes, Workload(scenes, 16).images)
    stand_in = StandIn(scenes, output=offline.expected)
    found = command(answers, stand_in, scenes, "--requests", "30", "--images", "16")
    assert {row["what"] for row in found["rows"]} == {
        f"scenes, {kind}" for kind in ("auto", "best", "fixed")
    }
    assert all(row["wrong"] == 0 and row["apart"] < 1e-6 for row in found["rows"])
    degrees = {row["what"]: row["degrees"] for row in found["rows"]}
    assert (degrees["scenes, auto"], degrees["scenes, best"]) == ([1], [0])
    assert len(degrees["scenes, fixed"]) > 2


@pytest.mark.parametrize(
    "mistake",
    {
        "another image": lambda number, degree: (number ^ 1, degree),
        "another degree": lambda number, degree: (number, degree ^ 1),
    }.items(),
    ids=lambda item: item[0],
)
def test_answers_of_something_else_are_found(command, scenes, mistake):
    offline = answers.Offline(scenes, Workload(scenes, 16).images)
    stand_in = StandIn(scenes, output=lambda *asked: offline.expected(*mistake[1](*asked)))
    with pytest.raises(SystemExit, match=r"answers: \d+ of \d+ are wrong"):
        command(answers, stand_in, scenes, "--requests", "30", "--images", "16")


TALKS = """
import signal, sys, time
print("serving at http://127.0.0.1:4321/ until it is told to end", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
time.sleep(60)
"""


@pytest.fixture
def in_place_of_serve(monkeypatch):
    """Let a Python script be what is started."""
    return lambda script: monkeypatch.setattr(
        "benchmarks.server.COMMAND", (sys.executable, "-c", script)
    )


def test_a_server_is_ready_when_it_tells_its_address(in_place_of_serve):
    in_place_of_serve(TALKS.format(code=0))
    with serve(["RUN"]) as server:
        assert server.predict == "http://127.0.0.1:4321/v1/predict"


def test_a_server_that_does_not_end_well_fails(in_place_of_serve):
    in_place_of_serve(TALKS.format(code=3))
    with pytest.raises(ValueError, match="the server ended with 3:\nserving at"), serve(["RUN"]):
        pass


def test_a_server_that_does_not_start_tells_why(in_place_of_serve):
    in_place_of_serve("import sys; sys.exit(f'no such run: {sys.argv[1]}')")
    with pytest.raises(ValueError, match="did not start:\nno such run: RUN"), serve(["RUN"]):
        pass


def test_an_outage_lasts_from_the_last_answer_to_the_next():
    def at(answered: float, status: int = 200) -> Exchange:
        return Exchange(0, answered - 0.5, answered=answered, status=status)

    told = [at(1.0), at(2.0), at(2.5, status=503), at(4.5), at(5.0), Exchange(0, 5.0)]
    assert longest_outage(told, seconds=6.0) == 2.5
    assert longest_outage(told, seconds=9.0) == 4.0
