"""Many runs: a recipe at every combination of some settings, and the tasks of VTAB-1k."""

from tokendial.sweeps.combinations import sweep
from tokendial.sweeps.vtab_protocol import vtab

__all__ = ["sweep", "vtab"]
