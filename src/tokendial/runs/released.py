"""Runs made from released fine-tuned models of DAR, to be evaluated or to predict."""

from pathlib import Path

from tokendial.backbones.checkpoints import find_state_dict
from tokendial.reference import load_reference
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import Recipe
from tokendial.runs.run import Run
from tokendial.weights import read_file


def released_run(file: Path, recipe: Recipe) -> Run:
    """Make a run from a weight file that DAR's code has written. Only tensors are unpickled.

    Args:
        file: A file with all weights of a model, or, as DAR's training writes it, with the trained
            ones only. In the second case the backbone gets the weights that the recipe names.
        recipe: The recipe that the model was trained with, such as dar/duts. Its data set is not
            opened.

    Returns:
        The run, in the recipe's `output`.

    Raises:
        ValueError: If the file cannot be read, its tensors do not fit the recipe's model (the
            message lists them), or the folder holds another run.
    """
    state, _, _ = find_state_dict(read_file(file), file)
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
