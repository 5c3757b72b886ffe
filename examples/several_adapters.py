"""Two tasks on one backbone, which is in memory once.

Each adapter has a name and a head of its own. Switching exchanges layers, takes almost no time, and
leaves no rounding errors. The program prints the parameters of the backbone and of each adapter,
and the shape of the logits of each task.
"""

import torch

import tokendial as td


@torch.no_grad()
def main() -> None:
    """Add two adapters and switch between them."""
    vit = td.Backbone(name="scenes_vit", weights="shipped").create()
    model = td.wrap(vit, reduce=td.ToMe(r=4)).eval()
    print(f"backbone: {model.cost().params:,} parameters")

    model.add_adapter("pets", td.AdaptFormer(dim=16), num_classes=37)
    model.add_adapter("cars", td.LoRA(rank=4), num_classes=196)
    images = torch.randn(2, 3, 48, 48)
    for name in ("pets", "cars", "pets"):
        model.set_adapter(name)  # its layers and its head are active now
        trained = model.cost().trainable_params
        print(f"{name}: {trained:,} trained parameters, logits {list(model(images).shape)}")

    model.set_adapter("default")  # the backbone as it was
    print(f"default: logits {list(model(images).shape)}")


if __name__ == "__main__":
    main()
