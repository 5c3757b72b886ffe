"""Sweeps: training a recipe at every combination of some settings, one run folder for each."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tokendial.runs.recipe_file import read_recipe
from tokendial.runs.run import Run
from tokendial.sweeps.parallel_runs import PlannedRun, run_all
from tokendial.sweeps.results import SweepResult
from tokendial.sweeps.tables import plain_text

_MAX_NAME_LENGTH = 120


def sweep(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str],
    jobs: int | None = None,
    quiet: bool = False,
) -> SweepResult:
    """Train a recipe at every combination of some settings. Finished runs are not trained again.

    Args:
        recipe: A recipe file or name, as for `read_recipe`. Its `output` is the sweep's folder.
        overrides: Overrides for every run, such as `train.epochs=10`.
        over: The fields to sweep with their values, such as `seed=0,1,2`; values as in YAML.
        jobs: Number of runs to train at the same time; see `run_all`.
        quiet: Whether to print nothing.

    Returns:
        The runs and their errors. The folder gets `results.md`, `results.tex`, `results.csv` and,
        if seeds are swept, `means.csv`.

    Raises:
        ValueError: If a field or a value is wrong, or the folder itself holds a run. It is raised
            before anything is trained.
        InterruptedRunError: If a signal asked the process to stop. The same call continues.
    """
    runs = plan_runs(recipe, overrides, read_over(over))
    folder = sweep_folder(runs[0])
    result = SweepResult(runs, run_all(runs, jobs=jobs, quiet=quiet))
    result.write(folder)
    return result


def read_over(texts: Sequence[str]) -> dict[str, list[str]]:
    """Parse texts such as `reduce.layers=[4,7],[3,6]` to the values of each field, as JSON.

    Raises:
        ValueError: If a text has another form, or a field or a value appears twice.
    """
    over: dict[str, list[str]] = {}
    for text in texts:
        field, equals, values = text.partition("=")
        if not equals or not field or not values.strip():
            raise ValueError(f"over must look like seed=0,1,2, got {text!r}.")
        if field in over or field == "output":
            raise ValueError(f"over: {field} cannot be swept{' twice' * (field != 'output')}.")
        try:
            parsed = [json.dumps(value) for value in yaml.safe_load(f"[{values}]")]
        except (yaml.YAMLError, TypeError):
            raise ValueError(f"over: {field}: {values!r} is not a list of YAML values.") from None
        if twice := [value for value in parsed if parsed.count(value) > 1]:
            raise ValueError(f"over: {field} is {twice[0]} twice.")
        over[field] = parsed
    return over


def combinations(over: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations of the values. The last field changes fastest."""
    return [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]


def run_name(settings: Mapping[str, str]) -> str:
    """A unique folder name for some settings, in which they can be read.

    The name depends on these settings alone, so that a sweep with more values finds its runs
    again. Fields are sorted; the seed comes last.
    """
    fields = sorted(settings, key=lambda field: (field == "seed", field))
    full = ",".join(f"{field}={plain_text(settings[field])}" for field in fields)
    name = re.sub(r"[^\w.,=+-]+", "-", full, flags=re.ASCII)[:_MAX_NAME_LENGTH]
    if name == full:
        return name
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{name.rstrip('-')}-{digest}"


def plan_runs(
    recipe: str | Path, overrides: Sequence[str], over: Mapping[str, Sequence[str]]
) -> list[PlannedRun]:
    """The runs of a sweep. Raises a ValueError if a field or a value is wrong."""
    return [
        plan_run(recipe, overrides, settings, run_name(settings)) for settings in combinations(over)
    ]


def plan_run(
    recipe: str | Path, overrides: Sequence[str], settings: dict[str, str], name: str
) -> PlannedRun:
    """Plan one run, in the folder NAME below the recipe's output.

    Raises:
        ValueError: If a field or a value is wrong.
    """
    of_run = [f"{field}={value}" for field, value in settings.items()]
    parsed = read_recipe(recipe, [*overrides, *of_run])
    output = f"{parsed.output}/{name}"
    return PlannedRun(name, settings, parsed.model_copy(update={"output": output}))


def sweep_folder(run: PlannedRun) -> Path:
    """The folder of the sweep that a run belongs to: the output that its recipe names.

    Raises:
        ValueError: If the folder itself holds a run.
    """
    folder = Path(run.recipe.output.removesuffix(run.name))
    if Run(folder).recipe_file.exists():
        raise ValueError(f"output: {folder} holds a run; choose another output for the sweep.")
    return folder
