"""Measuring: cost by counting, shares of tokens."""

from tokendial.measure.cost import Cost, count_macs
from tokendial.measure.shares import ShareMeter, calibrate

__all__ = ["Cost", "ShareMeter", "calibrate", "count_macs"]
