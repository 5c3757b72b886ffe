"""Training: recipes, the loop, checkpoints, evaluation."""

from tokendial.train.compensate import compensate
from tokendial.train.finetune import train
from tokendial.train.loop import InterruptedRunError
from tokendial.train.recipe import CompensateRecipe, Recipe
from tokendial.train.recipe_file import read_recipe
from tokendial.train.runs import Run

__all__ = [
    "CompensateRecipe",
    "InterruptedRunError",
    "Recipe",
    "Run",
    "compensate",
    "read_recipe",
    "train",
]
