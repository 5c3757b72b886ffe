"""Tune a model to this machine: the fastest way to run it, and schedules for a budget."""

from tokendial.tune.agreement import AgreeBy
from tokendial.tune.fit_result import FitPoint, FitResult, FittedDegree
from tokendial.tune.fit_schedules import fit
from tokendial.tune.optimized_vit import (
    DTYPES,
    OptimizedViT,
    Precision,
    optimize,
)

__all__ = [
    "DTYPES",
    "AgreeBy",
    "FitPoint",
    "FitResult",
    "FittedDegree",
    "OptimizedViT",
    "Precision",
    "fit",
    "optimize",
]
