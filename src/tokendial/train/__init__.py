"""Training: recipes, the loop, checkpoints, evaluation."""

from tokendial.train.loop import InterruptedRunError, train
from tokendial.train.recipe import Recipe, read_recipe
from tokendial.train.runs import Run

__all__ = ["InterruptedRunError", "Recipe", "Run", "read_recipe", "train"]
