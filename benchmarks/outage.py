"""Time without answers when a server loses its model process, or reloads.

Clients of one server send an image repeatedly, with a deadline of one second. Meanwhile, one event
after another happens:

- the model process is killed (kill -9), and later stopped (SIGSTOP);
- 25 SIGHUPs arrive while the weights change;
- the fork server, which holds the models, is killed;
- the run's folder is removed; then the model process, and later all processes, are killed;
- at the end, SIGTERM arrives while the model process is stopped.

The outage is the longest time from one answer to the next. The command fails (exit code 1) if the
loss of the model process, or a reload, causes an outage of more than --most seconds, if a request
got no reply, if the served weights are not the last ones, or if the server did not end by itself.
"""

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.load import Exchange, play_closed
from benchmarks.options import options, parse_options
from benchmarks.plots import bar_figure
from benchmarks.report import Column, Report, Row
from benchmarks.server import Server, add_server, serve, server_options
from benchmarks.workload import encode_image, request_body
from tokendial.atomic import atomic_write
from tokendial.model.files import WEIGHTS
from tokendial.runs import Run

DEADLINE_MS = 1000.0
SIGHUPS = 25
BEFORE_S = 2.0
_LOOK_S = 0.02
COLUMNS = (
    Column("what", "what happens"),
    Column("outage_s", "outage (s)", "{:.2f}"),
    Column("answered", "answered"),
    Column("refused", "refused"),
    Column("unanswered", "without a reply"),
    Column("slowest_ms", "slowest reply (ms)", "{:.0f}"),
    Column("unready_s", "/readyz said 503 (s)", "{:.1f}"),
    Column("processes", "most model processes"),
)


class Processes:
    """Model processes of a server, including those whose parent has ended."""

    def __init__(self, server: Server) -> None:
        self._server, self._known = server, set[psutil.Process]()
        self._turn = threading.Lock()

    def living(self) -> list[psutil.Process]:
        """List the living processes: the fork server first, then model processes."""
        with self._turn:
            self._known |= set(psutil.Process(self._server.pid).children(recursive=True))
            self._known = {process for process in self._known if _serves_models(process)}
            return sorted(self._known, key=lambda process: process.ppid() != self._server.pid)


