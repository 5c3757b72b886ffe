"""The demo: the whole story offline, on the shipped small model; one file per task."""

from tokendial.demo.counting import run_demo
from tokendial.demo.masks import run_masks_demo

__all__ = ["run_demo", "run_masks_demo"]
