"""Runs that can be served: small untrained models whose adapters differ from zero."""

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import tokendial as td
from tokendial.runs import Run
from tokendial.runs.recipe import check_recipe

BACKBONE = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
MODEL = {"name": "vit_tiny_patch16_224", "weights": None, "img_size": 32, "args": BACKBONE}


def backbone(num_classes: int) -> nn.Module:
    """Create the backbone; it has the same weights for any number of classes."""
    torch.manual_seed(0)
    vit = timm.create_model(MODEL["name"], img_size=32, num_classes=0, **BACKBONE)
    vit.reset_classifier(num_classes)
    return vit


def described(num_classes: int) -> td.Backbone:
    args = BACKBONE | {"img_size": 32, "num_classes": num_classes}
    return td.Backbone(name=MODEL["name"], weights=None, args=args)


def write_run(folder, classes, *, seed=1, degree=2, value_range=None) -> Run:
    """Write a run with a classifier: the shared backbone and an adapter."""
    model = td.wrap(
        backbone(num_classes=len(classes)),
        reduce=td.ToMe(r=4),
        adapt=td.AdaptFormer(dim=4),
        backbone=described(num_classes=len(classes)),
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    model.set_degree(degree)
    recipe = {
        "output": str(folder),
        "model": MODEL,
        "reduce": {"name": "tome", "r": 4},
        "adapt": {"name": "adaptformer", "dim": 4},
        "data": {"name": "image_folder", "root": ".", "range": value_range},
    }
    run = Run(folder)
    run.claim(check_recipe(recipe), classes)
    model.save_pretrained(run.best)
    return run


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)
    ]


@torch.no_grad()
def alone(run: Run, image: Image.Image, degree: int) -> torch.Tensor:
    model = run.model()
    model.set_degree(degree)
    return model(run.task().image_transform(model.anatomy)(image).unsqueeze(0))[0]
