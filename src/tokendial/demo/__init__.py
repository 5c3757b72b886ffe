"""The demos: fine-tuning a model and running it at every degree of its dial.

Two demos use the small shipped model and need no network; the third one uses a real model.
"""

from tokendial.demo.cells import run_cells_demo
from tokendial.demo.counting import run_demo
from tokendial.demo.masks import run_masks_demo

__all__ = ["run_cells_demo", "run_demo", "run_masks_demo"]
