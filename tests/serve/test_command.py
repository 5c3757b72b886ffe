"""`tokendial serve` as a process meets it: mistakes, signals, the last answers."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from processes import ended, model_processes, start, wait_until
from safetensors.torch import load, save
from serving import file, form, picture

from tokendial.model.files import WEIGHTS
from tokendial.runs import Run
from tokendial.serve.http.server import bind_socket, is_unprotected, server_url
from tokendial.serve.settings import check_settings, read_api_keys

CLIENTS = 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN/nowhere"], "is not the folder of a run: recipe.yaml is missing"),
        (["a=RUN", "a=RUN"], "runs: a is given twice; use NAME=FOLDER."),
        (["=RUN"], "runs: a name has 1 to 100 letters"),
        (["RUN", "--slo-ms", "0"], "slo_ms: Input should be greater than 0, got 0.0."),
        (["RUN", "--port", "70000"], "port: Input should be less than or equal to 65535"),
        (["RUN", "--max-pixels", "0"], "max_pixels: Input should be greater than or equal to 1"),
        (["RUN", "--degree", "99"], "degree must be one of 0, 1, "),
        (["RUN", "--max-degree", "99"], "max_degree must"),
        (["RUN", "--min-accuracy", "0.5"], "min_accuracy needs the accuracy of "),
        (["RUN", "--min-accuracy", "50"], "min_accuracy: Input should be less than or equal to 1"),
        (["RUN", "--port", "TAKEN"], "Address already in use"),
        (["RUN", "--host", "no.such.host.invalid"], "Name or service not known"),
        (["RUN", "--api-keys", "KEYS"], "holds no key."),
    ],
)
def test_a_mistake_is_one_line_and_code_2(cli, pets, tmp_path, arguments, message):
    (tmp_path / "keys").write_text("\n \n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = {"RUN": str(pets.folder), "KEYS": str(tmp_path / "keys")}
        known["TAKEN"] = str(taken.getsockname()[1])
        words = [re.sub("RUN|KEYS|TAKEN", lambda found: known[found[0]], a) for a in arguments]
        port = [] if "--port" in words else ["--port", "0"]
        code, _, err = cli("serve", *words, *port)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert message in err


def test_a_key_file_that_every_user_can_read_gives_a_warning(cli, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("key")
    keys.chmod(0o644)
    code, _, err = cli("serve", tmp_path / "nowhere", "--port", "0", "--api-keys", keys)
    assert code == 2
    assert f"every user of this machine can read {keys}" in err.replace("\n", " ")


def test_a_missing_package_names_the_extra(cli, pets, monkeypatch):
    there = "tokendial.cli.serving.find_spec"
    monkeypatch.setattr(there, lambda name: None if name == "uvicorn" else name)
    code, _, err = cli("serve", pets.folder)
    assert code == 2
    assert err == (
        "error: serving needs uvicorn, which is not installed: pip install 'tokendial[serve]'.\n"
    )


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    (tmp_path / "keys").write_text("one\n\n  two \n")
    assert read_api_keys(tmp_path / "keys", {}) == ("one", "two")
    assert read_api_keys(tmp_path / "keys", {"TOKENDIAL_API_KEYS": "two, three"}) == (
        "one",
        "two",
        "three",
    )
    assert read_api_keys(None, {}) == ()
    with pytest.raises(ValueError, match="TOKENDIAL_API_KEYS holds no key"):
        read_api_keys(None, {"TOKENDIAL_API_KEYS": ","})
    with pytest.raises(ValueError, match="key 2 of .* must be printable ASCII") as caught:
        read_api_keys(None, {"TOKENDIAL_API_KEYS": "one,s\xe9cret"})
    assert "cret" not in str(caught.value)
    assert "s3cret" not in repr(check_settings({"api_keys": ("s3cret",)}))


def test_an_unknown_setting_is_an_error():
    with pytest.raises(ValueError, match="slo is not a setting; known are .*slo_ms"):
        check_settings({"slo": 100})


@pytest.mark.parametrize(
    ("host", "keys", "expected"),
    [
        ("127.0.0.1", (), False),
        ("localhost", (), False),
        ("0.0.0.0", (), True),
        ("0.0.0.0", ("key",), False),
    ],
)
def test_a_server_is_unprotected_if_others_reach_it_without_a_key(host, keys, expected):
    settings = check_settings({"host": host, "port": 0, "api_keys": keys})
    with bind_socket(settings) as listener:
        assert is_unprotected(listener, settings) == expected
        assert re.fullmatch(r"http://[0-9.]+:[0-9]+", server_url(listener))


def ask(port: int, *images: bytes) -> tuple[int, str]:
    """The status and the revision of the model, which is empty where there is no answer."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body, kind = form(*images)
    client.request("POST", "/v1/predict", body, {"content-type": kind})
    reply = client.getresponse()
    text = reply.read().decode()
    client.close()
    return reply.status, text.partition('"revision":"')[2].partition('"')[0]


