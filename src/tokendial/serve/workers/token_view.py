"""Which tokens of one image were merged, kept or dropped at each layer, as plain data."""

from base64 import b64encode
from io import BytesIO

from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tokendial.model.dial_vit import DialViT
from tokendial.show.tokens import input_pixels, token_maps


class LayerTokens(BaseModel):
    """The tokens that leave one layer."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    layer: int
    """The layer, counted from 1."""
    tokens: int
    """Number of tokens, class and register tokens included. For methods that only skip the FFN:
    the number of tokens that the FFN processed."""
    origin: list[int]
    """For each patch, row by row: index of the token that holds it. -1 if the patch was dropped, or
    skipped by the FFN."""


class TokenView(BaseModel):
    """Where the patches of one image went, layer by layer."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    degree: int
    """Degree of the dial."""
    rows: int
    """Number of rows of patches."""
    columns: int
    """Number of columns of patches."""
    width: int
    """Width of the image as the model sees it, in pixels."""
    height: int
    """Height of the image as the model sees it, in pixels."""
    layers: list[LayerTokens]
    """The layers, in order."""


def token_view(
    model: DialViT, image: Tensor, degree: int, *, adapter: str | None = None
) -> TokenView:
    """Follow the patches of one image through the layers.

    Afterwards the model has the same degree and adapter as before, also if this fails. Nothing
    else may run the model meanwhile.

    Args:
        model: A wrapped model of images.
        image: Normalised image, [3, H, W].
        degree: Degree of the dial.
        adapter: Name of the adapter to use; None: the active one.

    Raises:
        ValueError: If the model has no such degree or adapter.
    """
    degree_before, adapter_before = model.degree, model.active_adapter
    try:
        if adapter is not None:
            model.set_adapter(adapter)
        model.set_degree(degree)
        maps = token_maps(model, image.to(next(model.parameters()).device))
    finally:
        model.set_adapter(adapter_before)
        model.set_degree(degree_before)
    rows, columns = maps.origin[0].shape
    return TokenView(
        degree=degree,
        rows=rows,
        columns=columns,
        width=image.shape[2],
        height=image.shape[1],
        layers=[
            LayerTokens(layer=layer, tokens=tokens, origin=origin.flatten().tolist())
            for layer, (tokens, origin) in enumerate(
                zip(maps.num_tokens, maps.origin, strict=True), start=1
            )
        ],
    )


def model_input_png(model: DialViT, image: Tensor) -> str:
    """The image that the model sees, from its normalised input [3, H, W]: base64 of a PNG."""
    file = BytesIO()
    Image.fromarray(input_pixels(model, image)).save(file, format="PNG")
    return b64encode(file.getvalue()).decode()
