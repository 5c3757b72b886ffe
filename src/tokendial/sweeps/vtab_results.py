"""Results on VTAB-1k in the form of papers: tasks in three groups, and two kinds of means."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tokendial.data import VTAB_GROUPS, VTAB_TASKS
from tokendial.sweeps.parallel_runs import PlannedRun
from tokendial.sweeps.results import RunResult
from tokendial.sweeps.tables import Table, mean_and_std, plain_text, write_csv, write_text
from tokendial.train.loop import NOT_FINITE


@dataclass(frozen=True, slots=True)
class PublishedResult:
    """Accuracies that a paper prints for a method, in percent. None: not printed."""

    method: str
    """Name of the method."""
    where: str
    """Key of the source: paper and table."""
    gmacs: float | None = None
    """Cost that the paper prints as GFLOPs: 1e9 multiply-accumulates."""
    tasks: dict[str, float] | None = None
    """Accuracy on each of the 19 tasks."""
    groups: dict[str, float] | None = None
    """Mean accuracy of each of the three groups of tasks."""
    mean_of_groups: float | None = None
    """Mean of the means of the three groups."""
    mean_of_tasks: float | None = None
    """Mean over the 19 tasks."""


def read_published() -> tuple[dict[str, str], list[PublishedResult]]:
    """Read the sources by their keys, and the printed accuracies; both are shipped."""
    text = (files("tokendial") / "assets" / "vtab_published.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return data["sources"], [PublishedResult(**row) for row in data["rows"]]


def means(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Means of accuracies by task: of each group, over the groups, and over the tasks.

    Missing tasks are left out of the means; groups without tasks are left out.
    """
    of_groups = {
        group: mean(accuracies[task] for task in tasks if task in accuracies)
        for group, tasks in VTAB_GROUPS.items()
        if any(task in accuracies for task in tasks)
    }
    if not of_groups:
        return {}
    return of_groups | {"groups": mean(of_groups.values()), "tasks": mean(accuracies.values())}


