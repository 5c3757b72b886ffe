"""Schedules of token reduction that keep to a budget measured on this machine."""

from tokendial.schedules.fitting import fit
from tokendial.schedules.result import Fitted, FittedDegree, Point

__all__ = ["Fitted", "FittedDegree", "Point", "fit"]
