"""Effect on other clients of requests that are made to cost a server much.

The attacks run one after another, for some seconds each. Meanwhile an honest client repeatedly
requests the prediction of one image, and another client requests `/healthz`. The server itself
measures the longest time for which its event loop was blocked (`loop_lag_ms` of `/v1/live`). Memory
is that of all its processes. The command fails (exit code 1) if a server is lost, or an honest
request has no answer.
"""

import argparse
import http.client
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil

from benchmarks.attacks import ATTACKS, Attack
from benchmarks.options import options, parse_options
from benchmarks.plots import attack_figure
from benchmarks.report import Column, Report, Row
from benchmarks.server import Server, add_server, serve, server_options
from benchmarks.soak import sample_memory
from benchmarks.workload import Workload
from tokendial.runs import Run

TARGETS = {"loop_ms": 50.0, "honest_ms": 1000.0}
COLUMNS = (
    Column("attack", "attack"),
    Column("answers", "its answers"),
    Column("loop_ms", "event loop, longest stall (ms)", "{:.0f}"),
    Column("healthz_ms", "/healthz, slowest (ms)", "{:.0f}"),
    Column("honest", "honest answers"),
    Column("refused", "refused"),
    Column("honest_ms", "slowest (ms)", "{:.0f}"),
    Column("growth_mib", "memory (MiB)", "{:+.0f}"),
    Column("alive", "alive"),
)
_SETTLE_S = 2.0
_EVERY_S = 0.05
_TIMEOUT_S = 30.0


@dataclass
class Client:
    """Client that sends the same request again and again over one connection."""

    address: tuple[str, int]
    """Host and port of the server."""
    ask: Callable[[http.client.HTTPConnection], None]
    """Sends the request over a connection."""
    statuses: Counter[int] = field(default_factory=Counter)
    """Number of answers by HTTP status."""
    seconds: list[float] = field(default_factory=list)
    """Seconds from each request to its answer with status 200."""
    lost: int = 0
    """Number of requests without an answer."""

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Send requests while the block runs."""
        ended = threading.Event()
        thread = threading.Thread(target=self._ask, args=(ended,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _ask(self, ended: threading.Event) -> None:
        connection = http.client.HTTPConnection(*self.address, timeout=_TIMEOUT_S)
        while not ended.wait(_EVERY_S):
            began = time.monotonic()
            try:
                self.ask(connection)
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                self.lost += 1
                continue
            self.statuses[answer.status] += 1
            if answer.status == 200:
                self.seconds.append(time.monotonic() - began)
        connection.close()

    @property
    def slowest_ms(self) -> float | None:
        """Longest time of an answer in milliseconds; None if there was no answer."""
        return 1000 * max(self.seconds) if self.seconds else None


def main(arguments: list[str]) -> None:
    """Run all attacks, write the results, and fail if a server did not withstand one."""
    asked = _parse_arguments(arguments)
    workload, told = Workload(Run(asked.run), asked.images), server_options(asked)
    body = workload.body([0])
    left, rows = [each for each in ATTACKS if asked.only in each.name], list[Row]()
    if not left:
        raise ValueError(f"only: no attack is called {asked.only!r}")
    while left:  # a server that was lost is started again
        with serve([asked.run], "--slo-ms", str(asked.slo_ms), *told) as server:
            while left:
                row = measure_attack(server, left.pop(0), body, asked.seconds)
                rows.append(row)
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                if not row["alive"]:
                    break
    notes = [
        f"each for {asked.seconds:g} s; an honest client asks every {1000 * _EVERY_S:.0f} ms with "
        f"an objective of {asked.slo_ms:g} ms, and gives up after {_TIMEOUT_S:g} s",
        "clients, attackers and the server share the machine; the first row is without an attack",
    ]
    name = f"hostile_{Run(asked.run).recipe().model.name}"
    Report(name, COLUMNS, rows, attack_figure(rows, TARGETS), notes).write(asked)
    failed = [row["attack"] for row in rows if not row["alive"] or row["lost"]]
    if failed:
        sys.exit(f"hostile: the server or an honest request was lost under {'; '.join(failed)}")


def measure_attack(server: Server, attack: Attack, body: bytes, seconds: float) -> Row:
    """Measure the answers of honest clients during an attack."""
    url = urlsplit(server.url)
    address = (url.hostname or "", url.port or 80)
    kind = {"content-type": "application/json"}
    honest = Client(address, lambda to: to.request("POST", "/v1/predict", body, kind))
    prober = Client(address, lambda to: to.request("GET", "/healthz"))
    began = time.monotonic()
    with sample_memory(server.pid, every=0.1) as memory:
        time.sleep(_SETTLE_S)
        before = len(memory)
        with honest.asking(), prober.asking():
            found = attack.run(address, seconds)
            time.sleep(max(0.0, began + _SETTLE_S + seconds - time.monotonic()))
        time.sleep(_SETTLE_S)  # the server reports a stall when the second is over
    alive = psutil.pid_exists(server.pid)
    since = began + _SETTLE_S - time.monotonic()
    history = server.get("/v1/live")["history"] if alive else []
    return {
        "attack": attack.name,
        "answers": ", ".join(f"{count} x {name}" for name, count in found.most_common()) or None,
        "loop_ms": max((one["loop_lag_ms"] for one in history if one["t"] > since), default=None),
        "healthz_ms": prober.slowest_ms,
        "honest": honest.statuses[200],
        "refused": honest.statuses.total() - honest.statuses[200],
        "honest_ms": honest.slowest_ms,
        "lost": honest.lost,
        "memory_mib": max(memory[before:]),
        "growth_mib": max(memory[before:]) - min(memory[:before]),
        "alive": alive,
    }


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = options("hostile", __doc__, quick="two seconds of each attack")
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    add_server(parser)
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of each attack")
    parser.add_argument(
        "--slo-ms",
        type=float,
        default=1000.0,
        help="latency objective of the server in milliseconds",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only the attacks whose names contain TEXT"
    )
    return parse_options(parser, arguments, seconds=2.0, images=8)
