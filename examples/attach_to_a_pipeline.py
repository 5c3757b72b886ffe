"""Make an image classifier of transformers faster, and call it through its pipeline as before.

facebookresearch/ToMe issue 2 asks for token merging in the ViTs of transformers, and PrunaAI/pruna
issue 399 and pull request 537 for one call that puts it into a model that is in use. `td.attach` is
that call: the pipeline, the model's class and its answers' form stay, and `detach` takes it out.

The classifier here has random weights, so its classes mean nothing. For yours:
`transformers.pipeline("image-classification", "google/vit-base-patch16-224")`.
"""

import argparse

import torch
import transformers
from PIL import Image

import tokendial as td
from tokendial.data import Scenes
from tokendial.measure import time_in_rounds


def load_pipeline() -> transformers.Pipeline:
    """Return a pipeline with a small ViT."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=10
    )
    return transformers.pipeline(
        "image-classification",
        model=transformers.ViTForImageClassification(config),
        image_processor=transformers.ViTImageProcessor(),
        device="cpu",
    )


def load_photos(count: int) -> list[Image.Image]:
    """Return photographs with small items on them."""
    photos = Scenes(task="present", val_size=count).build(seed=0).val
    return [photos[index][0] for index in range(count)]


def main() -> None:
    """Attach the dial, turn it, and detach it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8, help="number of images")
    arguments = parser.parse_args()

    pipe, photos = load_pipeline(), load_photos(arguments.images)
    before = pipe(photos)

    dial = td.attach(pipe.model, td.ToMe(r=8))
    degrees = [0, 4, 8, 13]
    timings = time_in_rounds(
        degrees, dial.set_degree, lambda _: pipe(photos), device=torch.device("cpu"), seconds=0.2
    )
    print("degree  GMACs  same class  speed")
    for degree, timing in zip(degrees, timings, strict=True):
        dial.set_degree(degree)
        answers = pipe(photos)
        same = sum(a[0]["label"] == b[0]["label"] for a, b in zip(answers, before, strict=True))
        speed = timings[0].seconds / timing.seconds
        share = same / len(photos)
        print(f"{degree:6}  {dial.cost().gmacs:5.2f}  {share:10.0%}  {speed:4.2f}x")

    dial.detach()
    print("detached: answers as before:", pipe(photos) == before)


if __name__ == "__main__":
    main()
