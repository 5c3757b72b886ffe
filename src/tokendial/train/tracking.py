"""Experiment trackers: check that they can be used, and list the recipe's fields for them."""

import json
from collections.abc import Sequence

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from tokendial.runs.recipe import BaseRecipe
from tokendial.runs.run import dotted_fields


def check_trackers(names: Sequence[str]) -> None:
    """Check that Accelerate knows the trackers and that their packages are installed.

    Accelerate itself drops a tracker whose package is missing with no more than a log line.

    Raises:
        ValueError: If a tracker is unknown, or its package is not installed.
    """
    available = get_available_trackers()
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"train.trackers: must be some of {known}, got {name!r}.")
        if name in LoggerType and LoggerType(name) not in available:
            raise ValueError(f"train.trackers: {name} needs `pip install {name}`.")


def hyper_parameters(recipe: BaseRecipe) -> dict[str, float | int | str | bool]:
    """The fields of a recipe by dotted name. Lists, mappings and null are written as JSON."""
    fields = dotted_fields(recipe.model_dump(mode="json"))
    plain = (float, int, str)
    return {n: v if isinstance(v, plain) else json.dumps(v) for n, v in fields.items()}
