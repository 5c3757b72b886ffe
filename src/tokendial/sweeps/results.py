"""Results of a sweep: tables and CSV files with one row per run, and means over seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tokendial.measure import Cost
from tokendial.sweeps.parallel_runs import PlannedRun
from tokendial.sweeps.tables import Table, mean_and_std, plain_text, write_csv, write_text
from tokendial.tasks.metric_titles import metric_title

_SHOWN_SCORES = 3
"""Metrics in the tables. Tasks can have one metric per class; the CSV file has all."""
_NOTE = (
    "In percent, on the validation set. best: after the epoch with the highest score, whose model "
    "is in best/. last: after the last epoch."
)


@dataclass(frozen=True, slots=True)
class RunResult:
    """Scores and cost of a finished run."""

    best_epoch: int
    """The epoch whose model is in best/."""
    best: dict[str, float]
    """Metrics of the model in best/, by name. The first one is the task's main metric."""
    last: dict[str, float]
    """Metrics after the last epoch, by name. The first one is the task's main metric."""
    cost: Cost
    """Cost of the model at the degree that was trained."""

    @classmethod
    def read(cls, planned: PlannedRun) -> "RunResult":
        """Read the result from the folder of a run."""
        best, last = planned.run.best_record(), planned.run.metrics()[-1]
        return cls(best["epoch"], _scores(best), _scores(last), planned.run.cost())

    @property
    def main_score(self) -> float:
        """Value of the task's main metric after the last epoch."""
        return next(iter(self.last.values()))


def _scores(record: dict[str, Any]) -> dict[str, float]:
    return {n.removeprefix("val_"): value for n, value in record.items() if n.startswith("val_")}


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep and their errors."""

    planned: list[PlannedRun]
    """All runs of the sweep."""
    errors: dict[str, str]
    """Errors, one line each, by the name of the run. All other runs are finished."""

    @cached_property
    def finished(self) -> dict[str, RunResult]:
        """Results of the finished runs, by the name of the run."""
        return {p.name: RunResult.read(p) for p in self.planned if p.name not in self.errors}

    def write(self, folder: Path) -> None:
        """Write results.md, results.tex and results.csv, and means.csv if seeds were swept."""
        write_text(folder / "results.md", [table.markdown() for table in self.tables()])
        write_text(folder / "results.tex", [table.latex() for table in self.tables()])
        write_csv(folder / "results.csv", [self._row(planned) for planned in self.planned])
        if means := list(self._means()):
            write_csv(folder / "means.csv", means)

    def tables(self) -> list[Table]:
        """The table of all runs and, if seeds were swept, the table of means."""
        runs = Table("Runs", _NOTE, self._header(), [self._cells(p) for p in self.planned])
        groups = self._by_seed()
        if not groups:
            return [runs]
        others = [field for field in self.planned[0].settings if field != "seed"]
        means = Table(
            "Means over seeds",
            "Mean ± sample standard deviation over the seeds, in percent.",
            [*others, "seeds", *self._titles()],
            [
                [*map(plain_text, settings), str(len(results)), *self._spreads(results)]
                for settings, results in groups.items()
            ],
        )
        return [runs, means]

    @cached_property
    def _table_scores(self) -> list[str]:
        """Names of the metrics in the tables: the first few of a run."""
        first = next(iter(self.finished.values()), None)
        return list(first.last)[:_SHOWN_SCORES] if first else []

    def _titles(self) -> list[str]:
        return [
            f"{metric_title(n)}, {epoch}" for n in self._table_scores for epoch in ("best", "last")
        ]

    def _header(self) -> list[str]:
        titles = [*self.planned[0].settings, *self._titles(), "best epoch", "trained (M)", "GMACs"]
        return titles + ["error"] * bool(self.errors)

    def _cells(self, planned: PlannedRun) -> list[str]:
        cells = [*map(plain_text, planned.settings.values())]
        if error := self.errors.get(planned.name):
            return cells + [""] * (2 * len(self._table_scores) + 3) + [error]
        result = self.finished[planned.name]
        cells += self._spreads([result])
        cells += [str(result.best_epoch), f"{result.cost.trainable_params / 1e6:.3f}"]
        return cells + [f"{result.cost.gmacs:.4g}"] + [""] * bool(self.errors)

    def _spreads(self, results: list[RunResult]) -> list[str]:
        return [
            mean_and_std([scores[name] for scores in epoch])
            for name in self._table_scores
            for epoch in ([r.best for r in results], [r.last for r in results])
        ]

    def _row(self, planned: PlannedRun) -> dict[str, Any]:
        """One line of results.csv, with numbers that are not rounded."""
        row: dict[str, Any] = {
            field: plain_text(value) for field, value in planned.settings.items()
        }
        row["folder"] = planned.recipe.output
        if planned.name in self.errors:
            return row | {"error": self.errors[planned.name]}
        result = self.finished[planned.name]
        row["best_epoch"] = result.best_epoch
        for name in result.last:
            row |= {f"{name}_best": result.best[name], f"{name}_last": result.last[name]}
        cost = result.cost
        return row | {
            "params": cost.params,
            "trainable_params": cost.trainable_params,
            "gmacs": cost.gmacs,
        }

    def _means(self) -> Iterator[dict[str, Any]]:
        """The lines of means.csv."""
        others = [field for field in self.planned[0].settings if field != "seed"]
        for settings, results in self._by_seed().items():
            row: dict[str, Any] = dict(zip(others, map(plain_text, settings), strict=True))
            row["seeds"] = len(results)
            for name in results[0].last:
                for epoch in ("best", "last"):
                    values = [getattr(result, epoch)[name] for result in results]
                    row[f"{name}_{epoch}_mean"] = mean(values)
                    row[f"{name}_{epoch}_std"] = stdev(values) if len(values) > 1 else None
            yield row

    def _by_seed(self) -> dict[tuple[str, ...], list[RunResult]]:
        """Finished runs in groups that differ in the seed only, by their other settings."""
        groups: dict[tuple[str, ...], list[RunResult]] = {}
        for planned in self.planned:
            if "seed" in planned.settings and planned.name in self.finished:
                others = tuple(v for field, v in planned.settings.items() if field != "seed")
                groups.setdefault(others, []).append(self.finished[planned.name])
        return groups
