"""Tables on a real model and real data: DINOv2-S on solar cells and photographed objects.

    pip install '.[real]'
    tokendial weights fetch dinov2_small --out weights
    python tools/build_cutouts.py --out cutouts --task saliency
    python tools/build_real_pictures.py --out real_pictures
    python -m benchmarks evidence_real TABLE --jobs 2

Runs and results are written to --out; the same command continues an interrupted one. Each process
has one thread. Results go to benchmarks/results/evidence_real_TABLE_HARDWARE_DATE.json, with a
Markdown table beside it.
"""

import importlib
from collections.abc import Sequence

from benchmarks.evidence_real.common import Options

TABLES = {
    "mismatch": "accuracy of models that run at another degree than they were trained at",
    "tocom": "accuracy that a compensator recovers, which was trained without labels",
    "difference": "the gap between two degrees, carried over from one data set to another",
    "few_shot": "models of a few images per class at another degree, with a compensator",
    "all_degrees": "accuracy of models that were trained for all degrees at once",
    "cascade": "a cascade beside fixed degrees at the same time, and whether its bound holds",
    "sparse_tuning": "Sparse-Tuning and other fine-tuning: accuracy, time and memory, speed",
    "best_rates": "Sparse-Tuning and five methods, each at its best of three learning rates",
    "at_224": "fine-tuning at 224 pixels: accuracy, time and memory, speed",
    "dense": "masks of a saliency model along the dial, without training",
    "dense_trained": "masks of DAR and DAR*, and of what they are compared with",
    "diversity": "diversity of attention by layer, with and without reduction",
    "zero_training": "nearest neighbours and agreement of reduction methods without training",
    "embeddings": "embeddings along the dial, with a compensator or a trained adapter",
    "compare_reducers": "reduction methods with constant and with fitted schedules, untrained",
    "compare_reducers_masks": "the same for the masks of a saliency model",
}


def main(arguments: Sequence[str]) -> None:
    """Compute one table."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        print("\n".join(f"  {table:24}{text}" for table, text in TABLES.items()))
        return
    if name not in TABLES:
        raise ValueError(f"TABLE must be one of {', '.join(TABLES)}, got {name}.")
    table = importlib.import_module(f"benchmarks.evidence_real.{name}")
    table.main(Options.parse(name, TABLES[name], rest))
