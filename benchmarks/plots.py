"""Plots of the results of load tests."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report import Row


def cost_figure(rows: Sequence[Row], facets: Sequence[str]) -> Figure:
    """Measured speed-up over the reduction of multiply-accumulates; one plot for each setting.

    Args:
        rows: Rows with `method`, `ratio`, `ratio_low`, `ratio_high` and `mac_ratio`.
        facets: Keys of the rows, a plot for each combination of their values.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(", ".join(f"{row[key]}" for key in facets), []).append(row)
    across = min(3, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(1 + 4 * across, 0.6 + 3.6 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(groups) :]:
        axis.remove()
    for axis, (title, group) in zip(axes, groups.items(), strict=False):
        for method in dict.fromkeys(row["method"] for row in group):
            points = [row for row in group if row["method"] == method]
            ys = [row["ratio"] for row in points]
            below = [row["ratio"] - row["ratio_low"] for row in points]
            above = [row["ratio_high"] - row["ratio"] for row in points]
            xs = [row["mac_ratio"] for row in points]
            axis.errorbar(xs, ys, [below, above], fmt="o", markersize=4, capsize=2, label=method)
        most = max(row["mac_ratio"] for row in group)
        axis.plot([1, most], [1, most], color="grey", linewidth=0.8, label="as the cost")
        axis.set(title=title, xlabel="multiply-accumulates saved (x)", ylabel="speed (x)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def bar_figure(rows: Sequence[Row], label: str, measures: dict[str, str]) -> Figure:
    """Horizontal bars, one row below the other.

    Args:
        rows: Rows, drawn from top to bottom.
        label: Key of the name of a row.
        measures: Key and title of each plot, side by side.
    """
    figure = Figure(figsize=(2 + 3.4 * len(measures), 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    names = [str(row[label]) for row in rows]
    for axis, (key, title) in zip(axes, measures.items(), strict=True):
        axis.barh(names, [row[key] for row in rows], color="#2b6cb0")
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    return figure


def growth_figure(rows: Sequence[Row], measures: dict[str, str], along: str) -> Figure:
    """Lines over `along`, on logarithmic axes; one plot for each method.

    Args:
        rows: Rows with `method`, the key `along`, and the measures.
        measures: Key and name of each line.
        along: Key of the horizontal axis.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(1 + 2.8 * len(methods), 3.4), layout="constrained")
    axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axis, method in zip(axes, methods, strict=True):
        own = [row for row in rows if row["method"] == method]
        for key, name in measures.items():
            axis.loglog(
                [row[along] for row in own],
                [row[key] for row in own],
                "o-",
                markersize=4,
                label=name,
            )
        axis.set(title=method, xlabel=along)
        axis.set_xticks([row[along] for row in own], [str(row[along]) for row in own])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("growth (x)")
    axes[0].legend(fontsize=7)
    return figure


def policy_figure(rows: Sequence[Row], slo_ms: float) -> Figure:
    """Load, degree and latency second by second, and the goodput of each policy.

    Args:
        rows: Rows with `policy`, `goodput`, `accuracy` and `by_second`.
        slo_ms: Latency objective in milliseconds.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(3, 1))
    load, degree, latency = (figure.add_subplot(grid[place, 0]) for place in range(3))
    asked = [second["asked"] for second in rows[0]["by_second"]]
    load.step(range(len(asked)), asked, color="grey", where="post", label="asked for")
    for row in rows:
        seconds = row["by_second"]
        for axis, key in ((load, "good"), (degree, "degree"), (latency, "p99_ms")):
            values = [np.nan if second[key] is None else second[key] for second in seconds]
            axis.step(range(len(values)), values, where="post", label=row["policy"])
    latency.axhline(slo_ms, color="grey", linestyle="--", label="objective")
    load.set_ylabel("images/s in time")
    degree.set_ylabel("mean degree of answers")
    latency.set(ylabel="p99 (ms)", xlabel="seconds", yscale="log")
    for axis in (load, degree, latency):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for place, (key, title) in enumerate(
        (("goodput", "goodput (images/s)"), ("accuracy", "accuracy"))
    ):
        axis = figure.add_subplot(grid[place, 1])
        axis.bar(
            [row["policy"] for row in rows], [row[key] or 0.0 for row in rows], color="#2b6cb0"
        )
        axis.set_ylabel(title)
        axis.tick_params(axis="x", labelrotation=20)
        axis.grid(axis="y", alpha=0.3)
    return figure


def soak_figure(row: Row, slo_ms: float) -> Figure:
    """Memory, degree and latency of a server over time.

    Args:
        row: A row with `memory` and `by_second`.
        slo_ms: Latency objective in milliseconds.
    """
    figure = Figure(figsize=(10, 8), layout="constrained")
    memory, degree, latency = figure.subplots(3, 1)
    memory.plot(row["memory"])
    memory.set_ylabel("memory of the server (MiB)")
    for axis, key, title in ((degree, "degree", "mean degree"), (latency, "p99_ms", "p99 (ms)")):
        axis.plot([np.nan if one[key] is None else one[key] for one in row["by_second"]])
        axis.set_ylabel(title)
    latency.axhline(slo_ms, color="grey", linestyle="--")
    latency.set_xlabel("seconds")
    for axis in (memory, degree, latency):
        axis.grid(alpha=0.3)
    return figure


def attack_figure(rows: Sequence[Row], targets: Mapping[str, float]) -> Figure:
    """Delays of honest clients during each attack on a server.

    Args:
        rows: Rows with `attack`, and a number for each of the targets.
        targets: Largest allowed value, by key of the rows.
    """
    figure = Figure(figsize=(11, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(targets), sharey=True)
    names = [row["attack"] for row in rows]
    for axis, (key, most) in zip(axes, targets.items(), strict=True):
        axis.barh(names, [row[key] or 0 for row in rows])
        axis.axvline(most, color="grey", linestyle="--")
        axis.set_xlabel(key)
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    return figure
