"""Speed: the fastest way to run a model on this machine."""

from tokendial.speed.optimized import Optimized, Speed, optimize, sped_up

__all__ = ["Optimized", "Speed", "optimize", "sped_up"]
