"""Presets: schedules that `tokendial.fit` found on real pictures, for widely used backbones.

They are shares of the image's patches, so that they hold at every image size. `assets/presets.json`
says how each was found; `tools/fit_presets.py` makes it.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Literal

from tokendial.checks import check_choice
from tokendial.methods import from_json
from tokendial.reduce.schedules import ScheduledConfig

Keeps = Literal["embeddings", "feature_map"]
"""What a preset changes least: the pooled features, or the features at each position."""


def preset(
    backbone: str,
    *,
    speedup: float | Sequence[float] | None = None,
    method: str = "tome",
    keeps: Keeps = "embeddings",
) -> ScheduledConfig:
    """A reduction method with schedules that were fitted for a backbone, ready to use.

    They need no images and no time. `tokendial.fit` on your own images, on your own machine, finds
    better ones, and can start from these (`reduce=`).

    Args:
        backbone: Name in timm, such as "vit_small_patch14_dinov2"; a tag after a point is ignored.
        speedup: Multiply-accumulates of the unreduced model divided by those of the schedule, for
            an image of 224 pixels. Several values become several degrees. None: all that there are.
        method: Name of the reduction method.
        keeps: What the schedules were compared by: "embeddings" (for classes and retrieval) or
            "feature_map" (for masks).

    Raises:
        ValueError: If there is no such preset.

    Example:
        >>> import tokendial as td
        >>> reduce = td.preset("vit_small_patch14_dinov2", speedup=1.5)
        >>> type(reduce).__name__, len(reduce.r[0])
        ('ToMe', 12)
    """
    presets = all_presets()
    name = backbone.partition(".")[0]
    if name not in presets:
        raise ValueError(
            f"backbone must be one with a preset ({', '.join(sorted(presets))}), got {backbone!r}: "
            "use tokendial.fit for others."
        )
    check_choice("method", method, tuple(presets[name]))
    check_choice("keeps", keeps, tuple(presets[name][method]))
    found = {float(row["speedup"]): row["shares"] for row in presets[name][method][keeps]["rows"]}
    wanted = [speedup] if isinstance(speedup, int | float) else list(speedup or found)
    if missing := [value for value in wanted if value not in found]:
        known = ", ".join(f"{value:g}" for value in found)
        raise ValueError(f"speedup must be one of {known}, got {missing[0]!r}.")
    config = from_json("reduce", {"name": method})
    assert isinstance(config, ScheduledConfig)
    return config.with_schedules([found[value] for value in sorted(wanted)])


def all_presets() -> dict[str, Any]:
    """All presets, by backbone, method and what they keep, with how they were found."""
    text = (files("tokendial") / "assets" / "presets.json").read_text(encoding="utf-8")
    presets: dict[str, Any] = json.loads(text)
    return presets
