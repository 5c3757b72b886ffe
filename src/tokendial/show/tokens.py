"""Pictures of what the dial does to the tokens of one image."""

# Shape legend: P patches, H and W pixels.

import colorsys
from dataclasses import dataclass

import matplotlib.figure
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokendial.measure.diversity import attention_diversity
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run
from tokendial.show.plots import diversity_figure

_DIMMED = 0.2
"""Brightness that is left of a patch that was dropped or skipped."""
_TINT = 0.5
"""Weight of the colour over the mean of a merged token's patches."""
_BORDER = np.array([255, 255, 255], dtype=np.uint8)
_HUE_STEP = 0.618034
"""Golden ratio: hues of tokens with numbers that follow each other lie far apart."""


@dataclass(frozen=True, slots=True)
class TokenMaps:
    """Where the patches of one image went."""

    origin: tuple[np.ndarray, ...]
    """For each layer [rows, columns]: the token that holds each patch, -1 where it was dropped or
    the FFN skipped it."""
    num_tokens: tuple[int, ...]
    """Tokens (prefix included) that leave each layer, or that its FFN processed."""
    reduces: tuple[bool, ...]
    """For each layer, whether it merges, drops or skips tokens."""
    class_attention: np.ndarray | None
    """[rows, columns] attention of the class token in the last layer, a merged token's shared out
    among its patches; None without a class token."""


@torch.no_grad()
def token_maps(model: DialViT, image: Tensor) -> TokenMaps:
    """Follow the patches of one image through the model at its present degree.

    Args:
        model: A wrapped model.
        image: [3, H, W], normalised.
    """
    training = model.training
    model.eval()
    needs = frozenset({"class_attention"} if model.anatomy.shape.has_class_token else ())
    origins, counts, reduces, heat = [], [], [], None
    left = 0
    for step in model.steps(image.unsqueeze(0), track=True, needs=needs):
        tokens, entered = step.tokens, step.entered
        assert tokens.origin is not None
        assert entered is not None
        assert entered.origin is not None
        patches = tokens.grid[0] * tokens.grid[1]
        shown, count = tokens.origin[0, -patches:], tokens.x.shape[1]
        left = left or tokens.prefix + patches
        if tokens.selected is not None:
            processed = tokens.selected[0] > 0
            shown = shown.masked_fill(~processed[tokens.prefix :], -1)
            count = int(processed.sum())
        origins.append(shown.reshape(tokens.grid).cpu().numpy())
        counts.append(count)
        reduces.append(count < left)
        left = tokens.x.shape[1]
        if step.attended.class_attention is not None:
            attention = step.attended.class_attention[0].float()
            heat = _per_patch(attention, entered.origin[0, -patches:]).reshape(tokens.grid)
    model.train(training)
    class_attention = None if heat is None else heat.cpu().numpy()
    return TokenMaps(tuple(origins), tuple(counts), tuple(reduces), class_attention)


def _per_patch(attention_N: Tensor, held_P: Tensor) -> Tensor:
    """Share each token's attention evenly among the patches that it holds; dropped ones get 0."""
    kept = held_P >= 0
    patches = torch.bincount(held_P[kept], minlength=attention_N.numel())
    return (attention_N / patches.clamp(min=1))[held_P.clamp(min=0)] * kept


def seen_pixels(model: DialViT, image: Tensor) -> np.ndarray:
    """What a model sees, to look at: [H, W, 3] uint8 of an image [3, H, W] that is normalised."""
    mean, std = (torch.tensor(values)[:, None, None] for values in model.anatomy.statistics)
    pixels = (image.cpu() * std + mean) * 255
    seen: np.ndarray = pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return seen


