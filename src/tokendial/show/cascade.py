"""Plot: a cascade beside fixed degrees, by the time of an image."""

import matplotlib.figure

from tokendial.runs.cascade import CascadeReport

_CASCADE, _FIXED, _RANDOM = "#c05621", "#2b6cb0", "#a0aec0"


def cascade_figure(report: CascadeReport, *, title: str = "") -> matplotlib.figure.Figure:
    """Draw the difference of accuracy (or IoU) to the last degree against the time of an image.

    Bars are the paired intervals. The dashed line leads from the cheapest degree alone to sending
    all images on from it: sending them on at random lies on it.

    Args:
        report: The calibrated cascade.
        title: Line above the plot.
    """
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    cascade, *fixed = report.rows
    for rows, color, style, label in (
        (fixed, _FIXED, "o-", "fixed degrees"),
        ([cascade], _CASCADE, "D", f"cascade {report.degrees}"),
    ):
        values = [100 * row.minus_last.value for row in rows]
        below = [100 * (row.minus_last.value - row.minus_last.low) for row in rows]
        above = [100 * (row.minus_last.high - row.minus_last.value) for row in rows]
        times = [row.mean_ms for row in rows]
        axis.errorbar(
            *(times, values, [below, above], None, style),
            color=color,
            label=label,
            capsize=3,
            elinewidth=1,
        )
    cheap, last = fixed[0], fixed[-1]
    axis.plot(
        [cheap.mean_ms, cheap.mean_ms + last.mean_ms],
        [100 * cheap.minus_last.value, 0],
        "--",
        color=_RANDOM,
        label="sent on at random",
        zorder=0,
    )
    for row in fixed:
        axis.annotate(
            row.name.removeprefix("degree "),
            (row.mean_ms, 100 * row.minus_last.value),
            textcoords="offset points",
            xytext=(7, 6),
            fontsize=9,
        )
    axis.set_xlabel("milliseconds per image, mean (less is faster)")
    axis.set_ylabel(f"{report.measure} minus the last degree (points)")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure
