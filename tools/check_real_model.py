"""Compare the run of a converted saliency model with its ONNX file in onnxruntime, on photographs.

    python tools/check_real_model.py vit_s_focus.onnx PHOTO_OR_FOLDER... --sizes 224 280x196

Prints the largest difference of the probabilities for each photograph and size. The exit code is
1 if one is above 1e-4. A photograph is prepared as the file's author does it: it is resized to fit
into the input, what is left of the input is black, and ImageNet's mean and deviation normalise it.

--degrees also shows how the masks change along the dial: how far those at each degree overlap with
those at degree 0 (intersection over union of the pixels above 1/2, mean over the photographs).
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession
from PIL import Image
from torch import Tensor

from tokendial import DialViT
from tokendial.data.transforms.masks import InputFormat
from tokendial.runs import read_recipe
from tokendial.runs.released import released_run

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff")
LIMIT = 1e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; see the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="the ONNX file")
    parser.add_argument("photos", type=Path, nargs="+", help="photographs, or folders of them")
    parser.add_argument("--sizes", nargs="+", default=["224"], help="224, or HEIGHTxWIDTH")
    parser.add_argument("--degrees", type=int, nargs="+", default=[], help="such as 3 9 15")
    parser.add_argument("--recipe", default="real/focus", help="recipe of the run")
    args = parser.parse_args(arguments)
    photos = list(find_photos(args.photos))
    if not photos:
        parser.error("no photographs found")
    worst = 0.0
    for text in args.sizes:
        sides = [int(side) for side in text.split("x")]
        size = sides[0], sides[-1]
        model, session = convert(args.file, args.recipe, size), open_session(args.file)
        differences = []
        for photo in photos:
            images = prepare(photo, size)
            difference = (mask(model, images) - run(session, images)).abs()
            differences.append(float(difference.max()))
            print(f"{text}  {photo.name}: largest {differences[-1]:.1e}", flush=True)
        worst = max(worst, *differences)
        print(f"{text}: largest difference on {len(photos)} photographs {max(differences):.1e}")
        for degree in args.degrees:
            overlap = np.mean([overlap_at(model, prepare(photo, size), degree) for photo in photos])
            share = model.cost(degree).macs / model.cost(0).macs
            print(f"{text}: degree {degree}, {share:.0%} of the cost, overlap {overlap:.3f}")
    print(f"largest difference of all {worst:.1e}: {'equal' if worst <= LIMIT else 'NOT equal'}")
    return int(worst > LIMIT)


def find_photos(places: Sequence[Path]) -> Iterator[Path]:
    """The image files among some paths, and those in folders."""
    for place in places:
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
        yield from (path for path in inside if path.suffix.lower() in SUFFIXES)


def convert(file: Path, recipe: str, size: tuple[int, int]) -> DialViT:
    """The model at degree 0 that a user gets: from the run that the command line makes."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output={folder}/run", f"model.img_size=[{size[0]},{size[1]}]"]
        model = released_run(file, read_recipe(recipe, overrides)).model()
    model.set_degree(0)
    return model


def open_session(file: Path) -> InferenceSession:
    """The file in onnxruntime. Its input may state one size only; the graph takes others."""
    content = onnx.load(file)
    for axis, name in ((2, "height"), (3, "width")):
        content.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])


def prepare(photo: Path, size: tuple[int, int]) -> Tensor:
    """A photograph as input [1, 3, H, W]."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    factor = min(size[0] / image.height, size[1] / image.width)
    inside = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    canvas = Image.new("RGB", size[::-1])
    place = (size[1] - inside[0]) // 2, (size[0] - inside[1]) // 2
    canvas.paste(image.resize(inside, Image.Resampling.BOX), place)
    return InputFormat(size, MEAN, STD).normalise(canvas)[None]


@torch.no_grad()
def mask(model: DialViT, images: Tensor) -> Tensor:
    """Probabilities [1, 1, H, W] of the converted model."""
    return F.interpolate(model(images), images.shape[-2:], mode="bilinear").sigmoid()


def run(session: InferenceSession, images: Tensor) -> Tensor:
    """Probabilities [1, 1, H, W] of the file."""
    (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(output)


def overlap_at(model: DialViT, images: Tensor, degree: int) -> float:
    """Intersection over union of the masks at a degree and at degree 0; 1 if both are empty."""
    whole = mask(model, images) > 0.5
    model.set_degree(degree)
    reduced = mask(model, images) > 0.5
    model.set_degree(0)
    union = int((whole | reduced).sum())
    return int((whole & reduced).sum()) / union if union else 1.0


if __name__ == "__main__":
    sys.exit(main())
