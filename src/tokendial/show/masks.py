"""Pictures of dense tasks: an image, what is right, and what a model found at some degrees."""

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
import torch
from PIL import Image

from tokendial.runs.run import Run
from tokendial.tasks.dense import resize_map


@torch.no_grad()
def run_mask_figure(
    run: Run, image: Image.Image, mask: np.ndarray, degrees: Sequence[int]
) -> matplotlib.figure.Figure:
    """One row of panels: the image, its mask, and the probabilities found at each degree.

    Args:
        run: A run on binary masks, with a model.
        image: An RGB image of any size.
        mask: [H, W] uint8 of 0 and 1.
        degrees: Degrees of the dial.
    """
    model, task = run.model(), run.task()
    seen = task.image_transform(model.anatomy)(image).unsqueeze(0)
    panels: list[tuple[str, np.ndarray]] = [("image", np.asarray(image)), ("mask", mask)]
    for degree in degrees:
        model.set_degree(degree)
        found = resize_map(task.predict(model, seen).sigmoid(), mask.shape)[0, 0]
        panels.append((f"degree {degree}", found.numpy()))
    figure = matplotlib.figure.Figure(figsize=(2.1 * len(panels), 2.4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (name, panel) in zip(axes, panels, strict=True):
        axis.imshow(panel, cmap="gray", vmin=0, vmax=1 if panel.ndim == 2 else 255)
        axis.set_title(name, fontsize=8)
        axis.set_axis_off()
    return figure
