"""Measures the fraction of tokens that FFNs process with DyT and DAR, and calibrates their dial."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tokendial.reduce.base import Calibration
from tokendial.reduce.select import Selector


class ShareMeter:
    """Measures the fraction of the patch tokens that FFNs process, in a `with` block.

    Example:
        >>> import timm, torch, tokendial as td
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> model = td.wrap(vit, reduce=td.DyT()).eval()
        >>> with ShareMeter(model) as meter:
        ...     logits = model(torch.zeros(1, 3, 224, 224))
        >>> 0.0 <= meter.share <= 1.0
        True
    """

    def __init__(self, model: Any) -> None:
        """Prepare to measure a model.

        Args:
            model: A `DialViT` in evaluation mode, with DyT or DAR by threshold.

        Raises:
            ValueError: If the model does not select tokens by threshold, or its target is 1.
        """
        self._model, self._reducer = model, _selector(model)
        self._counts: list[tuple[int, float]] = []

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether `model` selects tokens by threshold, so that it can be measured."""
        reducer = getattr(model, "reducer", None)
        return isinstance(reducer, Selector) and reducer.calibratable

    def __enter__(self) -> "ShareMeter":
        self._counts = []
        self._recording = self._reducer.record_logits(self._count)
        self._recording.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._recording.__exit__(*error)

    def _count(self, logits_BL: Tensor) -> None:
        selected = float((logits_BL > self._reducer.threshold(self._model.degree)).sum())
        # Parts of a batch may run in several threads: appending to a list is safe, += is not.
        self._counts.append((logits_BL.numel(), selected))

    @property
    def share(self) -> float:
        """Fraction of the patch tokens that FFNs processed, over all layers and measured images.

        It is 1 if no layer selected tokens (degree 0).
        """
        count, selected = map(sum, zip(*self._counts, strict=True)) if self._counts else (0, 0.0)
        return selected / count if count else 1.0


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[Tensor]) -> Calibration:
    """Find thresholds with which each degree of the dial processes about its fraction of tokens.

    The trained degree keeps its threshold of 0. Its measured fraction may differ from its target;
    then the fractions of the other degrees are moved in proportion, so that the dial is even.
    Thresholds are quantiles of the logits at the trained degree. Decisions in one layer change the
    tokens of later layers. So the fractions at these thresholds are then measured at every degree.
    The result is stored in `model.reducer.calibration` and saved with the model.

    Args:
        model: A `DialViT` with DyT or DAR by threshold.
        batches: Batches of normalised images [B, 3, H, W]. A few dozen images are enough; they
            should resemble those of later predictions.

    Raises:
        ValueError: If the model does not select tokens by threshold, its target is 1, or there are
            no images.
    """
    reducer, degree_before, training = _selector(model), model.degree, model.training
    calibration_before = reducer.calibration
    images = list(batches)
    if not images:
        raise ValueError("batches must hold at least one image, got none.")
    model.eval()
    try:
        model.set_degree(reducer.degree)
        logits: list[Tensor] = []
        with reducer.record_logits(lambda logits_BL: logits.append(logits_BL.flatten().cpu())):
            for batch in images:
                model(batch)
        thresholds = _thresholds(reducer, torch.cat(logits).sort().values)
        shares = []
        reducer.calibration = Calibration(thresholds, reducer.rates[1:])
        for degree in reducer.degrees[1:]:
            model.set_degree(degree)
            with ShareMeter(model) as meter:
                for batch in images:
                    model(batch)
            shares.append(meter.share)
        reducer.calibration = Calibration(thresholds, tuple(shares))
    except BaseException:
        reducer.calibration = calibration_before
        raise
    finally:
        model.set_degree(degree_before)
        model.train(training)
    return reducer.calibration


def _thresholds(reducer: Selector, rising: Tensor) -> tuple[float, ...]:
    """Return the threshold of degree 1, 2, ..., as quantiles of logits in rising order."""
    target, own = reducer.rates[reducer.degree], float((rising > 0).float().mean())
    thresholds = []
    for degree in reducer.degrees[1:]:
        rate = reducer.rates[degree]
        above = rate > target
        wanted = 1 - (1 - own) * (1 - rate) / (1 - target) if above else own * rate / target
        skipped = min(len(rising) - 1, round((1 - wanted) * len(rising)))
        # A token whose logit equals the threshold is skipped, so the threshold is the highest logit
        # of the tokens to skip.
        quantile = float(rising[max(0, skipped - 1)])
        thresholds.append(0.0 if degree == reducer.degree else quantile)
    return tuple(thresholds)


def _selector(model: Any) -> Selector:
    if not ShareMeter.supports(model):
        raise ValueError(
            "the model must select tokens by threshold: use DyT or DAR with selection=threshold "
            "and a target_ratio below 1."
        )
    reducer: Selector = model.reducer
    return reducer
