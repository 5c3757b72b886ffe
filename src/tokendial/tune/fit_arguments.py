"""Checks of the arguments of `fit`."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from tokendial.model.dial_vit import DialViT
from tokendial.reduce import ToMe
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.tune.agreement import AgreeBy
from tokendial.tune.runtime_costs import RuntimeChoice

_RUNTIMES = ("onnxruntime", "openvino")
Budget = float | Sequence[float]
"""One value of a budget, or several."""


def read_budgets(**given: Budget | None) -> tuple[str, list[float]]:
    """Return the kind of the budgets (speedup, latency_ms or gmacs) and their distinct values.

    Raises:
        ValueError: If none or several kinds are given, or a value is not above 0.
    """
    (kind, values), *others = [(k, v) for k, v in given.items() if v is not None] or [("", ())]
    budgets = [values] if isinstance(values, int | float) else list(values)
    if others or not budgets:
        raise ValueError(f"give one of {', '.join(given)}, with a value or several.")
    if bad := [value for value in budgets if not 0 < value < math.inf]:
        raise ValueError(f"{kind} must be above 0, got {bad[0]:g}.")
    return kind, list(dict.fromkeys(float(value) for value in budgets))


def method_to_fit(model: DialViT, reduce: ScheduledConfig | None) -> ScheduledConfig:
    """Return the method to find schedules for: `reduce`, the model's own one, or ToMe.

    Raises:
        ValueError: If it does not remove tokens by number, its schedules do not fit the model, or
            it or the model's own method has weights that the other has not.
    """
    own, shape = model.reduce_config, model.anatomy.shape
    method = reduce or own or ToMe()
    if not isinstance(method, ScheduledConfig):
        raise ValueError(
            f"reduce must be a method that removes tokens by number, such as ToMe or EViT, got "
            f"{type(method).__name__}."
        )
    method.schedules(shape)  # an error if they do not fit
    needed = _weights(method.with_schedules([[0]]).build(shape))
    if needed != (trained := _weights(model.reducer)):
        raise ValueError(
            f"reduce must be the model's own {own}, which has trained weights, got {method}."
            if trained
            else f"reduce: {type(method).__name__} has weights, so the model has to be trained "
            "with it before its schedules are fitted."
        )
    return method


def _weights(reducer: nn.Module | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a reducer, by name."""
    named = reducer.named_parameters() if reducer else ()
    return {name: tuple(weight.shape) for name, weight in named}


def check_runtime(runtime: RuntimeChoice | None, kind: str) -> None:
    """Raise a ValueError unless budgets of this kind can be met in the runtime."""
    if runtime is None:
        return
    if runtime.name not in _RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(_RUNTIMES)}, got {runtime.name}.")
    if kind == "gmacs":
        raise ValueError(f"gmacs are counted, not timed: runtime {runtime.name} has no use there.")


def check_model(
    model: DialViT, images: Tensor, agree_by: AgreeBy, batch_size: int, minutes: float
) -> None:
    """Raise a ValueError unless `fit` supports the model and the settings."""
    if model.adapter.needs_grid:
        raise ValueError(
            f"{type(model.adapt_config).__name__} needs the tokens of all patches in every layer."
        )
    if model.compensation:
        raise ValueError("fit needs a model without a compensator: detach it first.")
    if model.anatomy.shape.depth < 2:
        raise ValueError("fit needs a model of at least 2 blocks, got 1.")
    clips = model.anatomy.frames is not None
    if images.ndim != (5 if clips else 4) or not len(images):
        expected = "[N, T, 3, H, W]" if clips else "[N, 3, H, W]"
        raise ValueError(f"images must be {expected} with N > 0, got {list(images.shape)}.")
    if agree_by in ("embeddings", "neighbours") and len(images) < 2:
        raise ValueError(f"agree_by {agree_by} needs at least 2 images, got {len(images)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes must be above 0, got {minutes:g}.")
