"""Load for minutes that is higher than a server can answer at degree 0: errors and memory growth.

The server sets the degree by the load. The command fails (exit code 1) if a request got no answer,
or an answer with another status than 200, 429 and 503; or if the server's memory grew by more than
--growth after its first minute.
"""

import argparse
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import psutil

from benchmarks import arrivals
from benchmarks.load import Exchange, play, play_closed
from benchmarks.options import options, parse_options
from benchmarks.played import REFUSED, Load, parse_outcome
from benchmarks.plots import soak_figure
from benchmarks.report import Column, Report
from benchmarks.server import add_load, add_server, at_degree, capacity, serve, server_options
from benchmarks.workload import Workload
from tokendial.runs import Run

SETTLE_S = 60.0
COLUMNS = (
    Column("minutes", "minutes", "{:g}"),
    Column("requests", "requests"),
    Column("answered", "answered"),
    Column("refused", "refused"),
    Column("errors", "errors"),
    Column("within", "within the objective", "{:.2%}"),
    Column("slowest_ms", "slowest (ms)", "{:.0f}"),
    Column("memory_mib", "memory at the end (MiB)", "{:.0f}"),
    Column("growth", "growth", "{:+.2%}"),
)


@contextmanager
def sample_memory(pid: int, every: float = 1.0) -> Iterator[list[float]]:
    """Sample the resident memory of a process and its children in MiB while the block runs."""
    process, ended = psutil.Process(pid), threading.Event()
    found: list[float] = []

    def measure() -> None:
        with suppress(psutil.NoSuchProcess):  # a server that is gone shows in its answers
            while not ended.wait(every):
                all_of_it = [process, *process.children(recursive=True)]
                found.append(sum(each.memory_info().rss for each in all_of_it) / 2**20)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def memory_growth(memory: Sequence[float], settle: int) -> float:
    """Relative growth of memory: the median of the last tenth of the samples over the first tenth.

    Args:
        memory: Samples at equal intervals.
        settle: Number of samples at the start to leave out.
    """
    counts = memory[settle:]
    tenth = -(-len(counts) // 10)
    return float(np.median(counts[-tenth:]) / np.median(counts[:tenth]) - 1)


def unexpected_answers(exchanges: Sequence[Exchange]) -> Counter[str]:
    """Count the errors and the unexpected statuses, by their texts."""
    return Counter(
        one.error or f"status {one.status}"
        for one in exchanges
        if one.status != 200 and one.status not in REFUSED
    )


def main(arguments: list[str]) -> None:
    """Run the soak test, write the results, and fail if a request was lost."""
    asked = _parse_arguments(arguments)
    each, told, seconds = asked.images_per_request, server_options(asked), 60 * asked.minutes
    workload = Workload(Run(asked.run), asked.images)
    bodies = [workload.body(group, top=workload.top) for group in workload.groups(each)]
    with serve([asked.run], *at_degree(0, told)) as server:
        slo = server.slo
        found = capacity(server, bodies, each, asked.probe)
    times = arrivals.poisson(rate=asked.load * found / each, seconds=seconds, seed=asked.seed)
    print(f"degree 0 answers {found:.0f} images/s; {len(times)} requests will be sent", flush=True)
    with serve([asked.run], *told) as server:
        play_closed(server.predict, bodies[:3], clients=1, timeout=10)
        with sample_memory(server.pid) as memory:
            exchanges = play(
                server.predict,
                times,
                bodies,
                in_flight=asked.in_flight,
                timeout=slo + asked.timeout,
            )
    result = parse_outcome(Load(times, seconds, 0.0, seconds), exchanges, each, slo)
    errors = unexpected_answers(exchanges)
    row = result.row() | {
        "minutes": asked.minutes,
        "slowest_ms": 1000 * max(one.latency for one in exchanges if one.status),
        "memory_mib": memory[-1],
        "growth": memory_growth(memory, round(min(SETTLE_S, seconds / 5))),
        "memory": memory,
        "what": dict(errors),
    }
    notes = [f"degree 0 answers {found:.0f} images/s; {asked.load:g} times as much was requested"]
    name = f"soak_{Run(asked.run).recipe().model.name}"
    Report(name, COLUMNS, [row], soak_figure(row, 1000 * slo), notes).write(asked)
    failed = [f"{count} x {error}" for error, count in errors.items()]
    if row["growth"] > asked.growth:
        failed.append(f"memory grew by {row['growth']:.1%}, {asked.growth:.0%} are allowed")
    if failed:
        sys.exit(f"soak: {'; '.join(failed)}")


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = options("soak", __doc__, quick="a quarter of a minute")
    add_load(parser)
    add_server(parser)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--load",
        type=float,
        default=2.0,
        help="rate of requests, as a multiple of the capacity of degree 0",
    )
    parser.add_argument(
        "--growth", type=float, default=0.03, help="largest allowed growth of memory, as a fraction"
    )
    return parse_options(parser, arguments, minutes=0.25, probe=1.0, images=200)
