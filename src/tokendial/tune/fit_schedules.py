"""`fit`: find the schedule that agrees best with the unreduced model within a budget."""

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tokendial.model.dial_vit import DialViT
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.tune.agreement import AgreeBy, Agreement, AgreementMeter, choose_comparison
from tokendial.tune.block_costs import BlockCosts
from tokendial.tune.cost_meters import (
    MIN_ROUNDS,
    MacCounter,
    ScheduledModel,
    Stopwatch,
    try_schedules,
)
from tokendial.tune.fit_arguments import (
    Budget,
    check_model,
    check_runtime,
    method_to_fit,
    read_budgets,
)
from tokendial.tune.fit_result import FitPoint, FitResult, FittedDegree
from tokendial.tune.runtime_costs import RuntimeChoice, RuntimeCosts, RuntimeStopwatch
from tokendial.tune.schedule_search import ScheduleSearch
from tokendial.tune.schedules import Schedule, ScheduleSpace

_TABLE_SHARE, _LAST_SHARE, _COMPARING_SHARE = 0.25, 0.15, 0.005
"""Fractions of the time: for the cost table, at least for the final comparison, and for each
schedule in a comparison."""
_SCHEDULES, _SCHEDULES_PER_LAYER = 40, 8
"""Approximate number of schedules that one search compares."""
_CORRECTIONS, _MARGIN = 4, 0.002
"""Maximum searches per budget; each retry lowers the target by this fraction."""
_BELOW, _ABOVE = 0.97, 1.01
"""Range of the measured cost, as a multiple of the budget, in which a search is accepted."""
_NEAR = (0.85, 0.93, 1.0, 1.08, 1.18)
"""Costs, as multiples of the found schedule's, of the constant schedules measured beside it, unless
each takes long to start."""
_NEAR_BUDGET = (0.95, 1.0)
"""The same as multiples of the budget: a search on a busy machine can end far below it."""
_CURVE = 8
"""Constant schedules on the curve beside the fitted ones."""
_FEWEST_IMAGES = 8
_JUDGED_PER_SEARCHED = 3
"""Images that the best schedules are judged on, for each one that the search uses, at most."""
_JUDGED_SCHEDULES = 8
"""Schedules of each search that are judged."""

Judge = Callable[[Schedule], Agreement]
"""Measures the agreement of a schedule, once for each."""


