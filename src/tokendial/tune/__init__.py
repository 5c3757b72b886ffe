"""Tune a model to this machine: the fastest way to run it, and token schedules for a budget."""

from tokendial.tune.fitting import fit
from tokendial.tune.optimized import (
    DTYPES,
    OptimizedViT,
    Precision,
    SpeedSettings,
    apply_speed,
    optimize,
)
from tokendial.tune.result import FitPoint, FitResult, FittedDegree

__all__ = [
    "DTYPES",
    "FitPoint",
    "FitResult",
    "FittedDegree",
    "OptimizedViT",
    "Precision",
    "SpeedSettings",
    "apply_speed",
    "fit",
    "optimize",
]
