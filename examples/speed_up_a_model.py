"""Make a trained Vision Transformer faster, without training.

The program wraps the model with ToMe, which merges similar tokens, and turns the dial. It prints
one line per degree: multiply-accumulates per image, accuracy, and measured speed.

The shipped model says which of ten kinds of items are in an image. To use a timm model of yours,
change `load_vit` and the images.
"""

import argparse

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

import tokendial as td
from tokendial.data import Scenes
from tokendial.measure import time_in_rounds


def load_vit() -> nn.Module:
    """Return the trained model: here the shipped one; use timm.create_model(...) for yours."""
    return td.Backbone(name="scenes_vit", weights="shipped").create()


def load_images(model: td.DialViT, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W], normalised as the model expects, and their labels [N, 10]."""
    config = model.pretrained_cfg
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )
    validation = Scenes(task="present", val_size=count).build(seed=0).val
    pairs = [validation[index] for index in range(count)]
    images = torch.stack([prepare(image) for image, _ in pairs])
    return images, torch.stack([torch.as_tensor(label) for _, label in pairs])


def main() -> None:
    """Wrap the model, turn the dial, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="number of images")
    arguments = parser.parse_args()

    model = td.wrap(load_vit(), reduce=td.ToMe(r=8)).eval()
    images, labels = load_images(model, arguments.images)
    batch, degrees = images[:32], [0, 2, 4, 8]
    with torch.no_grad():
        timings = time_in_rounds(
            degrees, model.set_degree, lambda _: model(batch), device=batch.device, seconds=0.2
        )
        print("degree  MMACs  accuracy  speed")
        for degree, timing in zip(degrees, timings, strict=True):
            model.set_degree(degree)
            right = ((model(images) > 0) == (labels > 0)).float().mean()
            mmacs = 1000 * model.cost().gmacs
            speed = timings[0].seconds / timing.seconds
            print(f"{degree:6}  {mmacs:5.0f}  {right:8.1%}  {speed:4.2f}x")


if __name__ == "__main__":
    main()
