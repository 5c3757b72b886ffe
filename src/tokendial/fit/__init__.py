"""Schedules of token reduction that keep to a budget measured on this machine."""

from tokendial.fit.fitting import fit
from tokendial.fit.result import Fitted, FittedDegree, Point

__all__ = ["Fitted", "FittedDegree", "Point", "fit"]
