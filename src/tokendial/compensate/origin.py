"""Which model a compensator was trained on, and whether another model fits it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokendial.backbones import same_backbone
from tokendial.methods import from_json, to_json
from tokendial.model.dial_vit import DialViT
from tokendial.reduce.base import DIAL_RATES


@dataclass(frozen=True, slots=True)
class Origin:
    """The model that a compensator was trained on."""

    backbone: str
    """Name of the backbone, as in `Backbone.name`."""
    fingerprint: list[float]
    """A few weights of the backbone, see `tokendial.backbones.fingerprint`."""
    reduce: dict[str, Any]
    """The reduction method in its plain-JSON form."""


def origin_of(model: DialViT) -> Origin:
    """Describe the model that a compensator is to be trained on."""
    return Origin(model.backbone.name, model.fingerprint, to_json("reduce", model.reduce_config))


def check_origin(origin: Origin, model: DialViT, *, strict: bool) -> None:
    """Check that a compensator belongs to the backbone and reduction method of a model.

    Args:
        origin: The model that the compensator was trained on.
        model: The model that it is to be attached to.
        strict: Also compare the backbone's weights by their fingerprint.

    Raises:
        ValueError: If the reduction method differs in anything but the position of its dial, or
            the fingerprint differs.
    """
    if model.reduce_config is None:
        raise ValueError("this compensator needs a model with a reduction method, got none.")
    # Settings that the file's version did not have are at their defaults.
    trained = _without_degree(to_json("reduce", from_json("reduce", origin.reduce)))
    given = _without_degree(to_json("reduce", model.reduce_config))
    if differing := [n for n in trained | given if trained.get(n) != given.get(n)]:
        listed = ", ".join(f"{n} {trained.get(n)} there, {given.get(n)} here" for n in differing)
        raise ValueError(f"this compensator was trained with another reduction: {listed}.")
    if strict and not same_backbone(origin.fingerprint, model.fingerprint):
        raise ValueError(
            f"this compensator belongs to {origin.backbone} with other weights than those that "
            "the model was fine-tuned from; strict=False attaches it anyway."
        )


def _without_degree(reduce: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a reduction method with "any" in place of the position of its dial."""

    def is_degree(name: str, value: Any) -> bool:
        if name == "r":
            return type(value) is int
        return name in ("keep_rate", "target_ratio") and value in DIAL_RATES

    return {n: "any" if is_degree(n, value) else value for n, value in reduce.items()}