@torch.no_grad()
def fit(
    model: DialViT,
    images: Tensor,
    *,
    speedup: Budget | None = None,
    latency_ms: Budget | None = None,
    gmacs: Budget | None = None,
    reduce: ScheduledConfig | None = None,
    agree_by: AgreeBy | None = None,
    multi_label: bool = False,
    batch_size: int = 8,
    minutes: float = 5.0,
    runtime: RuntimeChoice | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> FitResult:
    """Find how many tokens each layer should remove, without training and without labels.

    Give one kind of budget; each of its values becomes a degree of the dial. Times are measured
    with the model as it is: its device, its dtype, and the present number of threads. The model is
    left unchanged. Of PruneMerge, the share of tokens that is dropped is searched, too.

    Args:
        model: A classifier, a model without a head, or one with a decoder. If its own reduction
            method has weights, as LearntMetric's, that method is fitted, with these weights:
            `tokendial.load(folder, reduce=found.reduce)` keeps them.
        images: Normalised images [N, 3, H, W], or clips [N, T, 3, H, W] of a video model, like
            those of later use; a few hundred. The search uses as many as the time allows, at most
            half. The others decide between the best schedules that it finds: on its own images a
            search of many schedules ends with one that happens to suit them.
        speedup: Budget as a multiple of the unreduced model's speed.
        latency_ms: Budget in milliseconds per batch.
        gmacs: Budget in 1e9 multiply-accumulates per image. They are counted; nothing is timed.
        reduce: The method to find schedules for. By default the model's own, or ToMe if it
            has none. If it lists schedules, such as those of `tokendial.preset` or of an earlier
            fit, the search starts from them too, scaled to the budget.
        agree_by: What schedules are compared by with the unreduced model. "logits": divergence of
            the classes. "embeddings": cosine similarity of the pooled features. "neighbours": how
            many of the (up to 10) nearest images among `images` stay the same. "feature_map":
            cosine similarity of the features at each position, restored. "masks": divergence of
            the classes at each pixel of a decoder's masks. None: masks with a decoder, logits with
            a head, embeddings without a head.
        multi_label: By logits: whether an image can have several labels; each is compared by
            itself.
        batch_size: Images per batch, for times and in the search.
        minutes: Time limit for everything. The search ends earlier if it finds nothing better.
        runtime: A `Runtime` of onnxruntime or OpenVINO whose times the budgets are for. Each
            schedule that is timed has to be exported, so it takes more minutes. Agreement is
            measured in PyTorch. None: PyTorch.
        note: Called with a line of text at each step, to show progress.

    Raises:
        ValueError: If the model, the method, the runtime or a budget is not allowed, or cannot be
            reached.

    Example:
        >>> import timm, torch, tokendial as td
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
        >>> fitted = td.fit(td.wrap(vit), torch.randn(8, 3, 32, 32), gmacs=0.0035)
        >>> model = td.wrap(vit, reduce=fitted.reduce)
        >>> model.cost(1).gmacs <= 0.0035
        True
    """
    kind, budgets = read_budgets(speedup=speedup, latency_ms=latency_ms, gmacs=gmacs)
    check_runtime(runtime, kind)
    space = ScheduleSpace(method_to_fit(model, reduce), model.anatomy.shape)
    agree_by = choose_comparison(model, agree_by)
    check_model(model, images, agree_by, batch_size, minutes)
    like = next(model.parameters())
    images = images.to(like.device, like.dtype)
    with try_schedules(model, space) as scheduled_model:
        batch = images[torch.arange(batch_size) % len(images)]
        stopwatch = Stopwatch(scheduled_model, batch, seconds=_COMPARING_SHARE * 60 * minutes)
        costs: BlockCosts | RuntimeCosts
        if kind == "gmacs":
            costs = BlockCosts(space, MacCounter(scheduled_model))
        elif runtime is None:
            costs = BlockCosts(space, stopwatch)
        else:
            costs = RuntimeCosts(scheduled_model, RuntimeStopwatch(scheduled_model, batch, runtime))
        fitting = _BudgetFit(scheduled_model, costs, kind, budgets, minutes, note)
        some = fitting.affordable(stopwatch, len(images))
        others = images[some : some + _JUDGED_PER_SEARCHED * some]

        def meter_of(some_images: Tensor) -> AgreementMeter:
            return AgreementMeter(
                scheduled_model,
                torch.split(some_images, batch_size),
                agree_by=agree_by,
                multi_label=multi_label,
            )

        searched_on = meter_of(images[:some])
        judged_on = meter_of(others) if len(others) >= _FEWEST_IMAGES else searched_on
        note(
            f"searching on {searched_on.num_images} of {len(images)} images, judging on "
            f"{judged_on.num_images}" + (" others" if judged_on is not searched_on else "")
        )
        return fitting.run(searched_on, judged_on, batch_size)


def _point(schedule: Schedule, share: float, agreement: Agreement) -> FitPoint:
    return FitPoint(schedule, share, agreement.divergence, agreement.top1)


class _BudgetFit:
    """One call of `fit`: its cost table, its budgets, and its clock."""

    def __init__(
        self,
        scheduled_model: ScheduledModel,
        costs: BlockCosts | RuntimeCosts,
        kind: str,
        budgets: list[float],
        minutes: float,
        note: Callable[[str], None],
    ) -> None:
        """Measure the cost table, and check that the budgets can be reached."""
        self.scheduled_model, self.space = scheduled_model, scheduled_model.space
        self.costs, self.kind, self.note = costs, kind, note
        self.table, self.meter = costs.table, costs.meter
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self.end = self.until = 0.0
        """Seconds after the start at which all searches, and the present one, have to end."""
        costs.measure(lambda: self._elapsed() > _TABLE_SHARE * self.seconds, note)
        whole, least = self.meter.compare([self.space.none, self.space.strongest])
        self.unreduced = self._in_unit(whole)
        self.limits = {budget: self._limit(budget, least / whole) for budget in budgets}

    def _in_unit(self, cost: float) -> float:
        """Convert a meter's cost to GMACs or milliseconds."""
        return cost / 1e9 if self.meter.exact else 1000 * cost

    def _elapsed(self) -> float:
        return time.monotonic() - self.start

    def _limit(self, budget: float, least: float) -> float:
        """The budget as a fraction of the unreduced cost; a ValueError if it cannot be reached."""
        low, high = least * self.unreduced, self.unreduced
        if self.kind == "speedup":
            low, high = 1.0, 1 / least
        if not low <= budget <= high:
            raise ValueError(
                f"{self.kind} must lie in [{low:.4g}, {high:.4g}] here, from nothing removed to "
                f"all that {type(self.space.reduce).__name__} can remove, got {budget:g}."
            )
        return 1 / budget if self.kind == "speedup" else budget / self.unreduced

    def affordable(self, stopwatch: Stopwatch, images: int) -> int:
        """Number of images that leave time for the searches, judging and the final comparison."""
        batch = min(stopwatch.single_cost(self.space.none) for _ in range(3))
        per_image = batch / len(stopwatch.images)
        # Each search ends with a comparison of two schedules; the last one compares all of them.
        compared = 1 + (2 + 1 + len(self._near_found) + len(_NEAR_BUDGET)) * len(self.limits)
        follows = ((1 + MIN_ROUNDS) * compared + _CURVE) * batch
        follows += compared * self.meter.start_seconds
        self.end = self.seconds - max(_LAST_SHARE * self.seconds, follows)
        searched = _SCHEDULES + _SCHEDULES_PER_LAYER * self.space.shape.depth
        wanted = (searched + 1 + len(self.space.reduce.variants())) * len(self.limits)
        judged = (_JUDGED_SCHEDULES + 1) * len(self.limits) + _CURVE
        left = self.end - self._elapsed()
        some = int(left / (wanted + _JUDGED_PER_SEARCHED * judged) / per_image)
        return min(max(images // 2, min(images, _FEWEST_IMAGES)), max(_FEWEST_IMAGES, some))

    def run(
        self, searched_on: AgreementMeter, judged_on: AgreementMeter, batch_size: int
    ) -> FitResult:
        """Find a schedule for each budget, and compare all of them end to end.

        Args:
            searched_on: Measures the agreement of the many schedules of a search.
            judged_on: Measures that of the few best, on other images.
            batch_size: Images per batch.
        """
        self._choose_variant(searched_on)
        search = ScheduleSearch(
            self.space, self.table, searched_on, time_is_up=lambda: self._elapsed() > self.until
        )
        judge: Judge = functools.cache(judged_on)
        found: dict[float, Schedule] = {}
        last = None
        # The hardest budget first: its schedule is allowed for the others, so that none is worse.
        for left, (budget, limit) in zip(
            range(len(self.limits), 0, -1),
            sorted(self.limits.items(), key=lambda item: item[1]),
            strict=True,
        ):
            seconds = max(0.0, self.end - self._elapsed()) / left
            best = self._search_within(search, limit, last, seconds)
            found[budget] = last = self._best_judged(search, judge, best, last)
            self.note(
                f"{self.kind} {budget:g}: {len(search.known)} schedules compared, "
                f"{judged_on.comparison.divergence_title} {judge(last).divergence:.4f}"
            )
        rows, unreduced = self._compare(found, judge)
        spread = self.meter.spread
        constants = self._curve(self.space.all_linear(), min(self.limits.values()))
        return FitResult(
            reduce=self.scheduled_model.method.with_schedules([row.found.removed for row in rows]),
            kind=self.kind,
            unreduced=unreduced,
            batch_size=batch_size,
            images=searched_on.num_images,
            images_judged=judged_on.num_images,
            degrees=tuple(rows),
            searched=tuple(_point(s, self._share(s), at) for s, at in search.known.items()),
            constants=tuple(_point(s, self._share(s), judge(s)) for s in constants),
            table=self.table,
            spread=spread,
            agree_by=judged_on.agree_by,
        )

    def _choose_variant(self, meter: AgreementMeter) -> None:
        """Choose the variant of the method that agrees best where the searches begin.

        The costs of the table are those of the method as given: variants cost nearly the same, and
        what is found is measured end to end.
        """
        if not (variants := self.space.reduce.variants()):
            return
        search = ScheduleSearch(self.space, self.table, meter, time_is_up=lambda: True)
        starts = [search.first_start(self._most(limit)) for limit in self.limits.values()]
        divergences = {}
        for name, method in {"as given": self.space.reduce, **variants}.items():
            self.scheduled_model.method = method
            divergences[name] = sum(meter(start).divergence for start in starts)
        best = min(divergences, key=divergences.__getitem__)
        self.scheduled_model.method = variants.get(best, self.space.reduce)
        self.note(f"{len(divergences)} settings compared, best: {best}")

    def _most(self, limit: float) -> float:
        """Cost in the table of a fraction of the unreduced cost."""
        return limit * self.table.schedule_cost(self.space.none)

    def _best_judged(
        self, search: ScheduleSearch, judge: Judge, found: Schedule, harder: Schedule | None
    ) -> Schedule:
        """The best on other images of the schedules that a search liked and that cost no more."""
        most = self.table.schedule_cost(found)
        kept = sum(self.space.tokens_left(harder or self.space.strongest))
        liked = sorted(
            (
                schedule
                for schedule in search.known
                if self.table.schedule_cost(schedule) <= most
                and sum(self.space.tokens_left(schedule)) >= kept
            ),
            key=search.divergence,
        )
        return min([found, *liked[:_JUDGED_SCHEDULES]], key=lambda s: judge(s).divergence)

    def _search_within(
        self, search: ScheduleSearch, limit: float, harder: Schedule | None, seconds: float
    ) -> Schedule:
        """Find the best schedule whose cost, measured end to end, is within `limit`.

        The table is only an estimate. After each search the found schedule is measured, and the
        next search corrects its limit by the ratio of measured to estimated cost.
        """
        end = self._elapsed() + seconds
        factor, above = 1.0, 1.0 if self.meter.exact else _ABOVE
        kept: list[Schedule] = []
        for attempt in range(_CORRECTIONS):
            most = self._most(limit / factor * (1 - _MARGIN * attempt))
            # The first search may take half of the time, each correction half of the remainder.
            self.until = (self._elapsed() + end) / 2
            best = search.run(most, harder)
            share = self._measure(best)
            if share <= above * limit:
                kept.append(best)
            fits = best == harder or _BELOW * limit <= share <= above * limit
            late = attempt > 0 and self._elapsed() > end
            if fits or late:
                break
            factor = share / self._share(best)
        return min(kept or [best], key=search.divergence)

    def _measure(self, schedule: Schedule) -> float:
        """Add a schedule to the table, and measure its fraction of the unreduced cost."""
        self.costs.refine(schedule)
        if schedule == self.space.none:
            return 1.0  # on a busy machine, the clock could show it faster than itself
        none, cost = self.meter.compare([self.space.none, schedule])
        return cost / none

    def _share(self, schedule: Schedule) -> float:
        """Estimated cost of a schedule as a fraction of the unreduced cost."""
        return self.table.schedule_cost(schedule) / self.table.schedule_cost(self.space.none)

    def _compare(
        self, found: dict[float, Schedule], judge: Judge
    ) -> tuple[list[FittedDegree], float]:
        """Compare the found schedules with constant ones end to end, and choose the better ones.

        Returns:
            A row for each budget, and the cost of the unreduced model in the unit of the budgets.
        """
        lines = self.space.all_linear()
        near = {s for item in found.items() for s in self._near(lines, *item)}
        compared = list(dict.fromkeys([self.space.none, *found.values(), *near]))
        costs = self.meter.compare(compared)
        shares = {schedule: cost / costs[0] for schedule, cost in zip(compared, costs, strict=True)}
        rows: list[FittedDegree] = []
        chosen, kept = self.space.strongest, 0
        for number, (budget, schedule) in enumerate(found.items()):
            allowed = max(self.limits[budget], shares[schedule])
            constant = next((s for s in lines[1:] if shares.get(s, math.inf) <= allowed), None)
            options = [s for s in (schedule, constant, chosen) if s in shares]
            chosen = min(
                (s for s in options if sum(self.space.tokens_left(s)) >= kept),
                key=lambda s: judge(s).divergence,
            )
            kept = sum(self.space.tokens_left(chosen))
            beside = _point(constant, shares[constant], judge(constant)) if constant else None
            best = _point(chosen, shares[chosen], judge(chosen))
            rows.append(FittedDegree(len(found) - number, budget, best, beside))
        return rows[::-1], self._in_unit(costs[0])

    @property
    def _near_found(self) -> tuple[float, ...]:
        """Costs of constant schedules beside a found one, as multiples of its cost."""
        return () if self.meter.start_seconds else _NEAR

    def _near(self, lines: list[Schedule], budget: float, schedule: Schedule) -> list[Schedule]:
        """Constant schedules that cost about as much as the found one, or as the budget."""
        wanted = [self._share(schedule) * part for part in self._near_found]
        wanted += [self.limits[budget] * part for part in _NEAR_BUDGET]
        return [min(lines[1:], key=lambda s: abs(self._share(s) - share)) for share in wanted]

    def _curve(self, lines: list[Schedule], least: float) -> list[Schedule]:
        """Some constant schedules down to the fraction `least` of the unreduced cost."""
        dear = [schedule for schedule in lines[1:] if self._share(schedule) >= 0.9 * least]
        return dear[:: max(1, len(dear) // _CURVE)]
