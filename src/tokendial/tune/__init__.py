"""Tune a model to this machine: the fastest way to run it, and token schedules for a budget."""

from tokendial.tune.fitting import fit
from tokendial.tune.optimized import DTYPES, Optimized, Precision, Speed, optimize, sped_up
from tokendial.tune.result import Fitted, FittedDegree, Point

__all__ = [
    "DTYPES",
    "Fitted",
    "FittedDegree",
    "Optimized",
    "Point",
    "Precision",
    "Speed",
    "fit",
    "optimize",
    "sped_up",
]
