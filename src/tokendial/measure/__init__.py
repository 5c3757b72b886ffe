"""Measurements: multiply-accumulates, times, and fractions of processed tokens."""

from tokendial.measure.cost import Cost, count_macs
from tokendial.measure.shares import ShareMeter, calibrate
from tokendial.measure.timing import DISTURBED_SPREAD, Timing, time_in_rounds

__all__ = [
    "DISTURBED_SPREAD",
    "Cost",
    "ShareMeter",
    "Timing",
    "calibrate",
    "count_macs",
    "time_in_rounds",
]
