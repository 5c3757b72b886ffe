"""Fine-tune in your own PyTorch loop.

A wrapped model is an ordinary nn.Module: the optimizer gets its trainable parameters, and the loss
is yours. This is Sparse-Tuning: EViT removes tokens, Dense Adapters are trained, and the backbone
is frozen. The program prints the number of trained parameters, the loss, and the accuracy at some
degrees. Then it saves the adapters and the head, and loads them again.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

import tokendial as td
from tokendial.data import Scenes


def load_images(model: td.DialViT, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and the number of sneakers on each [N], 0 to 4."""
    config = model.pretrained_cfg
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )
    splits = Scenes(task="count", train_size=count, val_size=count).build(seed=0)
    pairs = [getattr(splits, part)[index] for index in range(count)]
    images = torch.stack([prepare(image) for image, _ in pairs])
    return images, torch.tensor([label for _, label in pairs])


def main() -> None:
    """Train, turn the dial, save and load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="updates")
    parser.add_argument("--out", type=Path, default=Path("example_model"), help="saved model")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    # A timm model knows its name. For other weights, `backbone` tells td.load how to find them.
    backbone = td.Backbone(name="scenes_vit", weights="shipped", args={"num_classes": 5})
    model = td.wrap(
        backbone.create(),
        reduce=td.EViT(keep_rate=0.7, layers=(4, 7, 10)),
        adapt=td.DenseAdapter(dim=16),
        backbone=backbone,
    )
    cost = model.cost()
    print(f"trains {cost.trainable_params:,} of {cost.params:,} parameters (and the head)")

    images, labels = load_images(model, "train", 320)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.003)
    model.train()
    for step in range(arguments.steps):
        batch = torch.randint(len(images), (32,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    images, labels = load_images(model, "val", 100)
    with torch.no_grad():
        for degree in (0, 3, 6):
            model.set_degree(degree)
            accuracy = (model(images).argmax(dim=1) == labels).float().mean()
            print(
                f"degree {degree}: accuracy {accuracy:.1%}, {1000 * model.cost().gmacs:.0f} MMACs"
            )

        model.save_pretrained(arguments.out)
        loaded = td.load(arguments.out)
        print("loaded:", torch.equal(loaded(images[:4]), model(images[:4])))


if __name__ == "__main__":
    main()
