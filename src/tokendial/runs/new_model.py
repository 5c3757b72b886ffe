"""The new model that a recipe describes."""

from dataclasses import replace

from tokendial.model.dial_vit import DialViT
from tokendial.model.wrap import wrap
from tokendial.runs.loaders import seed_all
from tokendial.runs.recipe import Recipe


def build_model(recipe: Recipe, num_classes: int) -> DialViT:
    """Build the wrapped model of a recipe, with a new head or decoder, at the degree to train at.

    Args:
        recipe: The recipe.
        num_classes: Number of classes in the data.

    Raises:
        ValueError: If the decoder of the recipe has another number of classes.
    """
    decode = recipe.decode
    if decode is not None:
        if decode.num_classes not in (1, num_classes):
            raise ValueError(
                f"decode.num_classes must be {num_classes}, the number in the data, got "
                f"{decode.num_classes}."
            )
        decode = replace(decode, num_classes=num_classes)
    backbone = recipe.model.backbone(0 if decode else num_classes)
    seed_all(recipe.seed)
    model = wrap(
        backbone.create(),
        reduce=recipe.reduce,
        adapt=recipe.adapt,
        decode=decode,
        backbone=backbone,
    )
    if recipe.train.degree is not None:
        model.set_degree(recipe.train.degree)
    model.checkpoint_activations = recipe.train.checkpoint_activations
    return model
