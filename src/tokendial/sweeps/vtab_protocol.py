"""The protocol of VTAB-1k: choose settings on 800 + 200 images, then train on all 1,000.

Settings are chosen by the accuracy after the last epoch, and the final model is that of the last
epoch. So the test set is used once, and nothing is chosen by it.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from tokendial.data import VTAB_TASKS
from tokendial.runs.recipe_file import explicit_fields
from tokendial.signals import stop_requests
from tokendial.sweeps.combinations import (
    combinations,
    plan_run,
    read_over,
    run_name,
    sweep_folder,
)
from tokendial.sweeps.parallel_runs import PlannedRun, run_all
from tokendial.sweeps.results import RunResult
from tokendial.sweeps.vtab_results import VTABResult
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
    """Train a recipe on the tasks of VTAB-1k. Finished runs are not trained again.

    Args:
        recipe: A recipe file or name, as for `read_recipe`. Its data set is replaced by VTAB-1k.
            Its `output` is the folder of all runs.
        root: Folder that holds the folders of the tasks.
        overrides: Overrides for every run, such as `train.epochs=50` or `data.check=false`.
        over: Fields to choose for each task, with their values, such as
            `adapt.scale=0.01,0.1,1,10,100`. Each value is trained on 800 images and scored on 200.
            Among equal scores the first wins; settings whose loss becomes infinite or NaN lose.
        tasks: Tasks to train, out of the 19.
        seeds: Seeds of the final runs. None means the recipe's seed, which the search always has.
        jobs: Number of runs to train at the same time; see `run_all`.
        quiet: Whether to print nothing.

    Returns:
        Accuracies on the test sets and their means. The folder gets `results.md`, `results.tex`,
        `results.csv`, `means.csv` and, with `over`, `search.csv`.

    Raises:
        ValueError: If a field, a value or a task is wrong.
        InterruptedRunError: If a signal asked the process to stop. The same call continues.
    """
    if unknown := [task for task in tasks if task not in VTAB_TASKS]:
        raise ValueError(f"tasks must be some of {', '.join(VTAB_TASKS)}, got {unknown[0]!r}.")
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must differ, got {', '.join(map(str, seeds))}.")
    tasks = [task for task in VTAB_TASKS if task in tasks]
    swept = read_over(over)
    fixed = [*_common_overrides(recipe, overrides, swept), f"data.root={json.dumps(str(root))}"]

    def plan(task: str, split: str, settings: dict[str, str]) -> PlannedRun:
        name = ",".join(filter(None, [task, run_name(settings)]))
        of_task = [*fixed, f"data.task={task}", f"data.split={split}"]
        return plan_run(recipe, of_task, settings, f"{split}/{name}")

    folder = sweep_folder(plan(tasks[0], "final", {}))
    each_seed = [{"seed": str(seed)} for seed in seeds] if seeds else [dict[str, str]()]
    search, chosen, errors = {}, {task: dict[str, str]() for task in tasks}, dict[str, str]()
    # One block around both: a signal during the last run of the search also stops the final runs.
    with stop_requests():
        if swept:
            candidates = combinations(swept)
            search = {
                task: [plan(task, "search", settings) for settings in candidates] for task in tasks
            }
            errors = run_all([*chain(*search.values())], jobs=jobs, quiet=quiet)
            chosen = _best_settings(search, errors)
        final = {
            task: [plan(task, "final", settings | seed) for seed in each_seed]
            for task, settings in chosen.items()
        }
        errors |= run_all([*chain(*final.values())], jobs=jobs, quiet=quiet)
    result = VTABResult(tuple(tasks), search, chosen, final, errors)
    result.write(folder)
    return result


def _common_overrides(
    recipe: str | Path, overrides: Sequence[str], swept: Mapping[str, Sequence[str]]
) -> list[str]:
    """The overrides of all runs, which also replace another data set by VTAB-1k."""
    fields = {text.partition("=")[0] for text in overrides} | swept.keys()
    for field in ("data", "data.name", "data.root", "data.task", "data.split", "train.evaluate"):
        if field in fields:
            raise ValueError(f"{field} is set by this command: leave it out.")
    if "seed" in swept:
        raise ValueError(
            "over: seed cannot be chosen; --seeds trains final runs with several seeds."
        )
    data = explicit_fields(recipe).get("data") or {}
    other = ["data={name: vtab}"] if data.get("name") != "vtab" else []
    return [*other, *overrides, "train.evaluate=last"]


def _best_settings(
    search: Mapping[str, Sequence[PlannedRun]], errors: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """The settings with the highest score on each task.

    A task is left out if one of its runs failed, because that run might have been the best. Runs
    that diverged have lost instead.
    """
    chosen = {}
    for task, runs in search.items():
        diverged = [run for run in runs if errors.get(run.name, "").startswith(NOT_FINITE)]
        failed = [run for run in runs if run.name in errors and run not in diverged]
        finished = [run for run in runs if run.name not in errors]
        if finished and not failed:
            best = max(finished, key=lambda run: RunResult.read(run).main_score)
            chosen[task] = best.settings
    return chosen
