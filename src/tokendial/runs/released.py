"""Runs made from released fine-tuned models, to be evaluated or to predict."""

from pathlib import Path

from tokendial.backbones import convert_weights, fingerprint
from tokendial.backbones.checkpoints import find_state_dict
from tokendial.backbones.onnx_file import OnnxFile
from tokendial.model.dial_vit import DialViT
from tokendial.reference import load_reference
from tokendial.runs.exported_decoder import read_decoder
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import Recipe
from tokendial.runs.run import Run
from tokendial.weights import read_file


def released_run(file: Path, recipe: Recipe) -> Run:
    """Make a run from a released model of masks. Only tensors are read from the file.

    Args:
        file: A weight file that DAR's code has written: with all weights of a model, or with the
            trained ones only. In the second case the backbone gets the weights that the recipe
            names. Or an ONNX file (.onnx) of a whole model: transformers' Dinov2 with a decoder of
            transposed convolutions.
        recipe: The recipe that the model was trained with, such as dar/duts, or one with the same
            layers, such as real/focus. Its data set is not opened.

    Returns:
        The run, in the recipe's `output`.

    Raises:
        ValueError: If the file cannot be read, its tensors do not fit the recipe's model (the
            message lists them), or the folder holds another run.
    """
    if file.suffix == ".onnx":
        recipe = _without_weights(recipe)
        model = _exported_model(file, recipe)
    else:
        state, _, _ = find_state_dict(read_file(file), file)
        if any(name.startswith("backbone.patch_embed.") for name in state):
            recipe = _without_weights(recipe)
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


def _without_weights(recipe: Recipe) -> Recipe:
    """The recipe of a model whose backbone is saved with it, instead of being read again."""
    section = recipe.model.model_copy(update={"weights": None})
    return recipe.model_copy(update={"model": section})


def _exported_model(file: Path, recipe: Recipe) -> DialViT:
    """Build the recipe's model with the weights of an ONNX file.

    Raises:
        ValueError: If the file's encoder or decoder is not that of the recipe.
    """
    backbone = recipe.model.backbone(0)
    weights = convert_weights(file, backbone)
    decode, decoder_state = read_decoder(OnnxFile(file))
    if recipe.decode != decode:
        raise ValueError(f"decode must be that of {file}: {decode}, got {recipe.decode}.")
    model = build_model(recipe, num_classes=1)
    side = model.vit.patch_embed.img_size
    tensors = {f"vit.{n}": value for n, value in weights.resized_to(side).tensors.items()}
    tensors |= {f"decoder.{name}": value for name, value in decoder_state.items()}
    model.load_state_dict(model.state_dict() | tensors)
    # So that an adapter that was trained on the converted backbone may join this one.
    model.fingerprint = fingerprint(model.vit)
    return model
