"""Speed of every reduction method over plain timm at equal cost.

Each method is turned to the degree whose cost is nearest to 70 % of timm's. Weights are random; the
dispatchers of DyT and DAR are centred first, so that they select the share of tokens that they
would be trained to.
"""

from benchmarks.inference import run
from benchmarks.models import METHODS


def main(arguments: list[str]) -> None:
    """Measure and write the results."""
    run("methods", __doc__, arguments, methods=list(METHODS), costs=[0.7])
