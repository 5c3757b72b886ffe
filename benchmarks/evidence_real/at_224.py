"""Table: fine-tuning on ELPV at 224 pixels, by recipes of recipes/real/elpv."""

from benchmarks.evidence_real.common import Options
from benchmarks.evidence_real.sparse_tuning import write

METHODS = ("sparse_tuning", "lora")


def main(options: Options) -> None:
    """Train, predict, time, and write the table."""
    write("at_224", 224, METHODS, options)
