"""Cascades: a cheap degree answers for most images, a better one for those it is unsure of."""

from tokendial.cascade.answers import SCORES, ScoreName
from tokendial.cascade.bound import largest_share, smallest_sample, smallest_share
from tokendial.cascade.cascade import Cascade, CascadeAnswer
from tokendial.cascade.stages import CascadeStages
from tokendial.cascade.thresholds import CascadeCalibration, Observations, choose_thresholds

__all__ = [
    "SCORES",
    "Cascade",
    "CascadeAnswer",
    "CascadeCalibration",
    "CascadeStages",
    "Observations",
    "ScoreName",
    "choose_thresholds",
    "largest_share",
    "smallest_sample",
    "smallest_share",
]
