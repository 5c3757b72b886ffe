"""Predict masks: DAR on a small model, in your own loop.

Attention sees every token, and each FFN processes about half of them. A decoder replaces the head
and gives one logit map. The model learns to outline the items in a scene. The program prints the
loss, and at two degrees the share of tokens that the FFNs processed and the overlap (IoU) with the
true masks.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

import tokendial as td
from tokendial.data import SceneMasks
from tokendial.measure import ShareMeter

SIDE = 72


def load_images(model: td.DialViT, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and masks [N, H, W] of 0 and 1."""
    config = model.pretrained_cfg
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )
    splits = SceneMasks(train_size=count, val_size=count, img_size=SIDE).build(seed=0)
    pairs = [getattr(splits, part)[index] for index in range(count)]
    images = torch.stack([prepare(image) for image, _ in pairs])
    return images, torch.stack([torch.as_tensor(mask) for _, mask in pairs]).float()


def logits_of(model: td.DialViT, images: Tensor) -> Tensor:
    """Logits [N, H, W] at the images' resolution."""
    return F.interpolate(model(images), images.shape[-2:], mode="bilinear").squeeze(1)


def main() -> None:
    """Train, calibrate the dial, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="updates")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    shape = {"img_size": SIDE, "num_classes": 0}
    vit = td.Backbone(name="scenes_vit", weights="shipped", args=shape).create()
    model = td.wrap(
        vit,
        reduce=td.DAR(target_ratio=0.5),
        adapt=td.DARAdapter(dims=(24, 16)),
        decode=td.DARDecoder(channels=32),
    )
    images, masks = load_images(model, "train", 96)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.003)
    model.train()
    for step in range(arguments.steps):
        batch = torch.randint(len(images), (8,))
        loss = F.binary_cross_entropy_with_logits(logits_of(model, images[batch]), masks[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    td.calibrate(model, [images[:32]])  # finds a threshold for every degree of the dial
    images, masks = load_images(model, "val", 24)
    with torch.no_grad():
        for degree in (0, model.degree):
            model.set_degree(degree)
            if degree:
                with ShareMeter(model) as meter:
                    found = logits_of(model, images) > 0
                share = meter.share
            else:
                found, share = logits_of(model, images) > 0, 1.0
            inside = masks > 0
            iou = (found & inside).sum() / (found | inside).sum()
            print(f"degree {degree}: {share:.0%} of the tokens in FFNs, IoU {iou:.1%}")


if __name__ == "__main__":
    main()
