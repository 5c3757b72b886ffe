"""Find how many tokens each layer should merge, for a compute budget.

`td.fit` needs images, but no labels and no training. Here the budgets are multiply-accumulates,
which are counted; `speedup=(1.5, 2)` or `latency_ms=40` would measure time on this machine. The
program prints the schedule for each budget, and how often it gives the same answers as the
unreduced model, beside the best constant schedule of the same cost.
"""

import torch
from torchvision.transforms import v2

import tokendial as td
from tokendial.data import Scenes


def main() -> None:
    """Fit two budgets and wrap the model with the result."""
    vit = td.Backbone(name="scenes_vit", weights="shipped").create()
    model = td.wrap(vit).eval()
    config = model.pretrained_cfg
    prepare = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )
    scenes = Scenes(task="present", train_size=32).build(seed=0).train
    images = torch.stack([prepare(scenes[index][0]) for index in range(32)])

    whole = model.cost().gmacs
    result = td.fit(model, images, gmacs=(0.7 * whole, 0.5 * whole), multi_label=True, minutes=0.1)
    for degree in result.degrees:
        print(f"degree {degree.degree}: at most {1000 * degree.budget:.0f} MMACs")
        print(f"  merged per layer {list(degree.found.removed)}")
        print(f"  same answers     {degree.found.top1:.1%}")
        if degree.constant:
            print(f"  constant r       {degree.constant.top1:.1%}")

    model = td.wrap(vit, reduce=result.reduce)  # a method like any other
    model.set_degree(2)
    print(f"wrapped: degree {model.degree} of {list(model.degrees)}")


if __name__ == "__main__":
    main()
