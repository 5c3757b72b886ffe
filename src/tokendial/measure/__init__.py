"""Measuring: cost by counting."""

from tokendial.measure.cost import Cost, count_macs

__all__ = ["Cost", "count_macs"]
