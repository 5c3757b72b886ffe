"""Speed: the fastest way to run a model on this machine."""

from tokendial.speed.optimized import DTYPES, Optimized, Precision, Speed, optimize, sped_up

__all__ = ["DTYPES", "Optimized", "Precision", "Speed", "optimize", "sped_up"]
