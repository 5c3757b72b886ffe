"""Speed of every reduction method at equal cost, compared with plain timm.

Each method runs at the degree whose cost is nearest to 70 % of timm's. Weights are random. The
dispatchers of DyT and DAR are centred first, so that they select their target ratio of tokens.
"""

from benchmarks.inference import run
from benchmarks.models import METHODS


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    run("methods", __doc__, arguments, methods=list(METHODS), costs=[0.7])
