"""Figures of mask tasks: an image, its true mask, and the masks predicted at some degrees."""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
import torch
from PIL import Image

from tokendial.runs.run import Run
from tokendial.tasks.dense_prediction import resize_maps


@torch.no_grad()
def run_mask_figure(
    run: Run, image: Image.Image, mask: np.ndarray, degrees: Sequence[int]
) -> matplotlib.figure.Figure:
    """Draw a row of panels: the image, its true mask, and the probabilities at each degree.

    Args:
        run: A run on binary masks, with a model.
        image: An RGB image of any size.
        mask: The true mask: [H, W] uint8 of 0 and 1.
        degrees: Degrees of the dial to show.
    """
    model, task = run.model(), run.task()
    pixels_1CHW = task.image_transform(model.anatomy)(image).unsqueeze(0)
    panels: list[tuple[str, np.ndarray]] = [("image", np.asarray(image)), ("mask", mask)]
    for degree in degrees:
        model.set_degree(degree)
        probabilities = task.predict(model, pixels_1CHW).sigmoid()
        resized = resize_maps(probabilities, mask.shape)[0, 0]
        panels.append((f"degree {degree}", resized.numpy()))
    figure = matplotlib.figure.Figure(figsize=(2.1 * len(panels), 2.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (name, panel) in zip(axes, panels, strict=True):
        axis.imshow(panel, cmap="gray", vmin=0, vmax=1 if panel.ndim == 2 else 255)
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    return figure
