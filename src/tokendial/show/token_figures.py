"""Figures of the tokens of one image: merged, dropped or skipped at each layer."""

import matplotlib.figure
import numpy as np
from PIL import Image
from torch import Tensor

from tokendial.measure.diversity import attention_diversity
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run
from tokendial.show.plots import diversity_figure
from tokendial.show.tokens import TokenMaps, input_pixels, paint_tokens, token_maps


def token_figure(
    model: DialViT, image: Tensor, pixels: np.ndarray, *, title: str = ""
) -> matplotlib.figure.Figure:
    """Draw a row of panels: the image, its tokens after each reducing layer, class attention.

    Args:
        model: A wrapped model, at the degree to show.
        image: [3, H, W], normalised.
        pixels: [H, W, 3] uint8: the same image, not normalised.
        title: Line above the panels.
    """
    maps = token_maps(model, image)
    # Small images are enlarged, so that outlines of one pixel are thin beside their patches.
    enlarge = max(1, 448 // max(pixels.shape[:2]))
    large = pixels.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    panels = [("what the model sees", large)]
    for layer in _layers_to_show(maps.reduces):
        count = maps.num_tokens[layer - 1]
        panels.append(
            (f"layer {layer}: {count} tokens", paint_tokens(large, maps.origin[layer - 1]))
        )
    columns = len(panels) + (maps.class_attention is not None)
    figure = matplotlib.figure.Figure(figsize=(2.4 * columns, 3.1), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis, (name, panel) in zip(axes, panels, strict=False):
        axis.imshow(panel)
        axis.set_title(name, fontsize=9)
    if maps.class_attention is not None:
        axes[-1].imshow(large.mean(axis=2), cmap="gray", vmin=0, vmax=255)
        extent = (0, large.shape[1], large.shape[0], 0)
        strong = maps.class_attention / max(maps.class_attention.max(), 1e-9)
        # Less attention is drawn with less opacity, so that the image shows through.
        axes[-1].imshow(
            strong,
            alpha=0.25 + 0.6 * strong,
            cmap="inferno",
            extent=extent,
            interpolation="bicubic",
        )
        axes[-1].set_title("class attention, last layer", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    figure.supxlabel(_legend(maps), fontsize=8, color="#4a5568")
    return figure


def _legend(maps: TokenMaps) -> str:
    """The meaning of the colours that occur in the panels."""
    merged = any(len(np.unique(o[o >= 0])) < (o >= 0).sum() for o in maps.origin)
    dark = any((o < 0).any() for o in maps.origin)
    parts = ["coloured: patches merged into one token"] * merged
    parts += ["dark: patches that were dropped or that the FFN skipped"] * dark
    return " \u00b7 ".join([*parts, "unchanged: a patch that is one token"])


def run_figure(
    run: Run, image: Image.Image, *, degree: int | None = None, title: str = ""
) -> matplotlib.figure.Figure:
    """Draw `token_figure` for an image and the best model of a run.

    Args:
        run: A run with a model.
        image: An RGB image of any size.
        degree: Degree of the dial. None means the degree that the model was trained at.
        title: Start of the line above the panels; the degree follows.
    """
    model, tensor = _model_and_image(run, image, degree)
    pixels = input_pixels(model, tensor)
    return token_figure(model, tensor, pixels, title=f"{title}, degree {model.degree}")


def run_diversity_figure(
    run: Run, image: Image.Image, *, degree: int | None = None, title: str = ""
) -> matplotlib.figure.Figure:
    """Plot attention diversity by layer for an image, with and without the model's reduction.

    Args:
        run: A run with a model.
        image: An RGB image of any size.
        degree: Degree of the dial. None means the degree that the model was trained at.
        title: Line above the plots.
    """
    model, tensor = _model_and_image(run, image, degree)
    curves = {}
    for at in sorted({0, model.degree}):
        model.set_degree(at)
        name = f"degree {at}" if at else "no reduction"
        curves[name] = attention_diversity(model, tensor.unsqueeze(0))
    return diversity_figure(curves, title=title)


def _model_and_image(run: Run, image: Image.Image, degree: int | None) -> tuple[DialViT, Tensor]:
    """The model at the degree, and the image as the model takes it: [3, H, W]."""
    model = run.model()
    if degree is not None:
        model.set_degree(degree)
    return model, run.task().image_transform(model.anatomy)(image)


def _layers_to_show(reduces: tuple[bool, ...], most: int = 5) -> list[int]:
    """Numbers of at most `most` layers that reduce tokens, evenly spread, counted from 1."""
    layers = [number + 1 for number, does in enumerate(reduces) if does]
    if len(layers) <= most:
        return layers
    picked = np.linspace(0, len(layers) - 1, most).round().astype(int)
    return [layers[i] for i in picked]
