"""On Ray: the same answers, and no accepted request is lost with a replica."""

import asyncio
import http.client
import importlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml
from PIL import Image
from processes import ended, start, wait_until
from ray.exceptions import ActorDiedError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema
from serving import Reply, file, form, picture
from starlette.requests import Request

from tokendial.serve.ray.deployment import Front, RayDeployment, app, needed_replicas

ROOT = Path(__file__).parents[2]
ANSWER = (200, [(b"x-from", b"replica")], b"done")


@dataclass(frozen=True, slots=True)
class Cluster:
    process: BaseProcess
    port: int

    def ask(self, path: str, body: bytes | None = None, kind: str = "") -> Reply:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            client.request("POST" if body else "GET", path, body, {"content-type": kind})
            reply = client.getresponse()
            return Reply(reply.status, dict(reply.getheaders()), reply.read())
        finally:
            client.close()

    def replicas(self) -> list[psutil.Process]:
        """Those that have loaded their model."""
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            # A process may end while it is asked, which psutil does not always turn into its error.
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                title = " ".join(each.cmdline())
                if REPLICA in title and "__init__" not in title:
                    found.append(each)
        return found


REPLICA = "ServeReplica:tokendial:Replica"


@pytest.fixture(scope="module")
def cluster(pets, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path_factory.mktemp("ray")
    options = ("--port", port, "--slo-ms", 60_000, "--max-batch", 4, "--max-bytes", 100_000)
    log = out / "stdout"
    process = start(out, "serve", f"pets={pets.folder}", "--ray", "--replicas", 2, *options)
    try:
        # Two replicas and the front start one after the other; beside other tests that takes long.
        wait_until(lambda: log.exists() and "serving pets" in log.read_text(), process, seconds=400)
        yield Cluster(process, port)
        os.kill(process.pid, signal.SIGTERM)
        assert ended(process) == 0
    finally:
        process.kill()


@torch.no_grad()
def offline(run, image: Image.Image, degree: int) -> dict[str, float]:
    model = run.model()
    model.set_degree(degree)
    seen = run.task().image_transform(model.anatomy)(image).unsqueeze(0)
    return dict(zip(run.classes(), model(seen)[0].softmax(0).tolist(), strict=True))


def probabilities(prediction: dict[str, Any]) -> dict[str, float]:
    return {found["name"]: found["probability"] for found in prediction["classes"]}


@pytest.mark.slow
def test_the_api_is_that_of_one_process(cluster, pets):
    images = [picture(seed) for seed in range(2)]
    reply = cluster.ask("/v1/predict?degree=2", *form(*map(file, images)))
    assert reply.status == 200, reply.body
    for prediction, image in zip(reply.json["predictions"], images, strict=True):
        assert prediction["degree"] == 2
        assert probabilities(prediction) == pytest.approx(offline(pets, image, 2), abs=1e-5)
    assert [model["name"] for model in cluster.ask("/v1/models").json["models"]] == ["pets"]
    assert cluster.ask("/v1/predict", b"no image", "image/png").error["code"] == "not_an_image"
    assert cluster.ask("/v1/predict", bytes(200_000), "image/png").error["code"] == "too_large"
    assert cluster.ask("/v1/predict?model=cars", b"x", "image/png").status == 404


@pytest.mark.slow
def test_the_numbers_are_those_of_all_replicas(cluster):
    text = cluster.ask("/metrics").body.decode()
    found = re.findall(r'^tokendial_degree{replica="(\w+)"} 0.0$', text, flags=re.MULTILINE)
    assert len(set(found)) == 2
    assert text.count("# TYPE tokendial_degree gauge") == 1


@pytest.mark.slow
def test_no_request_is_lost_with_a_replica(cluster):
    images = [file(picture(seed)) for seed in range(8)]
    alone = [cluster.ask("/v1/predict?degree=1", image, "image/png").json for image in images]
    killed, stop = threading.Event(), threading.Event()
    before: list[Reply] = []
    after: list[tuple[int, Reply]] = []

    def ask_on(number: int) -> None:
        while not stop.is_set():
            reply = cluster.ask("/v1/predict?degree=1", images[number], "image/png")
            if killed.is_set():
                after.append((number, reply))
            else:
                before.append(reply)

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(len(images))]
    victim, _ = cluster.replicas()
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(before) > 20, cluster.process)
        victim.kill()
        killed.set()
        wait_until(lambda: len(after) > 100, cluster.process)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {reply.status for reply in before} == {200}
    for number, reply in after:
        assert reply.status == 200, reply.body
        expected, got = alone[number]["predictions"][0], reply.json["predictions"][0]
        assert probabilities(got) == pytest.approx(probabilities(expected), abs=1e-5)
    wait_until(lambda: len(cluster.replicas()) == 2, cluster.process)
    assert victim.pid not in [replica.pid for replica in cluster.replicas()]


