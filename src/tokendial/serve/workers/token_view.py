"""Which tokens of one image were merged, kept or dropped at each depth, as plain data."""

from base64 import b64encode
from io import BytesIO

from PIL import Image
from torch import Tensor

from tokendial.model.dial_vit import DialViT
from tokendial.serve.http.schemas import Answer
from tokendial.show.tokens import seen_pixels, token_maps


class LayerTokens(Answer):
    """The tokens that leave one layer."""

    layer: int
    """The layer, counted from 1."""
    tokens: int
    """How many (prefix included), or how many its FFN processed."""
    origin: list[int]
    """For each patch, row by row: the token that holds it; -1: dropped, or skipped by the FFN."""


class TokenView(Answer):
    """Where the patches of one image went."""

    degree: int
    """The degree of the dial."""
    rows: int
    """Rows of patches."""
    columns: int
    """Columns of patches."""
    width: int
    """Pixels of what the model sees."""
    height: int
    """Pixels of what the model sees."""
    layers: list[LayerTokens]
    """Every layer, the first one first."""


def token_view(
    model: DialViT, image: Tensor, degree: int, *, adapter: str | None = None
) -> TokenView:
    """Follow the patches of one image through the layers.

    The model is left at the degree and with the adapter that it had. Nothing else may run it
    meanwhile.

    Args:
        model: A wrapped model of images.
        image: [3, H, W], normalised.
        degree: Degree of the dial.
        adapter: Name of the adapter that acts; None: the present one.

    Raises:
        ValueError: If the model has no such degree or adapter.
    """
    before = model.degree, model.active_adapter
    try:
        if adapter is not None:
            model.set_adapter(adapter)
        model.set_degree(degree)
        maps = token_maps(model, image.to(next(model.parameters()).device))
    finally:
        model.set_adapter(before[1])
        model.set_degree(before[0])
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


def seen_image(model: DialViT, image: Tensor) -> str:
    """What the model sees of an image [3, H, W] that is normalised: a PNG in base64."""
    file = BytesIO()
    Image.fromarray(seen_pixels(model, image)).save(file, format="PNG")
    return b64encode(file.getvalue()).decode()