def predict(port: int, image: bytes, **options: object) -> tuple[int, Any]:
    """Ask for a prediction of one image; return the status and the body."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    asked = "&".join(f"{name}={value}" for name, value in options.items())
    client.request("POST", f"/v1/predict?{asked}", image, {"content-type": "image/png"})
    reply = client.getresponse()
    found = reply.status, json.loads(reply.read())
    client.close()
    return found


@pytest.fixture
def server(pets, tmp_path):
    """A process that serves a copy of a run, and its port."""
    shutil.copytree(pets.folder, tmp_path / "pets")
    (tmp_path / "stdout").touch()
    process = start(tmp_path, "serve", tmp_path / "pets", "--port", "0", "--slo-ms", "60000")
    try:
        wait_until(lambda: "serving" in (tmp_path / "stdout").read_text(), process)
        (port,) = re.findall(
            r"serving pets on http://127.0.0.1:(\d+)\n", (tmp_path / "stdout").read_text()
        )
        yield process, int(port)
    finally:
        process.kill()


def test_changed_runs_are_reloaded_and_accepted_requests_answered_at_the_end(server, tmp_path):
    (process, port), image = server, file(picture())
    out, err, weights = tmp_path / "stdout", tmp_path / "stderr", tmp_path / "pets/best" / WEIGHTS
    old = ask(port, image)[1]
    good = weights.read_bytes()
    weights.write_bytes(b"broken")
    os.kill(process.pid, signal.SIGHUP)
    wait_until(lambda: "the runs could not be reloaded" in err.read_text(), process)
    assert ask(port, image) == (200, old)
    seen: set[int] = set()
    for number in range(25):  # the last signal comes after the last change
        if number in (0, 12):
            changed = {name: value + 0.1 + number for name, value in load(good).items()}
            (tmp_path / "new").write_bytes(save(changed))
            (tmp_path / "new").replace(weights)
        os.kill(process.pid, signal.SIGHUP)
        time.sleep(0.02)
    last = Run(tmp_path / "pets").revision()
    wait_until(
        lambda: seen.add(len(model_processes(process.pid))) or ask(port, image)[1] == last, process
    )
    assert last != old
    # Those that serve and those that are loaded; a process that was forked lives on for a moment.
    assert max(seen) <= 5
    assert out.read_text().count("reloaded: ") < 25 / 2  # signals during one reading are one more

    wait_until(lambda: len(model_processes(process.pid)) == 2, process)
    model_processes(process.pid)[-1].suspend()
    status, body = predict(port, image, deadline_ms=500)
    assert (status, body["error"]["code"]) == (503, "late")
    wait_until(lambda: ask(port, image)[0] == 200, process)

    stopped, before, after = threading.Event(), [], []

    def client() -> None:
        while not stopped.is_set():
            before.append(ask(port, image, image)[0])
        with suppress(OSError, http.client.HTTPException):
            after.append(ask(port, image)[0])

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        wait_until(lambda: len(before) > 3 * CLIENTS, process)
        stopped.set()
        os.kill(process.pid, signal.SIGTERM)
        for each in clients:
            each.result()
    assert ended(process) == 0
    # Each client may have met the end with one request; none was left without an answer.
    assert set(before) <= {200, 503}
    assert before.count(503) <= CLIENTS
    assert set(after) <= {200, 503}
    assert "Traceback" not in err.read_text()