def _serves_models(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        living = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return living and "tokendial.serve.workers.worker" in process.cmdline()
    return False


def ready(server: Server) -> bool:
    """Whether `/readyz` answers with 200."""
    try:
        server.get("/readyz")
    except OSError:  # also raised for an answer with another status
        return False
    return True


@dataclass
class Observations:
    """Observations of a server while clients send requests."""

    unready_s: float = 0.0
    """Seconds for which `/readyz` did not answer with 200."""
    most: int = 0
    """Largest number of model processes at the same time."""
    ended: threading.Event = field(default_factory=threading.Event)
    """Set to end the observation."""

    def watch(self, server: Server, processes: Processes) -> None:
        """Observe until `ended` is set."""
        before = time.monotonic()
        while not self.ended.wait(_LOOK_S):
            well, now = ready(server), time.monotonic()
            self.unready_s += 0.0 if well else now - before
            before = now
            with suppress(psutil.Error):  # a process ended while it was examined
                self.most = max(self.most, len(processes.living()))


@contextmanager
def watch_server(server: Server, processes: Processes) -> Iterator[Observations]:
    """Observe a server while the block runs."""
    seen = Observations()
    thread = threading.Thread(target=seen.watch, args=(server, processes))
    thread.start()
    try:
        yield seen
    finally:
        seen.ended.set()
        thread.join()


def longest_outage(exchanges: Sequence[Exchange], seconds: float) -> float:
    """Longest time between two answers, or from the last one to the end."""
    times = [one.answered for one in exchanges if one.status == 200 and one.answered is not None]
    return max(
        later - sooner for sooner, later in itertools.pairwise([0.0, *sorted(times), seconds])
    )


def observe_clients(
    what: str,
    server: Server,
    processes: Processes,
    body: bytes,
    seconds: float,
    happens: Callable[[], None],
) -> Row:
    """Cause an event while clients send requests, and describe the answers in a row.

    Args:
        what: Name of the event.
        server: The server that the event happens to.
        processes: The server's model processes.
        body: Body of the requests.
        seconds: Seconds for which the clients send requests.
        happens: Causes the event.
    """
    print(what, flush=True)
    timer = threading.Timer(BEFORE_S, happens)
    with watch_server(server, processes) as seen:
        timer.start()
        exchanges = play_closed(
            server.predict, itertools.repeat(body), clients=2, timeout=30.0, seconds=seconds
        )
        timer.join()
    by_status = Counter(one.status for one in exchanges)
    return {
        "what": what,
        "outage_s": longest_outage(exchanges, seconds),
        "answered": by_status[200],
        "refused": by_status[429] + by_status[503],
        "unanswered": len(exchanges) - by_status[200] - by_status[429] - by_status[503],
        "slowest_ms": 1000 * max(one.latency for one in exchanges),
        "unready_s": seen.unready_s,
        "processes": seen.most,
    }


def change_weights(run: Run) -> None:
    """Replace the weights by another file, as training does."""
    path = run.best / WEIGHTS
    changed = {name: value + 1e-3 for name, value in load_file(path).items()}
    with atomic_write(path) as temporary:
        save_file(changed, temporary)


def send_sighups(server: Server, run: Run) -> None:
    """Send `SIGHUPS` SIGHUPs while the weights change; the last one follows the last change."""
    for number in range(SIGHUPS):
        if number % 10 == 0:
            change_weights(run)
        os.kill(server.pid, signal.SIGHUP)
        time.sleep(0.02)


def revision(server: Server) -> str:
    """Revision of the weights that are served."""
    return str(server.get("/v1/models")["models"][0]["revision"])


def main(arguments: list[str]) -> None:
    """Cause all outages, write the results, and fail if a request was lost."""
    asked = _parse_arguments(arguments)
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(shutil.copytree(asked.run, Path(folder) / "run"))
        pixels = np.random.default_rng(asked.seed).integers(0, 256, (256, 256, 3), np.uint8)
        body = request_body([encode_image(Image.fromarray(pixels))], deadline_ms=DEADLINE_MS)
        with serve([str(run.folder)], *server_options(asked)) as server:
            processes = Processes(server)
            idle = len(processes.living())

            def happens(what: str, seconds: float, work: Callable[[], None]) -> Row:
                rows.append(observe_clients(what, server, processes, body, seconds, work))
                return rows[-1]

            def computing() -> psutil.Process:
                return processes.living()[-1]

            def kill_all() -> None:
                for process in processes.living():
                    process.kill()

            play_closed(server.predict, [body] * 5, clients=1, timeout=10)
            brief = [
                happens("kill -9", asked.seconds, lambda: computing().kill()),
                happens("SIGSTOP", asked.seconds, lambda: computing().suspend()),
                happens(f"{SIGHUPS} SIGHUPs", asked.reload_s, lambda: send_sighups(server, run)),
            ]
            if revision(server) != run.revision():
                failed.append("the last weights are not those that are served")
            holding = "kill -9 of the one that holds the models"
            happens(holding, asked.reload_s, lambda: processes.living()[0].kill())
            shutil.rmtree(run.folder)
            brief.append(happens("kill -9, no folder", asked.seconds, lambda: computing().kill()))
            happens("kill -9 of all, no folder", asked.reload_s, kill_all)
            until = time.monotonic() + asked.reload_s
            while not ready(server) and time.monotonic() < until:
                time.sleep(_LOOK_S)
            computing().suspend()
            began = time.monotonic()
        ended_s = time.monotonic() - began
    failed += [
        f"{row['what']}: {row['outage_s']:.1f} s without answers, {asked.most:g} are allowed"
        for row in brief
        if row["outage_s"] > asked.most
    ]
    failed += [f"{row['what']}: no reply" for row in rows if row["unanswered"]]
    notes = [
        f"SIGTERM with the process stopped: the server ended after {ended_s:.1f} s",
        f"{idle} model processes at rest; requests have {DEADLINE_MS:g} ms to be answered",
    ]
    figure = bar_figure(
        rows, "what", {"outage_s": "outage (s)", "slowest_ms": "slowest reply (ms)"}
    )
    name = f"outage_{Run(asked.run).recipe().model.name}"
    Report(name, COLUMNS, rows, figure, notes).write(asked)
    if failed:
        sys.exit(f"outage: {'; '.join(failed)}")


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = options("outage", __doc__, quick="shorter events")
    parser.add_argument("run", metavar="RUN", help="folder of a run; a copy of it is used")
    add_server(parser)
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of each event")
    parser.add_argument(
        "--reload-s",
        type=float,
        default=60.0,
        help="seconds of each event after which models are loaded",
    )
    parser.add_argument("--most", type=float, default=2.0, help="largest allowed outage in seconds")
    return parse_options(parser, arguments, seconds=6.0, reload_s=30.0)
