"""Runs: recipes, run folders, and what is done with a finished run."""

from tokendial.runs.recipe import CompensateRecipe, Recipe
from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run

__all__ = ["CompensateRecipe", "Recipe", "Run", "read_recipe"]
