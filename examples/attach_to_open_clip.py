"""Encode images with open_clip in less time.

mlfoundations/open_clip issue 981 needs embeddings of people fast enough to recognise them again in
a live video. facebookresearch/ToMe issue 36 asks how tokens can be merged in CLIP's image encoder,
whose attention is torch.nn.MultiheadAttention. `td.attach` does it in place: `encode_image` and
`encode_text` are called as before. Most embeddings keep their nearest neighbour while the encoder
computes less; how many do, you measure on your own images, as here.

The model here is small and has random weights. For a trained one, also OpenAI's:
`open_clip.create_model("ViT-B-16", pretrained="openai")`.
"""

import argparse

import open_clip
import torch
from torch import Tensor
from torchvision.transforms import v2

import tokendial as td
from tokendial.data import Scenes
from tokendial.measure import time_in_rounds


def load_clip() -> open_clip.CLIP:
    """Return a small CLIP model."""
    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=128,
        vision_cfg={"image_size": 224, "patch_size": 16, "width": 192, "layers": 12},
        text_cfg={"width": 64, "heads": 2, "layers": 2},
    ).eval()


def load_images(count: int) -> Tensor:
    """Return images [N, 3, H, W], normalised as CLIP expects."""
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((224, 224)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    photos = Scenes(task="present", val_size=count).build(seed=0).val
    return torch.stack([prepare(photos[index][0]) for index in range(count)])


def nearest(embeddings: Tensor) -> Tensor:
    """The nearest other image of each one."""
    cosines = embeddings @ embeddings.T
    return cosines.fill_diagonal_(-1).argmax(dim=1)


def main() -> None:
    """Attach the dial and compare embeddings and times along it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32, help="number of images")
    arguments = parser.parse_args()

    clip, images = load_clip(), load_images(arguments.images)
    dial = td.attach(clip, td.ToMe(r=8))
    degrees, batch = [0, 4, 8, 13], images[:8]
    with torch.no_grad():
        timings = time_in_rounds(
            degrees,
            dial.set_degree,
            lambda _: clip.encode_image(batch),
            device=batch.device,
            seconds=0.2,
        )
        dial.set_degree(0)
        whole = clip.encode_image(images, normalize=True)
        print("degree  GMACs  cosine  same neighbour  speed")
        for degree, timing in zip(degrees, timings, strict=True):
            dial.set_degree(degree)
            found = clip.encode_image(images, normalize=True)
            cosine = (found * whole).sum(dim=1).mean()
            same = (nearest(found) == nearest(whole)).float().mean()
            speed = timings[0].seconds / timing.seconds
            gmacs = dial.cost().gmacs
            print(f"{degree:6}  {gmacs:5.2f}  {cosine:6.3f}  {same:14.0%}  {speed:4.2f}x")


if __name__ == "__main__":
    main()
