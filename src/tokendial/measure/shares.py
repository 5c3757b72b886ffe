"""Shares of tokens that FFNs process: measured, and thresholds found that give them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tokendial.reduce.base import Calibration
from tokendial.reduce.select import Selector


class ShareMeter:
    """Measures, in a `with` block, the share of the patch tokens that are selected by threshold.

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
        """Measure `model`, a `DialViT` in evaluation mode with DyT or DAR by threshold.

        Raises:
            ValueError: If it selects no tokens by threshold, or its target is every token.
        """
        self._model, self._reducer = model, _selector(model)
        self._heard: list[tuple[int, float]] = []

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` selects tokens by threshold."""
        reducer = getattr(model, "reducer", None)
        return isinstance(reducer, Selector) and reducer.calibratable

    def __enter__(self) -> "ShareMeter":
        self._heard = []
        self._hearing = self._reducer.logits_heard(self._hear)
        self._hearing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hearing.__exit__(*error)

    def _hear(self, logits_BL: Tensor) -> None:
        selected = float((logits_BL > self._reducer.threshold(self._model.degree)).sum())
        # Parts of a batch may run in threads of their own: appending is safe, adding up is not.
        self._heard.append((logits_BL.numel(), selected))

    @property
    def share(self) -> float:
        """Of all layers and images; 1 if every token was processed without a choice."""
        count, selected = map(sum, zip(*self._heard, strict=True)) if self._heard else (0, 0.0)
        return selected / count if count else 1.0


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[Tensor]) -> Calibration:
    """Find the thresholds of a dial, so that its degrees process about the shares they stand for.

    The degree that was trained keeps its threshold of 0, and whatever share that gives; shares of
    the others are moved in proportion, so that the dial is even. Thresholds are quantiles of the
    logits that the model gives at the degree that was trained; since other decisions change what
    later layers see, the shares at these thresholds are then measured, at every degree. The result
    is kept in `model.reducer.calibration` and saved with the model.

    Args:
        model: A `DialViT` with DyT or DAR by threshold.
        batches: Images [B, 3, H, W], normalised; a few dozen images like those to come.

    Raises:
        ValueError: If the model selects no tokens by threshold, its target is every token, or there
            are no images.
    """
    reducer, before, training = _selector(model), model.degree, model.training
    calibration = reducer.calibration
    images = list(batches)
    if not images:
        raise ValueError("batches must hold at least one image, got none.")
    model.eval()
    try:
        model.set_degree(reducer.degree)
        heard: list[Tensor] = []
        with reducer.logits_heard(lambda logits: heard.append(logits.flatten().cpu())):
            for batch in images:
                model(batch)
        thresholds = _thresholds(reducer, torch.cat(heard).sort().values)
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
        reducer.calibration = calibration
        raise
    finally:
        model.set_degree(before)
        model.train(training)
    return reducer.calibration


def _thresholds(reducer: Selector, rising: Tensor) -> tuple[float, ...]:
    """The threshold of each degree from 1 up, of logits in rising order."""
    target, own = reducer.rates[reducer.degree], float((rising > 0).float().mean())
    found = []
    for degree in reducer.degrees[1:]:
        rate = reducer.rates[degree]
        above = rate > target
        wanted = 1 - (1 - own) * (1 - rate) / (1 - target) if above else own * rate / target
        skipped = min(len(rising) - 1, round((1 - wanted) * len(rising)))
        # Tokens with just the threshold are not selected, so it is the last one that is skipped.
        quantile = float(rising[max(0, skipped - 1)])
        found.append(0.0 if degree == reducer.degree else quantile)
    return tuple(found)


def _selector(model: Any) -> Selector:
    if not ShareMeter.fits(model):
        raise ValueError(
            "the model must select tokens by threshold: DyT or DAR, not by top-k, with a "
            "target_ratio below 1."
        )
    reducer: Selector = model.reducer
    return reducer
