"""VTAB-1k as papers report it: settings chosen on 800 + 200 images, then trained on all 1,000.

The choice is made by the accuracy after the last epoch, and the final model is the last epoch's,
so the test set is read once and nothing is chosen by it.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from tokendial.data import VTAB_TASKS
from tokendial.runs.recipe_file import resolved_recipe
from tokendial.signals import stop_requests
from tokendial.sweeps.combinations import (
    combinations,
    planned_run,
    read_over,
    run_name,
    shared_folder,
)
from tokendial.sweeps.results import RunResult
from tokendial.sweeps.side_by_side import Planned, run_all
from tokendial.sweeps.vtab_result import VTABResult
from tokendial.train.loop import NOT_FINITE


def vtab(
    recipe: str | Path,
    root: str | Path,
    overrides: Sequence[str] = (),
    *,
    over: Sequence[str] = (),
    tasks: Sequence[str] = tuple(VTAB_TASKS),
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    quiet: bool = False,
) -> VTABResult:
    """Train a recipe on the tasks; what is finished is not trained again.

    Args:
        recipe: As `read_recipe` takes it; its data set, if any, gives way to VTAB. Its `output` is
            the folder of all runs.
        root: Folder that holds the folders of the tasks.
        overrides: Of every run, such as `train.epochs=50` or `data.check=false`.
        over: What is searched on 800 + 200 images, task by task, such as
            `adapt.scale=0.01,0.1,1,10,100`; the first of equals is chosen. Settings whose loss
            stops being finite lose.
        tasks: Some of the 19.
        seeds: Of the final runs; None: the recipe's. The search has the recipe's seed.
        jobs: Runs side by side; see `run_all`.
        quiet: Print nothing.

    Returns:
        Accuracies on the test sets and their means. `results.md`, `results.tex`, `results.csv`,
        `means.csv` and `search.csv` are in the folder.

    Raises:
        ValueError: If a setting, a value or a task is wrong.
        InterruptedRunError: If the process was asked to stop; the same call goes on.
    """
    if unknown := [task for task in tasks if task not in VTAB_TASKS]:
        raise ValueError(f"tasks must be some of {', '.join(VTAB_TASKS)}, got {unknown[0]!r}.")
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, got {', '.join(map(str, seeds))}.")
    tasks = [task for task in VTAB_TASKS if task in tasks]
    swept = read_over(over)
    fixed = [*_fixed(recipe, overrides, swept), f"data.root={json.dumps(str(root))}"]

    def planned(task: str, split: str, settings: dict[str, str]) -> Planned:
        name = ",".join(filter(None, [task, run_name(settings)]))
        own = [*fixed, f"data.task={task}", f"data.split={split}"]
        return planned_run(recipe, own, settings, f"{split}/{name}")

    folder = shared_folder(planned(tasks[0], "final", {}))
    each_seed = [{"seed": str(seed)} for seed in seeds] if seeds else [dict[str, str]()]
    search, chosen, errors = {}, {task: dict[str, str]() for task in tasks}, dict[str, str]()
    # One block around both: a signal that the last run of the search outlives stops the final ones.
    with stop_requests():
        if swept:
            each = combinations(swept)
            search = {task: [planned(task, "search", some) for some in each] for task in tasks}
            errors = run_all([*chain(*search.values())], jobs=jobs, quiet=quiet)
            chosen = _chosen(search, errors)
        final = {
            task: [planned(task, "final", settings | seed) for seed in each_seed]
            for task, settings in chosen.items()
        }
        errors |= run_all([*chain(*final.values())], jobs=jobs, quiet=quiet)
    result = VTABResult(tuple(tasks), search, chosen, final, errors)
    result.write(folder)
    return result


def _fixed(
    recipe: str | Path, overrides: Sequence[str], swept: Mapping[str, Sequence[str]]
) -> list[str]:
    """The overrides that all runs share, on a recipe whose data set may be another one."""
    fields = {text.partition("=")[0] for text in overrides} | swept.keys()
    for field in ("data", "data.name", "data.root", "data.task", "data.split", "train.evaluate"):
        if field in fields:
            raise ValueError(f"{field} is set by this command: leave it out.")
    if "seed" in swept:
        raise ValueError("over: seed is no setting to choose; final runs take several by seeds.")
    data = resolved_recipe(recipe).get("data") or {}
    other = ["data={name: vtab}"] if data.get("name") != "vtab" else []
    return [*other, *overrides, "train.evaluate=last"]


def _chosen(
    search: Mapping[str, Sequence[Planned]], errors: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """The best settings of each task; none where a run failed that might have been the best."""
    chosen = {}
    for task, runs in search.items():
        lost = [run for run in runs if errors.get(run.name, "").startswith(NOT_FINITE)]
        failed = [run for run in runs if run.name in errors and run not in lost]
        rest = [run for run in runs if run.name not in errors]
        if rest and not failed:
            best = max(rest, key=lambda run: RunResult.of(run).judged)
            chosen[task] = best.settings
    return chosen
