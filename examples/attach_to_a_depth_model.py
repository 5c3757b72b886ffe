"""Estimate depth in less time with Depth Anything.

LiheYoung/Depth-Anything issue 128 finds depth maps too slow on a laptop.
Four fifths of the model are its ViT (DINOv2), so the dial makes all of it faster. Depth maps
keep their size; the program prints by how much they differ from those of the whole model.

The model here is small and has random weights. For a trained one:
`transformers.pipeline("depth-estimation", "depth-anything/Depth-Anything-V2-Small-hf")`.
"""

import argparse

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import tokendial as td
from tokendial.data import Scenes
from tokendial.measure import time_in_rounds

SIDE = 252


def load_pipeline() -> transformers.Pipeline:
    """Return a pipeline with a small Depth Anything."""
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=192,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=14,
        out_indices=[3, 6, 9, 12],
        reshape_hidden_states=False,
        initializer_range=0.1,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=192,
        neck_hidden_sizes=[24, 48, 96, 192],
        fusion_hidden_size=32,
        head_hidden_size=16,
    )
    model = transformers.DepthAnythingForDepthEstimation(config)
    # Random weights: larger ones, so that depths differ, and none is below the last ReLU's 0.
    convolutions = [part for part in model.head.modules() if isinstance(part, nn.Conv2d)]
    with torch.no_grad():
        for convolution in convolutions:
            convolution.weight *= 10
        model.head.conv3.bias += 10
    processor = transformers.DPTImageProcessor(size={"height": SIDE, "width": SIDE})
    return transformers.pipeline(
        "depth-estimation", model=model, image_processor=processor, device="cpu"
    )


def load_photos(count: int) -> list[Image.Image]:
    """Return photographs with small items on them."""
    photos = Scenes(task="present", val_size=count).build(seed=0).val
    return [photos[index][0] for index in range(count)]


def depths(pipe: transformers.Pipeline, photos: list[Image.Image]) -> Tensor:
    """Depth maps [N, H, W]."""
    return torch.stack([pipe(photo)["predicted_depth"] for photo in photos])


def main() -> None:
    """Attach the dial and compare depth maps and times along it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4, help="number of images")
    arguments = parser.parse_args()

    pipe, photos = load_pipeline(), load_photos(arguments.images)
    dial = td.attach(pipe.model, td.ToMe(r=8))
    image = torch.zeros(1, 3, SIDE, SIDE)
    all_macs = dial.cost_of_call(image, degree=0)
    print(f"the ViT is {dial.cost(0).macs / all_macs:.0%} of the model")

    degrees = [0, 8, 16, 24]
    timings = time_in_rounds(
        degrees, dial.set_degree, lambda _: pipe(photos[0]), device=torch.device("cpu"), seconds=0.3
    )
    dial.set_degree(0)
    whole = depths(pipe, photos)
    print("degree  promised  speed  relative error")
    for degree, timing in zip(degrees, timings, strict=True):
        dial.set_degree(degree)
        error = ((depths(pipe, photos) - whole).abs() / whole.abs().clamp(min=1e-6)).mean()
        promised = all_macs / dial.cost_of_call(image)
        speed = timings[0].seconds / timing.seconds
        print(f"{degree:6}  {promised:7.2f}x  {speed:4.2f}x  {error:14.2%}")


if __name__ == "__main__":
    main()
