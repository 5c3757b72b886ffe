"""Sweeps: training a recipe at every combination of some settings, or on all tasks of VTAB-1k."""

from tokendial.sweeps.combinations import sweep
from tokendial.sweeps.vtab_protocol import vtab

__all__ = ["sweep", "vtab"]
