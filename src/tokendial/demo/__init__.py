"""The demo: fine-tuning the small shipped model and running it at every degree, offline."""

from tokendial.demo.counting import run_demo
from tokendial.demo.masks import run_masks_demo

__all__ = ["run_demo", "run_masks_demo"]