def paint_tokens(pixels: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Show which patches share a token: a colour and a white outline for each merged token.

    A merged token's patches are filled with their mean, tinted in a colour of its own: on grey
    images, too, they differ from their neighbours. A patch that is a token by itself stays as it
    is, and dropped or skipped ones are dark.

    Args:
        pixels: [H, W, 3] uint8, H and W divisible by the rows and columns of `origin`.
        origin: [rows, columns] token of each patch; -1: dropped, or skipped by the FFN.

    Returns:
        [H, W, 3] uint8.
    """
    height, width = pixels.shape[0] // origin.shape[0], pixels.shape[1] // origin.shape[1]
    of_pixel = origin.repeat(height, axis=0).repeat(width, axis=1)
    painted = pixels.copy()
    merged = np.zeros(of_pixel.shape, dtype=bool)
    for token in np.unique(origin):
        inside = of_pixel == token
        if token < 0:
            painted[inside] = (pixels[inside] * _DIMMED).astype(np.uint8)
        elif inside.sum() > height * width:
            merged |= inside
            mean = pixels[inside].mean(axis=0)
            painted[inside] = ((1 - _TINT) * mean + _TINT * _colour(int(token))).astype(np.uint8)
    for axis in (0, 1):
        ahead = np.roll(of_pixel, -1, axis) != of_pixel
        outline = ahead & (merged | np.roll(merged, -1, axis))
        last: tuple[slice | int, ...] = (-1,) if axis == 0 else (slice(None), -1)
        outline[last] = False  # what is rolled in there is the other side of the image
        painted[outline] = _BORDER
    return painted


def _colour(token: int) -> np.ndarray:
    rgb = colorsys.hsv_to_rgb(token * _HUE_STEP % 1.0, 0.85, 1.0)
    return 255 * np.array(rgb)


def token_figure(
    model: DialViT, image: Tensor, pixels: np.ndarray, *, title: str = ""
) -> matplotlib.figure.Figure:
    """One row of panels: the image, its tokens after each layer that reduces, class attention.

    Args:
        model: A wrapped model, at the degree to show.
        image: [3, H, W], normalised.
        pixels: [H, W, 3] uint8, the same image to look at.
        title: Line above the panels.
    """
    maps = token_maps(model, image)
    # Enlarged so that the one-pixel borders stay thin beside small patches.
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
        # Where there is little attention the image shows through.
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
    """What the colours of the panels mean, as far as they occur."""
    merged = any(len(np.unique(o[o >= 0])) < (o >= 0).sum() for o in maps.origin)
    dark = any((o < 0).any() for o in maps.origin)
    parts = ["coloured: patches merged into one token"] * merged
    parts += ["dark: patches that were dropped or that the FFN skipped"] * dark
    return " \u00b7 ".join([*parts, "as in the image: a token of its own"])


def run_figure(
    run: Run, image: Image.Image, *, degree: int | None = None, title: str = ""
) -> matplotlib.figure.Figure:
    """The panels of `token_figure` for an image and the best model of a run.

    Args:
        run: A run with a model.
        image: An RGB image of any size.
        degree: Degree of the dial; None: the one that was trained.
        title: Line above the panels.
    """
    model, tensor = _model_and_image(run, image, degree)
    pixels = seen_pixels(model, tensor)
    return token_figure(model, tensor, pixels, title=f"{title}, degree {model.degree}")


def run_diversity_figure(
    run: Run, image: Image.Image, *, degree: int | None = None, title: str = ""
) -> matplotlib.figure.Figure:
    """Attention diversity by depth for an image, with the best model's reduction and without.

    Args:
        run: A run with a model.
        image: An RGB image of any size.
        degree: Degree of the dial; None: the one that was trained.
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
    model = run.model()
    if degree is not None:
        model.set_degree(degree)
    return model, run.task().image_transform(model.anatomy)(image)


def _layers_to_show(reduces: tuple[bool, ...], most: int = 5) -> list[int]:
    """Layers that reduce, thinned out evenly to `most`."""
    layers = [number + 1 for number, does in enumerate(reduces) if does]
    if len(layers) <= most:
        return layers
    picked = np.linspace(0, len(layers) - 1, most).round().astype(int)
    return [layers[i] for i in picked]
