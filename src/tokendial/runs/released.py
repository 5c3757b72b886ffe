"""Released fine-tuned models, made into runs that can be evaluated and predict."""

from pathlib import Path

from tokendial.backbones.checkpoints import unwrapped
from tokendial.reference import load_reference
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import Recipe
from tokendial.runs.run import Run
from tokendial.weights import read_file


def released_run(file: Path, recipe: Recipe) -> Run:
    """Make a run of a file that DAR's code has written; nothing is unpickled but tensors.

    Args:
        file: A whole model, or as DAR's training writes it what was trained alone; then the
            backbone is the recipe's, with its weights.
        recipe: What it was trained with, such as dar/duts; its data need not be at hand.

    Returns:
        The run in the recipe's `output`.

    Raises:
        ValueError: If the file cannot be read, its tensors are not those of the recipe's model (the
            message lists which), or the folder holds another run.
    """
    state, _, _ = unwrapped(read_file(file), file)
    if any(name.startswith("backbone.patch_embed.") for name in state):
        section = recipe.model.model_copy(update={"weights": None})
        recipe = recipe.model_copy(update={"model": section})
    model = build_model(recipe, num_classes=1)
    try:
        load_reference(model, state, "dar")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    run = Run(recipe.output)
    with run.locked():
        run.claim(recipe, ("mask",), dense=True)
        model.save_pretrained(run.best)
    return run
