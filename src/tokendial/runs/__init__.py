"""Runs: recipes, run folders, and the use of finished runs (evaluation, prediction, fits)."""

from tokendial.runs.recipe import CompensateRecipe, Recipe
from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run

__all__ = ["CompensateRecipe", "Recipe", "Run", "read_recipe"]
