"""Cost of a model under its methods, counted without weights and without memory."""

import torch

from tokendial.measure.cost import Cost
from tokendial.model.wrap import wrap
from tokendial.runs.degrees import degrees_to_show
from tokendial.runs.recipe import ModelSection, check_method, check_section
from tokendial.runs.recipe_file import apply_overrides


def profile(
    model: str,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    degrees: str | None = None,
    num_classes: int = 1000,
) -> list[Cost]:
    """Count the cost of a timm model at several degrees.

    Args:
        model: Name of the timm model.
        overrides: Fields of the recipe sections model, reduce and adapt, such as `reduce.name=tome`
            or `model.img_size=384`.
        degrees: Degrees as text, such as "0..16"; see `parse_degrees`. None means 0 and the degree
            that the settings of the method stand for.
        num_classes: Number of classes of the head; 0 for no head.

    Returns:
        One cost per degree.

    Raises:
        ValueError: If the model, a setting or a degree is not allowed.
    """
    data = apply_overrides({}, overrides)
    if unknown := sorted(set(data) - {"model", "reduce", "adapt"}):
        raise ValueError(f"{unknown[0]}: profile takes settings of model, reduce and adapt only.")
    settings = data.get("model", {})
    if not isinstance(settings, dict):
        raise ValueError(f"model: must be a mapping of settings, got {settings!r}.")
    section = check_section(ModelSection, {"weights": None} | settings | {"name": model})
    backbone = section.backbone(num_classes)
    with torch.device("meta"):
        wrapped = wrap(
            backbone.create(),
            reduce=check_method("reduce", data.get("reduce")),
            adapt=check_method("adapt", data.get("adapt")),
            backbone=backbone,
        )
    wanted = degrees_to_show(wrapped, degrees) if degrees else sorted({0, wrapped.degree})
    return [wrapped.cost(degree) for degree in wanted]