@dataclass(frozen=True)
class VTABResult:
    """Chosen settings, results and errors on the tasks of VTAB-1k."""

    tasks: tuple[str, ...]
    """The requested tasks, in the order of the benchmark."""
    search: dict[str, list[PlannedRun]]
    """Runs of the search on 800 + 200 images, by task. Empty without a search."""
    chosen: dict[str, dict[str, str]]
    """Chosen settings by task. A task whose search failed is missing."""
    final: dict[str, list[PlannedRun]]
    """Final runs on all 1,000 images, by task, one per seed."""
    errors: dict[str, str]
    """Errors, one line each, by the name of the run. All other runs are finished."""

    @property
    def failed(self) -> bool:
        """Whether results of some tasks are missing. The same call may still complete them."""
        return set(self.results) != set(self.tasks)

    @cached_property
    def results(self) -> dict[str, list[RunResult]]:
        """Results by task, one per seed, of the tasks whose final runs are all finished."""
        return {
            task: [RunResult.read(run) for run in runs]
            for task, runs in self.final.items()
            if not any(run.name in self.errors for run in runs)
        }

    @cached_property
    def means(self) -> dict[str, list[float]]:
        """Means over the finished tasks, one per seed, by the name of the mean; see `means`."""
        seeds = zip(*self.results.values(), strict=True)
        of_seeds = [
            means({task: r.main_score for task, r in zip(self.results, results, strict=True)})
            for results in seeds
        ]
        return {name: [of[name] for of in of_seeds] for name in (of_seeds[0] if of_seeds else {})}

    def write(self, folder: Path) -> None:
        """Write results.md, results.tex, results.csv, means.csv and search.csv."""
        tables = self.tables()
        write_text(folder / "results.md", [table.markdown() for table in tables])
        tables[0] = tables[0].transposed()
        write_text(folder / "results.tex", [table.latex() for table in tables])
        write_csv(folder / "results.csv", list(self._rows(self.final)))
        write_csv(
            folder / "means.csv",
            [
                {
                    "mean_over": name,
                    "tasks": self._count(name),
                    "mean": mean(values),
                    "std": stdev(values) if len(values) > 1 else None,
                }
                for name, values in self.means.items()
            ],
        )
        if self.search:
            write_csv(folder / "search.csv", list(self._rows(self.search)))

    def tables(self) -> list[Table]:
        """Tables of the tasks, the means beside those of papers, the search, and the errors."""
        tables = [self._task_table(), self._paper_table()]
        if self.search:
            tables.append(self._search_table())
        if self.errors:
            rows = [[name, error] for name, error in self.errors.items()]
            tables.append(Table("Failed runs", "The error of each run.", ["run", "error"], rows))
        return tables

    def _task_table(self) -> Table:
        _, papers = read_published()
        papers = [paper for paper in papers if paper.tasks]
        fields = list(next(iter(self.chosen.values()), {}))
        rows = []
        for group, tasks in VTAB_GROUPS.items():
            rows += [self._task_row(task, fields, papers) for task in tasks if task in self.tasks]
            rows.append(self._mean_row(group, f"mean, {group}", fields, papers))
        rows.append(self._mean_row("groups", "mean of the groups", fields, papers))
        rows.append(self._mean_row("tasks", "mean of the tasks", fields, papers))
        note = "Accuracy on the test set after the last epoch, in percent"
        seeds = len(next(iter(self.final.values()), []))
        if seeds > 1:
            note += f", as mean ± sample standard deviation over {seeds} seeds"
        header = ["task", "this run", *fields, "trained (M)", "GMACs"]
        note += ". Means of papers are over the same tasks."
        return Table("VTAB-1k", note, [*header, *(p.method for p in papers)], rows)

    def _task_row(
        self, task: str, fields: Sequence[str], papers: Sequence[PublishedResult]
    ) -> list[str]:
        chosen, results = self.chosen.get(task, {}), self.results.get(task)
        row = [task, mean_and_std([r.main_score for r in results]) if results else ""]
        row += [plain_text(chosen[field]) if field in chosen else "" for field in fields]
        cost = results[0].cost if results else None
        row += [f"{cost.trainable_params / 1e6:.3f}", f"{cost.gmacs:.4g}"] if cost else ["", ""]
        return row + [f"{paper.tasks[task]:.1f}" for paper in papers if paper.tasks]

    def _mean_row(
        self, name: str, title: str, fields: Sequence[str], papers: Sequence[PublishedResult]
    ) -> list[str]:
        row = [
            title + self._coverage(name),
            mean_and_std(self.means[name]) if name in self.means else "",
        ]
        row += [""] * (len(fields) + 2)
        for paper in papers:
            printed = (paper.tasks or {}).items()
            same = means({task: value for task, value in printed if task in self.results})
            row.append(f"{same[name]:.2f}" if name in same else "")
        return row

    def _count(self, name: str) -> int:
        """Number of finished tasks in a mean."""
        return len([task for task in VTAB_GROUPS.get(name, VTAB_TASKS) if task in self.results])

    def _coverage(self, name: str) -> str:
        """Text such as " (5 of 7 tasks)" for a mean over some of the tasks; empty for all tasks."""
        count, all_tasks = self._count(name), len(VTAB_GROUPS.get(name, VTAB_TASKS))
        return "" if count == all_tasks else f" ({count} of {all_tasks} tasks)"

    def _paper_table(self) -> Table:
        sources, papers = read_published()
        names = [*VTAB_GROUPS, "groups", "tasks"]
        ours = [mean_and_std(self.means[name]) if name in self.means else "" for name in names]
        results = [of_task[0] for of_task in self.results.values()]
        gmacs = f"{mean(r.cost.gmacs for r in results):.4g}" if results else ""
        rows = [[f"this run{self._coverage('tasks')}", gmacs, *ours, ""]]
        marks = {key: f"[{number}]" for number, key in enumerate(sources, 1)}
        rows += [_paper_row(paper, marks[paper.where]) for paper in papers]
        cited = " ".join(f"{marks[key]} {source}" for key, source in sources.items())
        header = ["method", "GMACs", *VTAB_GROUPS, "mean of groups", "mean of tasks", "source"]
        note = (
            f"In percent. Values of papers are printed there, or follow from printed ones. {cited}"
        )
        return Table("Beside published means", note, header, rows)

    def _search_table(self) -> Table:
        fields = list(next(iter(self.search.values()))[0].settings)
        rows = []
        for task, runs in self.search.items():
            for run in runs:
                error = self.errors.get(run.name, "")
                failure = "diverged" if error.startswith(NOT_FINITE) else "failed"
                score = failure if error else f"{100 * RunResult.read(run).main_score:.2f}"
                mark = "chosen" if run.settings == self.chosen.get(task) else ""
                rows.append([task, *map(plain_text, run.settings.values()), score, mark])
        note = "Accuracy on the 200 images after the last epoch, in percent."
        return Table("Search", note, ["task", *fields, "accuracy", ""], rows)

    def _rows(self, planned: Mapping[str, Sequence[PlannedRun]]) -> Iterator[dict[str, Any]]:
        """Lines of a CSV file, one per run, with numbers that are not rounded."""
        groups = {task: group for group, tasks in VTAB_GROUPS.items() for task in tasks}
        for task, runs in planned.items():
            for run in runs:
                row: dict[str, Any] = {"group": groups[task], "task": task}
                row |= {field: plain_text(value) for field, value in run.settings.items()}
                row["folder"] = run.recipe.output
                if run.name in self.errors:
                    yield row | {"error": self.errors[run.name]}
                else:
                    result = RunResult.read(run)
                    row |= {"accuracy": result.main_score, "params": result.cost.params}
                    trained = {"trainable_params": result.cost.trainable_params}
                    yield row | trained | {"gmacs": result.cost.gmacs}


def _paper_row(paper: PublishedResult, mark: str) -> list[str]:
    of_tasks = means(paper.tasks) if paper.tasks else {}
    of_groups = paper.groups or of_tasks
    over_groups = paper.mean_of_groups or of_tasks.get("groups")
    if paper.groups:
        over_groups = mean(paper.groups.values())
    numbers = [paper.gmacs, *map(of_groups.get, VTAB_GROUPS), over_groups, paper.mean_of_tasks]
    return [paper.method, *("" if n is None else f"{n:.2f}" for n in numbers), mark]
