"""What serving needs of runs and pictures loads no training, plotting or metrics packages."""

import subprocess
import sys
from pathlib import Path

import tokendial

HEAVY = ("accelerate", "matplotlib", "torchmetrics", "tensorboard", "rich", "typer")
MODULES = (
    "tokendial.runs",
    "tokendial.runs.evaluate",
    "tokendial.runs.predict",
    "tokendial.runs.mask_images",
    "tokendial.show.tokens",
)


def test_opening_a_run_and_predicting_load_no_heavy_package():
    code = f"import sys, {', '.join(MODULES)}; print([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(tokendial.__file__).parents[1]), "PATH": ""},
        check=True,
    )
    assert done.stdout.strip() == "[]"
