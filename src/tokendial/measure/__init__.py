"""Measurements: multiply-accumulates, times, processed tokens, neighbours, intervals."""

from tokendial.measure.cost import Cost, count_macs
from tokendial.measure.intervals import (
    Interval,
    Resampling,
    bootstrap_interval,
    mean_difference,
    percentile_interval,
)
from tokendial.measure.neighbours import (
    nearest_neighbours,
    neighbour_overlap,
    predict_classes,
    predict_left_out,
)
from tokendial.measure.shares import ShareMeter, calibrate
from tokendial.measure.timing import DISTURBED_SPREAD, Timing, time_in_rounds

__all__ = [
    "DISTURBED_SPREAD",
    "Cost",
    "Interval",
    "Resampling",
    "ShareMeter",
    "Timing",
    "bootstrap_interval",
    "calibrate",
    "count_macs",
    "mean_difference",
    "nearest_neighbours",
    "neighbour_overlap",
    "percentile_interval",
    "predict_classes",
    "predict_left_out",
    "time_in_rounds",
]
