"""Predicted masks as images: grey levels for one class, a palette for several."""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tokendial.tasks import BinaryMasks, Segmentation
from tokendial.tasks.dense_prediction import best_class, resize_maps

_OVERLAY_COLOR, _OVERLAY_OPACITY = np.array([255, 40, 40], np.float32), 0.6
_BAND_ROWS = 256
_TAB20 = (
    "1f77b4 aec7e8 ff7f0e ffbb78 2ca02c 98df8a d62728 ff9896 9467bd c5b0d5 "
    "8c564b c49c94 e377c2 f7b6d2 7f7f7f c7c7c7 bcbd22 dbdb8d 17becf 9edae5"
)
"""The colours of matplotlib's map tab20. They stand here because servers run without matplotlib."""


def mask_image(
    task: BinaryMasks | Segmentation, logits: Tensor, size: tuple[int, int]
) -> Image.Image:
    """The predicted mask as an image.

    Args:
        task: The task that the logits belong to.
        logits: [K, h, w], one logit map per class.
        size: Height and width of the image to make.

    Returns:
        For binary masks, the probability of the class as grey level. For segmentation, the index of
        the most probable class, with a palette.
    """
    if isinstance(task, BinaryMasks):
        grey = resize_maps(logits.sigmoid().unsqueeze(0), size)[0, 0].mul_(255).round_()
        return Image.fromarray(grey.byte().cpu().numpy())
    return class_image(best_class(logits, size).cpu().numpy())


def class_image(indices: np.ndarray) -> Image.Image:
    """Class indices [H, W] uint8 as an image with a palette."""
    mask = Image.fromarray(indices)
    mask.putpalette(_palette().flatten().tolist())
    return mask


def legend_image(image: Image.Image, mask: Image.Image, names: Mapping[int, str]) -> Image.Image:
    """The image and its mask side by side, and the colour of each class beside them.

    Args:
        image: RGB.
        mask: An image of `class_image`, of the image's size.
        names: Names of the classes to list, by class index, in the order of the list.
    """
    line = max(14, image.height // 24)
    font = ImageFont.load_default(size=0.75 * line)
    gap = line // 2
    text_width = max((math.ceil(font.getlength(name)) for name in names.values()), default=0)
    width = 2 * image.width + 4 * gap + line + text_width
    sheet = Image.new("RGB", (width, max(image.height, gap + line * len(names))), "white")
    sheet.paste(image, (0, 0))
    sheet.paste(mask.convert("RGB"), (image.width + gap, 0))
    draw, left, palette = ImageDraw.Draw(sheet), 2 * image.width + 2 * gap, _palette()
    for row, (index, name) in enumerate(names.items()):
        top = gap // 2 + row * line
        box = (left, top, left + line - 4, top + line - 4)
        draw.rectangle(box, fill=tuple(palette[index].tolist()), outline="black")
        draw.text((left + line + gap, top), name, fill="black", font=font)
    return sheet


def mask_share(task: BinaryMasks | Segmentation, mask: Image.Image) -> float:
    """Fraction of the pixels inside a mask: probability above 1/2, or any class but the first."""
    threshold = 127 if isinstance(task, BinaryMasks) else 0
    return float((np.asarray(mask) > threshold).mean())


def overlay_mask(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with its mask drawn over it in colour.

    Args:
        image: RGB.
        mask: A mask of `mask_image`, of the image's size.
    """
    several_classes = mask.mode == "P"
    colors = _palette() if several_classes else np.broadcast_to(_OVERLAY_COLOR, (256, 3))
    levels = np.arange(256) > 0 if several_classes else np.arange(256) / 255
    opacity = (_OVERLAY_OPACITY * levels[:, None]).astype(np.float32)
    # Tables indexed by the value of the mask: the weight of the image, and the colour to add.
    image_weight, added_color = 1 - opacity, colors * opacity
    pixels, values = np.array(image), np.asarray(mask)
    # In bands of rows: a large photograph in float32 would take four times its memory.
    for top in range(0, len(pixels), _BAND_ROWS):
        band, band_values = pixels[top : top + _BAND_ROWS], values[top : top + _BAND_ROWS]
        band[:] = band * image_weight[band_values] + added_color[band_values]
    return Image.fromarray(pixels)


def _palette() -> np.ndarray:
    """256 colours [256, 3] uint8: the colours of tab20 in turn, but the first one is black."""
    colors = np.array([list(bytes.fromhex(color)) for color in _TAB20.split()], np.uint8)
    palette: np.ndarray = colors[np.arange(256) % len(colors)]
    palette[0] = 0
    return palette
