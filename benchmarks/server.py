"""Run `tokendial serve` in a process of its own, and measure how many images/s it answers."""

import argparse
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load import check_loopback, play_closed

COMMAND = (sys.executable, "-m", "tokendial.cli", "serve")
START_S, STOP_S = 900.0, 60.0
"""Seconds to wait for a server to start, which may export every degree first, and to end."""
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
_GAIN = 1.02
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Server:
    """A running server that accepts requests."""

    url: str
    """Address of the server, without a slash at the end."""
    pid: int
    """Identifier of the server's main process."""

    @property
    def predict(self) -> str:
        """Address of predictions."""
        return f"{self.url}/v1/predict"

    def get(self, path: str) -> Any:
        """Fetch the JSON body of a path."""
        with _DIRECT.open(f"{self.url}{path}", timeout=10) as answer:
            return json.load(answer)

    @property
    def slo(self) -> float:
        """Latency objective of the server, in seconds."""
        return float(self.get("/v1/live")["slo_ms"]) / 1000

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that the server offers."""
        return tuple(row["degree"] for row in self.get("/v1/degrees")["degrees"])


@contextmanager
def serve(runs: Sequence[str], *options: str) -> Iterator[Server]:
    """Run `tokendial serve` while the block runs. Afterwards the server must end by itself.

    Args:
        runs: Run folders, as `tokendial serve` takes them.
        options: Further options of `tokendial serve`.

    Raises:
        ValueError: If the server does not start, or ends with an error.
    """
    command = [*COMMAND, *runs, "--port", "0", *options]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            url = _ready(process, command, output)
            check_loopback(url)
            yield Server(url, process.pid)
            process.send_signal(signal.SIGTERM)
            if code := process.wait(STOP_S):
                raise ValueError(f"the server ended with {code}:\n{_tail(output)}")
        finally:
            process.kill()
            process.wait()


def _ready(process: "subprocess.Popen[bytes]", command: list[str], output: Path) -> str:
    """Wait until the server prints its address, and return it."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"(http://[^\s/]+)\S*[^\n]*\n", output.read_text()):
            return found[1]
        time.sleep(0.05)
    raise ValueError(f"{shlex.join(command)} did not start:\n{_tail(output)}")


def _tail(output: Path) -> str:
    return "\n".join(output.read_text().splitlines()[-20:])


def capacity(server: Server, bodies: Sequence[bytes], each: int, seconds: float) -> float:
    """The most images/s that a server answers within its objective, over numbers of clients.

    Args:
        server: A server at a fixed degree.
        bodies: Bodies of the requests, used in turn.
        each: Number of images in a request.
        seconds: Seconds to measure each number of clients.

    Raises:
        ValueError: If no request is answered within the objective.
    """
    best, slo = 0.0, server.slo
    for clients in CLIENTS:
        exchanges = play_closed(
            server.predict, itertools.cycle(bodies), clients=clients, timeout=10, seconds=seconds
        )
        good = sum(exchange.within(slo) for exchange in exchanges)
        rate = each * good / max(exchange.answered or seconds for exchange in exchanges)
        best, before = max(best, rate), best
        if rate < _GAIN * before:
            break
    if not best:
        raise ValueError(
            f"{server.url} answers no request within its objective of {1000 * slo:.0f} ms"
        )
    return best


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add arguments: how a model is served, and which images are sent to it."""
    parser.add_argument(
        "--server-threads",
        type=int,
        default=max(1, _cores() - 1),
        metavar="N",
        help="threads of the server's model (default: all cores but one, which the load needs)",
    )
    parser.add_argument(
        "--serve",
        default="",
        metavar="OPTIONS",
        help="more options of `tokendial serve`, in quotes; the same for every server",
    )
    parser.add_argument("--images", type=int, default=1000, help="validation images to send")
    parser.add_argument("--seed", type=int, default=0, help="seed of random numbers")


def add_load(parser: argparse.ArgumentParser) -> None:
    """Add arguments: the run, and how requests are sent at the times of a trace."""
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--images-per-request", type=int, default=8, metavar="N")
    parser.add_argument(
        "--in-flight", type=int, default=200, help="maximum requests without an answer"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        help="seconds to wait for an answer, beyond the objective",
    )
    parser.add_argument(
        "--probe", type=float, default=3.0, help="seconds of each measurement of the capacity"
    )


def server_options(asked: argparse.Namespace) -> list[str]:
    """Options of `tokendial serve` that every server of a command gets."""
    return ["--threads", str(asked.server_threads), *shlex.split(asked.serve)]


def at_degree(degree: int, told: Sequence[str]) -> list[str]:
    """The options of a server that answers everything at one degree, so without a cascade."""
    return [*(word for word in told if word != "--cascade"), "--degree", str(degree)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
