"""What the trackers of Accelerate are given."""

import json
from collections.abc import Sequence

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from tokendial.runs.recipe import BaseRecipe
from tokendial.runs.run import flat


def check_trackers(names: Sequence[str]) -> None:
    """See that those of Accelerate's own trackers can be used; it would leave them out.

    Raises:
        ValueError: If the package of one is not installed.
    """
    there = get_available_trackers()
    missing = [name for name in names if name in LoggerType and LoggerType(name) not in there]
    if missing:
        raise ValueError(f"train.trackers: {missing[0]} needs `pip install {missing[0]}`.")


def hyper_parameters(recipe: BaseRecipe) -> dict[str, float | int | str | bool]:
    """The recipe with dotted names; what is neither number nor text is written as JSON."""
    fields = flat(recipe.model_dump(mode="json"))
    plain = (float, int, str)
    return {n: v if isinstance(v, plain) else json.dumps(v) for n, v in fields.items()}
