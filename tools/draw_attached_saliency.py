"""Draw what an attached dial changes: saliency maps of a real model along the dial.

    tokendial weights convert vit_s_focus.onnx --recipe real/focus --out runs/focus ...
    python tools/draw_attached_saliency.py runs/focus PHOTO... --out docs/img/attach.png

The model is an ordinary module that holds a timm ViT and a decoder, and knows nothing of the dial.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import tokendial as td
from tokendial.atomic import atomic_write
from tokendial.runs import Run
from tokendial.tokens import to_grid

DEGREES = (0, 9, 15, 21)


class Saliency(nn.Module):
    """A ViT and a decoder, put together as anyone might do."""

    def __init__(self, vit: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.vit, self.decoder = vit, decoder

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities [B, 1, h, w] that a pixel belongs to what stands out."""
        patches = self.vit.forward_features(images)[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        probabilities: Tensor = self.decoder(to_grid(patches, (side, side))).sigmoid()
        return probabilities


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture; see the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the run with the saliency model")
    parser.add_argument("photos", type=Path, nargs="+", help="photographs")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args(arguments)
    run = Run(args.run)
    wrapped, task = td.load(run.best), run.task()
    transform = task.image_transform(wrapped.anatomy)
    decoder = wrapped.decoder
    wrapped.release_backbone()
    model = Saliency(wrapped.vit, decoder).eval()
    photos = [Image.open(path).convert("RGB") for path in args.photos]
    squares = [_middle(photo) for photo in photos]
    images = torch.stack([transform(square) for square in squares])
    with torch.inference_mode(), td.attach(model, td.ToMe(r=0)) as dial:
        maps, titles = [], []
        for degree in DEGREES:
            dial.set_degree(degree)
            maps.append(model(images)[:, 0])
            share = dial.cost_of_call(images[:1]) / dial.cost_of_call(images[:1], degree=0)
            titles.append("untouched" if degree == 0 else f"{share:.0%} of the compute")
    figure = draw(squares, maps, titles)
    with atomic_write(args.out) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def draw(squares: Sequence[Image.Image], maps: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """One row for each photograph, one column for each degree.

    Args:
        squares: The photographs.
        maps: For each degree the maps [photographs, h, w].
        titles: For each degree the title of its column.
    """
    rows, columns = len(squares), 1 + len(maps)
    figure = Figure(figsize=(2.1 * columns, 2.1 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, square in enumerate(squares):
        axes[row, 0].imshow(square)
        for column, of_degree in enumerate(maps, start=1):
            axes[row, column].imshow(of_degree[row], cmap="gray", vmin=0, vmax=1)
    for axis, title in zip(axes[0], ["photograph", *titles], strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure


def _middle(photo: Image.Image) -> Image.Image:
    """The square in the middle of a photograph."""
    side = min(photo.size)
    left, top = ((length - side) // 2 for length in photo.size)
    return photo.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    main()
