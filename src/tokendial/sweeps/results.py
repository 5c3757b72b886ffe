"""What a sweep has found: one row per run, and means over seeds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tokendial.measure import Cost
from tokendial.sweeps.side_by_side import Planned
from tokendial.sweeps.tables import Table, shown, spread, write_csv, write_text

_SHOWN_SCORES = 3
_NOTE = (
    "In percent, on the validation set; best: after the epoch that scored highest on it, whose "
    "model is in best/; last: after the last epoch."
)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run has reached."""

    best_epoch: int
    """The epoch whose model is in best/."""
    best: dict[str, float]
    """Metrics of that model; what runs are judged by comes first."""
    last: dict[str, float]
    """Metrics after the last epoch."""
    cost: Cost
    """At the degree that was trained."""

    @classmethod
    def of(cls, planned: Planned) -> "RunResult":
        """Read it from the run's folder."""
        best, last = planned.run.best_record(), planned.run.metrics()[-1]
        return cls(best["epoch"], _scores(best), _scores(last), planned.run.cost())

    @property
    def judged(self) -> float:
        """What runs are judged by, after the last epoch."""
        return next(iter(self.last.values()))


def _scores(record: dict[str, Any]) -> dict[str, float]:
    return {n.removeprefix("val_"): value for n, value in record.items() if n.startswith("val_")}


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep, and what went wrong with them."""

    planned: list[Planned]
    """All runs."""
    errors: dict[str, str]
    """In one line each, by the names of the runs; all others are finished."""

    @cached_property
    def finished(self) -> dict[str, RunResult]:
        """Results by the names of the runs."""
        return {p.name: RunResult.of(p) for p in self.planned if p.name not in self.errors}

    def write(self, folder: Path) -> None:
        """Write results.md, results.tex and results.csv, and means.csv if seeds were swept."""
        write_text(folder / "results.md", [table.markdown() for table in self.tables()])
        write_text(folder / "results.tex", [table.latex() for table in self.tables()])
        write_csv(folder / "results.csv", [self._row(planned) for planned in self.planned])
        if means := list(self._means()):
            write_csv(folder / "means.csv", means)

    def tables(self) -> list[Table]:
        """All runs, and the means if seeds were swept."""
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
                [*map(shown, settings), str(len(results)), *self._spreads(results)]
                for settings, results in groups.items()
            ],
        )
        return [runs, means]

    @cached_property
    def _shown(self) -> list[str]:
        """The metrics that tables show: of many (each class has its own) the first tell enough."""
        first = next(iter(self.finished.values()), None)
        return list(first.last)[:_SHOWN_SCORES] if first else []

    def _titles(self) -> list[str]:
        return [
            f"{n.replace('_', ' ')}, {epoch}" for n in self._shown for epoch in ("best", "last")
        ]

    def _header(self) -> list[str]:
        titles = [*self.planned[0].settings, *self._titles(), "best epoch", "trained (M)", "GMACs"]
        return titles + ["error"] * bool(self.errors)

    def _cells(self, planned: Planned) -> list[str]:
        cells = [*map(shown, planned.settings.values())]
        if error := self.errors.get(planned.name):
            return cells + [""] * (2 * len(self._shown) + 3) + [error]
        result = self.finished[planned.name]
        cells += self._spreads([result])
        cells += [str(result.best_epoch), f"{result.cost.trainable_params / 1e6:.3f}"]
        return cells + [f"{result.cost.gmacs:.4g}"] + [""] * bool(self.errors)

    def _spreads(self, results: list[RunResult]) -> list[str]:
        return [
            spread([scores[name] for scores in epoch])
            for name in self._shown
            for epoch in ([r.best for r in results], [r.last for r in results])
        ]

    def _row(self, planned: Planned) -> dict[str, Any]:
        """One line of results.csv, with numbers as they are."""
        row: dict[str, Any] = {field: shown(value) for field, value in planned.settings.items()}
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
            row: dict[str, Any] = dict(zip(others, map(shown, settings), strict=True))
            row["seeds"] = len(results)
            for name in results[0].last:
                for epoch in ("best", "last"):
                    values = [getattr(result, epoch)[name] for result in results]
                    row[f"{name}_{epoch}_mean"] = mean(values)
                    row[f"{name}_{epoch}_std"] = stdev(values) if len(values) > 1 else None
            yield row

    def _by_seed(self) -> dict[tuple[str, ...], list[RunResult]]:
        """Finished runs that differ by their seeds alone, by their other settings."""
        groups: dict[tuple[str, ...], list[RunResult]] = {}
        for planned in self.planned:
            if "seed" in planned.settings and planned.name in self.finished:
                others = tuple(v for field, v in planned.settings.items() if field != "seed")
                groups.setdefault(others, []).append(self.finished[planned.name])
        return groups