class Replicas:
    """What a front is given: each call is answered by the next of `doings`."""

    def __init__(self, *doings: Callable[[], Any]) -> None:
        self.doings, self.calls = list(doings), []
        self.answer = SimpleNamespace(remote=self.remote)

    async def remote(self, scope: dict[str, Any], body: bytes, held_s: float) -> Any:
        self.calls.append((scope, body, held_s))
        return self.doings.pop(0)()


def dies() -> None:
    raise ActorDiedError


def fronted(replicas: Replicas, *chunks: bytes, max_bytes: int = 10, timeout_s: float = 60) -> Any:
    """What a front answers to a request in chunks; it never ends if the last one is missing."""
    scope = {"type": "http", "method": "POST", "scheme": "http", "http_version": "1.1"}
    scope |= {"root_path": "", "path": "/v1/predict", "raw_path": b"/v1/predict"}
    scope |= {"query_string": b"degree=1", "headers": [(b"content-type", b"image/png")]}
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.get_running_loop().create_future()
        chunk = left.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

    front = Front(replicas, max_bytes, timeout_s)
    return asyncio.run(front(Request(scope, receive)))


def test_a_request_is_passed_on_whole_and_answered_as_it_was():
    replicas = Replicas(lambda: ANSWER)
    response = fronted(replicas, b"im", b"age", b"")
    assert (response.status_code, response.raw_headers, response.body) == ANSWER
    ((scope, body, held_s),) = replicas.calls
    assert body == b"image"
    assert scope["query_string"] == b"degree=1"
    assert scope["headers"] == [(b"content-type", b"image/png")]
    assert held_s >= 0


def test_another_replica_gets_the_request_and_the_lost_time_when_one_dies():
    replicas = Replicas(dies, lambda: ANSWER)
    assert fronted(replicas, b"").status_code == 200
    assert replicas.calls[1][2] > replicas.calls[0][2]


def test_a_request_may_not_kill_replica_after_replica():
    replicas = Replicas(dies, dies, lambda: ANSWER)
    response = fronted(replicas, b"")
    assert response.status_code == 503
    assert json.loads(response.body)["error"]["code"] == "unavailable"
    assert "retry-after" in response.headers
    assert len(replicas.calls) == 2


def test_a_too_large_body_is_not_kept_whole():
    replicas = Replicas(lambda: ANSWER)
    fronted(replicas, *[b"12345"] * 100, b"", max_bytes=10)
    assert len(replicas.calls[0][1]) == 15


def test_a_request_that_never_ends_is_refused():
    assert fronted(Replicas(), b"im", timeout_s=0.05).status_code == 408


def seen(*loads: float) -> Any:
    metrics = {"load": {f"replica {number}": load for number, load in enumerate(loads)}}
    return SimpleNamespace(
        aggregated_metrics=metrics if loads else {},
        target_num_replicas=3,
        capacity_adjusted_max_replicas=8,
    )


@pytest.mark.parametrize(
    ("loads", "replicas"),
    [((0.0, 0.0), 1), ((0.6, 0.6), 2), ((1.5, 1.3), 4), ((9.0,), 8), ((float("inf"),), 8), ((), 3)],
)
def test_there_are_enough_replicas_for_the_home_degree(loads, replicas):
    assert needed_replicas(seen(*loads))[0] == replicas


def test_the_config_file_of_the_docs_can_be_deployed():
    text = (ROOT / "docs" / "serving.md").read_text()
    (config,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(config)).applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    assert build is app
    assert isinstance(build(RayDeployment.model_validate(application.args)), Application)
