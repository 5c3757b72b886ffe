"""Sweeps: a recipe trained at every combination of some settings, each run in its own folder."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run
from tokendial.sweeps.results import SweepResult
from tokendial.sweeps.side_by_side import Planned, run_all
from tokendial.sweeps.tables import shown

_LONGEST_NAME = 120


def sweep(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str],
    jobs: int | None = None,
    quiet: bool = False,
) -> SweepResult:
    """Train a recipe at every combination; what is finished is not trained again.

    Args:
        recipe: As `read_recipe` takes it. Its `output` is the sweep's folder.
        overrides: Of every run, such as `train.epochs=10`.
        over: What is swept, such as `seed=0,1,2`; values as in YAML.
        jobs: Runs side by side; see `run_all`.
        quiet: Print nothing.

    Returns:
        The runs and what went wrong with them. `results.md`, `results.tex`, `results.csv` and,
        over seeds, `means.csv` are in the folder.

    Raises:
        ValueError: If a setting or a value is wrong, or the folder holds a run; before anything
            is trained.
        InterruptedRunError: If the process was asked to stop; the same call goes on.
    """
    planned = plan(recipe, overrides, read_over(over))
    folder = shared_folder(planned[0])
    result = SweepResult(planned, run_all(planned, jobs=jobs, quiet=quiet))
    result.write(folder)
    return result


def read_over(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each field, as JSON, of texts such as `reduce.layers=[4,7],[3,6]`.

    Raises:
        ValueError: If a text is not of this form, or a field or a value is named twice.
    """
    over: dict[str, list[str]] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        if not equals or not field or not values.strip():
            raise ValueError(f"over must look like seed=0,1,2, got {text!r}.")
        if field in over or field == "output":
            raise ValueError(f"over: {field} cannot be swept{' twice' * (field != 'output')}.")
        try:
            read = [json.dumps(value) for value in yaml.safe_load(f"[{values}]")]
        except (yaml.YAMLError, TypeError):
            raise ValueError(f"over: {field}: {values!r} is not a list of YAML values.") from None
        if twice := [value for value in read if read.count(value) > 1]:
            raise ValueError(f"over: {field} is {twice[0]} twice.")
        over[field] = read
    return over


def combinations(over: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination of the values, the last field changing fastest."""
    return [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]


def run_name(settings: Mapping[str, str]) -> str:
    """Name of a folder that tells the settings, and that no others have.

    It depends on these settings alone, not on what else is swept, so that a sweep that is
    enlarged knows its runs again. Fields are sorted, the seed comes last.
    """
    fields = sorted(settings, key=lambda field: (field == "seed", field))
    told = ",".join(f"{field}={shown(settings[field])}" for field in fields)
    name = re.sub(r"[^\w.,=+-]+", "-", told, flags=re.ASCII)[:_LONGEST_NAME]
    if name == told:
        return name
    mark = hashlib.sha256(told.encode()).hexdigest()[:8]
    return f"{name.rstrip('-')}-{mark}"


def plan(
    recipe: str | Path, overrides: Sequence[str], over: Mapping[str, Sequence[str]]
) -> list[Planned]:
    """The runs of a sweep; a ValueError if a setting or a value is wrong."""
    return [
        planned_run(recipe, overrides, settings, run_name(settings))
        for settings in combinations(over)
    ]


def planned_run(
    recipe: str | Path, overrides: Sequence[str], settings: dict[str, str], name: str
) -> Planned:
    """The run of that name below the recipe's output; a ValueError if a setting is wrong."""
    own = [f"{field}={value}" for field, value in settings.items()]
    read = read_recipe(recipe, [*overrides, *own])
    return Planned(name, settings, read.model_copy(update={"output": f"{read.output}/{name}"}))


def shared_folder(planned: Planned) -> Path:
    """The recipe's output, below which a run lies; a ValueError if it is the folder of a run."""
    folder = Path(planned.recipe.output.removesuffix(planned.name))
    if Run(folder).recipe_file.exists():
        raise ValueError(f"output: {folder} holds a run; choose another output for the sweep.")
    return folder
