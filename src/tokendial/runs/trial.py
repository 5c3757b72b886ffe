"""Ways to run a model, evaluated on the validation set from the fastest on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tokendial.cascade import Cascade, choose_thresholds
from tokendial.measure import Interval, mean_difference
from tokendial.model.dial import InferenceModel
from tokendial.runs.cascade import time_cascade
from tokendial.runs.evaluate import evaluate_loader, main_score
from tokendial.runs.image_scores import right_answers
from tokendial.runs.stored_logits import collect_logits, scores_of
from tokendial.runs.ways import Schedule, Way
from tokendial.runtimes import Runtime
from tokendial.tasks import Classification, Task, VideoClassification


@dataclass(frozen=True, slots=True)
class TunedRow:
    """One way to run a model, measured and evaluated."""

    way: Way
    """The way."""
    speedup: float
    """How many times as fast it is as degree 0 in PyTorch and float32."""
    score: float
    """The run's main metric on the validation set."""
    lost: float
    """What it loses of that at degree 0 in PyTorch and float32."""
    accuracy_lost: Interval | None
    """Accuracy lost, paired by image; None unless the task is classification with one label."""

    @property
    def most_lost(self) -> float:
        """What is lost of the main metric or of the accuracy, whichever lost more. Another metric
        alone can rise while many answers change, if the classes are not balanced."""
        return max(self.lost, self.accuracy_lost.value if self.accuracy_lost else self.lost)


class Trial:
    """Evaluates ways on the validation set, each of them once."""

    def __init__(
        self,
        task: Task,
        loader: DataLoader[Any],
        started: Mapping[tuple[Schedule, Runtime], InferenceModel],
        seconds: dict[Way, float],
        base: Way,
        batches: Sequence[Tensor],
    ) -> None:
        self.task, self.loader, self.started, self.seconds = task, loader, started, seconds
        self.batches = batches
        """Batches that cascades are timed on."""
        self.metric = ""
        self.logits: dict[Way, Tensor] = {}
        """Logits [N, K] of ways that were evaluated, if the task is classification."""
        self.labels = torch.empty(0)
        self.cascades: dict[Way, Cascade] = {}
        """Calibrated cascades."""
        self.base = TunedRow(base, 1.0, 0.0, 0.0, None)
        """Degree 0 in PyTorch and float32."""
        self.base = self.row(base)

    def speedup(self, way: Way) -> float:
        """How many times as fast a way of one degree is as the base."""
        return self.seconds[self.base.way] / self.seconds[way]

    def row(self, way: Way) -> TunedRow:
        """Evaluate a way of one degree."""
        if way == self.base.way and self.metric:  # it was the first
            return self.base
        model, degree = self.started[way.schedule, way.runtime], way.degrees[0]
        if not isinstance(self.task, Classification):
            model.set_degree(degree)
            scores = evaluate_loader(model, self.loader, self.task)
            return self._row(way, self.speedup(way), scores, None)
        logits, self.labels = collect_logits(model, [degree], self.loader, self.task)
        self.logits[way] = logits[degree]
        return self._classified(way, self.speedup(way), logits[degree])

    def cascade_row(self, cheap: Way, max_loss: float, least: float) -> TunedRow | None:
        """Evaluate the cascade from a way to degree 0 in the same runtime.

        Args:
            cheap: The way of its first stage.
            max_loss: Largest share of lost answers.
            least: Speed-up that it has to exceed; None is returned if the times of its degrees and
                the share that is sent on say that it cannot.

        Raises:
            ValueError: If there are too few images to calibrate it.
        """
        assert isinstance(self.task, Classification)
        whole = replace(cheap, schedule="own", degrees=(0,))
        if whole not in self.logits:
            self.row(whole)
        way = replace(cheap, degrees=(*cheap.degrees, 0))
        cascade = Cascade(
            self.started[way.schedule, way.runtime],
            way.degrees,
            multi_label=self.task.multi_label,
        )
        both = torch.stack([self.logits[cheap], self.logits[whole]])
        observations = cascade.compare(list(both), self.labels, "lost")
        cascade.calibration = found = choose_thresholds(observations, "lost", max_loss)
        self.cascades[way] = cascade
        stages = observations.stage_of(found.thresholds)
        expected = self.seconds[cheap] + float(stages.float().mean()) * self.seconds[whole]
        if self.seconds[self.base.way] / expected <= least:
            return None
        ours, its = (sum(each.times) for each in time_cascade(cascade, [0], self.batches))
        seconds = self.seconds[whole] * ours / its
        logits = both[stages, torch.arange(len(stages))]
        return self._classified(way, self.seconds[self.base.way] / seconds, logits)

    def _classified(self, way: Way, speedup: float, logits: Tensor) -> TunedRow:
        assert isinstance(self.task, Classification)
        scores = scores_of(self.task, logits, self.labels)
        lost = None
        if not self.task.multi_label and self.base.way in self.logits:
            base_right, right = (
                right_answers(self.task, each, self.labels)
                for each in (self.logits[self.base.way], logits)
            )
            lost = mean_difference(base_right, right)
        return self._row(way, speedup, scores, lost)

    def _row(
        self, way: Way, speedup: float, scores: dict[str, float], lost: Interval | None
    ) -> TunedRow:
        self.metric, score = next(iter(scores)), main_score(scores)
        base_score = score if way == self.base.way else self.base.score
        return TunedRow(way, speedup, score, base_score - score, lost)


def evaluate_ways(
    trial: Trial,
    speedup: float,
    max_loss: float,
    time_is_up: Callable[[], bool],
    note: Callable[[str], None],
    left_out: list[str],
) -> list[TunedRow]:
    """Evaluate ways from the fastest on until one is within the loss, then faster cascades.

    Args:
        trial: The trial, which knows the time of each way.
        speedup: How many times as fast as the base a way has to be at least.
        max_loss: How much may be lost.
        time_is_up: Whether nothing new may be started.
        note: Called with a line of text when a way is evaluated.
        left_out: List to add to what was not tried, and why.

    Returns:
        What was evaluated, from the fastest way on; cascades are last.
    """
    rows: list[TunedRow] = []
    for way in sorted(trial.seconds, key=trial.seconds.__getitem__):
        if trial.speedup(way) < speedup or (rows and rows[-1].most_lost <= max_loss):
            break
        if time_is_up():
            left_out.append(f"not evaluated for want of time: {way} and slower ones")
            break
        note(f"evaluating {way}")
        rows.append(trial.row(way))
    classifies_images = isinstance(trial.task, Classification) and not isinstance(
        trial.task, VideoClassification
    )
    if not classifies_images or not max_loss:
        return rows
    # The last way is the fastest one within the loss, if any is: a cascade has to be faster.
    least = rows[-1].speedup if rows and rows[-1].most_lost <= max_loss else speedup
    for row in list(rows):
        if row.most_lost <= max_loss or not row.way.degrees[0] or time_is_up():
            continue
        if row.way.schedule == "compensated":  # its own degree 0 would have to be the second stage
            continue
        note(f"calibrating a cascade from {row.way}")
        try:
            if (found := trial.cascade_row(row.way, max_loss, least)) is not None:
                rows.append(found)
        except ValueError as error:
            left_out.append(f"cascades: {error}")
            break
    return rows
