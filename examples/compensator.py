"""Restore accuracy at high degrees with a compensator (ToCom).

A model that was trained at one degree loses accuracy at others. A compensator is trained once for a
backbone, without labels, and works for every model that is fine-tuned from it. This example
attaches the shipped compensator to the shipped model, which was trained at degree 0. It prints the
accuracy at some degrees, without and with the compensator.
"""

import argparse
from importlib.resources import as_file, files

import torch
from torch import Tensor
from torchvision.transforms import v2

import tokendial as td
from tokendial.data import Scenes


def load_images(model: td.DialViT, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and which of ten kinds of items are on them [N, 10]."""
    config = model.pretrained_cfg
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )
    scenes = Scenes(task="present", val_size=count).build(seed=0).val
    pairs = [scenes[index] for index in range(count)]
    images = torch.stack([prepare(image) for image, _ in pairs])
    return images, torch.stack([torch.as_tensor(label) for _, label in pairs])


@torch.no_grad()
def accuracy(model: td.DialViT, images: Tensor, labels: Tensor, degree: int) -> float:
    """Share of right answers at a degree."""
    model.set_degree(degree)
    return float(((model(images) > 0) == (labels > 0)).float().mean())


def main() -> None:
    """Compare a few degrees without and with the compensator."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="number of images")
    arguments = parser.parse_args()

    vit = td.Backbone(name="scenes_vit", weights="shipped").create()
    model = td.wrap(vit, reduce=td.EViT(keep_rate=0.7, layers=(4, 7, 10))).eval()
    images, labels = load_images(model, arguments.images)
    degrees = (0, 3, 6, 9)
    plain = [accuracy(model, images, labels, degree) for degree in degrees]

    with as_file(files("tokendial") / "assets" / "scenes_tocom") as folder:
        compensator = td.Compensator.from_pretrained(folder)
    model.set_degree(0)
    compensator.attach(model, source=0)  # the degree that the model was trained at
    bridged = [accuracy(model, images, labels, degree) for degree in degrees]

    print("degree  plain  compensated")
    for row in zip(degrees, plain, bridged, strict=True):
        print("{:6}  {:5.1%}  {:11.1%}".format(*row))
    compensator.detach(model)  # the model's own weights again, to the bit


if __name__ == "__main__":
    main()
