"""The same load on servers at fixed degrees, and on one that turns the dial by itself.

The capacity of degree 0 comes first: the images/s that a server answers within its objective to as
many clients as give the most. Then a trace of load is played to fresh servers that differ in the
dial alone: by default ten seconds at 0.3 of that capacity, a minute at three times as much, and
twenty seconds at 0.3 again. A run that `tokendial cascade` was run on also gets a server with
--cascade. Numbers are those of the part in the middle. Requests carry labelled images of the run's
validation set; they go out at the times of the trace, whatever the server does, and latency counts
from these times.
"""

import argparse

from benchmarks import arrivals
from benchmarks.load import play, play_closed
from benchmarks.options import comma_separated, options, parse_options
from benchmarks.played import Load, LoadOutcome, parse_outcome
from benchmarks.plots import policy_figure
from benchmarks.report import Column, Report, Row
from benchmarks.server import add_load, add_server, at_degree, capacity, serve, server_options
from benchmarks.workload import Workload
from tokendial.runs import Run

TRACES = ("step", "poisson", "bursts", "diurnal")
COLUMNS = (
    Column("policy", "policy"),
    Column("requests", "requests"),
    Column("answered", "answered"),
    Column("refused", "refused"),
    Column("errors", "errors"),
    Column("goodput", "goodput (images/s)", "{:.0f}"),
    Column("ratio", "of degree 0", "{:.2f} x"),
    Column("within", "within the objective", "{:.2%}"),
    Column("p50_ms", "p50 (ms)", "{:.0f}"),
    Column("p99_ms", "p99 (ms)", "{:.0f}"),
    Column("accuracy", "accuracy", "{:.2%}"),
    Column("degree", "mean degree", "{:.2f}"),
    Column("twice", "answered twice", "{:.1%}"),
    Column("back_s", "back at 0 (s)", "{:.1f}"),
)


def load_of(asked: argparse.Namespace, rate: float) -> Load:
    """The trace that the options describe.

    Args:
        asked: The parsed options.
        rate: Requests/s at the capacity of degree 0.
    """
    before, during, after = asked.seconds
    seconds, seed = before + during + after, asked.seed
    low, high = asked.low * rate, asked.load * rate
    if asked.trace == "step":
        start, end = before, before + during
        times = arrivals.step(low=low, high=high, seconds=seconds, at=start, until=end, seed=seed)
        return Load(times, seconds, start, end)
    if asked.trace == "poisson":
        times = arrivals.poisson(rate=high, seconds=seconds, seed=seed)
    elif asked.trace == "bursts":
        times = arrivals.bursts(
            low=low, high=high, seconds=seconds, lasting=seconds / 45, apart=seconds / 9, seed=seed
        )
    elif asked.trace == "diurnal":
        times = arrivals.diurnal(low=low, high=high, seconds=seconds, period=seconds, seed=seed)
    else:
        times = arrivals.read_trace(asked.trace)
        seconds = float(times[-1]) + 1
    return Load(times, seconds, 0.0, seconds)


def dials(
    degrees: tuple[int, ...], *, cascade: bool = False, runtime: str | None = None
) -> dict[str, list[str]]:
    """Return the options of `tokendial serve` for each policy.

    Args:
        degrees: Degrees that the server offers.
        cascade: Whether the run has a cascade.
        runtime: A runtime to compare with.
    """
    fixed = (degrees[0], degrees[len(degrees) // 2], degrees[-1])
    policies = {f"degree {degree}": ["--degree", str(degree)] for degree in fixed}
    policies["controller"] = []
    if cascade:
        policies["cascade"] = ["--cascade"]
    if runtime:
        policies[f"controller, {runtime}"] = ["--runtime", runtime]
    return policies


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    asked = _parse_arguments(arguments)
    run, each, told = Run(asked.run), asked.images_per_request, server_options(asked)
    workload = Workload(run, asked.images)
    groups = workload.groups(each)
    bodies = [workload.body(group, top=workload.top) for group in groups]
    with serve([asked.run], *at_degree(0, told)) as server:
        slo, degrees = server.slo, server.degrees
        found = capacity(server, bodies, each, asked.probe)
    print(f"degree 0 answers {found:.0f} images/s", flush=True)
    load = load_of(asked, found / each)
    results: dict[str, LoadOutcome] = {}
    policies = dials(degrees, cascade=run.cascade_file.is_file(), runtime=asked.runtime)
    for policy, dial in policies.items():
        print(f"{policy}: {len(load.times)} requests in {load.seconds:.0f} s", flush=True)
        with serve([asked.run], *told, *dial) as server:
            play_closed(
                server.predict, bodies[:3], clients=1, timeout=10
            )  # its first ones are slow
            exchanges = play(
                server.predict,
                load.times,
                bodies,
                in_flight=asked.in_flight,
                timeout=slo + asked.timeout,
            )
        results[policy] = parse_outcome(load, exchanges, each, slo)
    rows: list[Row] = [
        {"policy": policy, "accuracy": one.score(workload, groups)} | one.row()
        for policy, one in results.items()
    ]
    for row in rows:
        row["ratio"] = row["goodput"] / rows[0]["goodput"] if rows[0]["goodput"] else None
    notes = [
        f"degree 0 answers {found:.0f} images/s within {1000 * slo:.0f} ms (the objective); the "
        f"load is {asked.low:g} and {asked.load:g} times as much",
        f"{each} images in a request; the model has {asked.server_threads} of the threads, and the "
        "load comes from another process of the same machine",
        f"99 % of the requests left {max(one.late() for one in results.values()):.1f} ms after "
        "their planned time, or earlier",
    ]
    trace = asked.trace if asked.trace in TRACES else "recorded"
    name = f"serving_{run.recipe().model.name}_{trace}"
    Report(name, COLUMNS, rows, policy_figure(rows, 1000 * slo), notes).write(asked)


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = options("serving", __doc__, quick="a short trace")
    add_load(parser)
    add_server(parser)
    parser.add_argument(
        "--trace",
        default="step",
        help=f"{', '.join(TRACES)}, or a file with the time of a request in each line, in seconds",
    )
    parser.add_argument(
        "--low", type=float, default=0.3, help="rate around the step, in capacities"
    )
    parser.add_argument(
        "--runtime", help="also play the load to a server with this --runtime, such as auto"
    )
    parser.add_argument("--load", type=float, default=3.0, help="rate in the step, in capacities")
    parser.add_argument(
        "--seconds",
        type=comma_separated(float),
        default=[10.0, 60.0, 20.0],
        help="before, in and after the step; other traces are as long as the three together",
    )
    return parse_options(parser, arguments, seconds=[2.0, 8.0, 4.0], probe=1.0, images=200)
