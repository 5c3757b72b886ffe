"""The optimizer's groups of parameters and its learning rate over a run."""

from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from tokendial.train.checkpoint import trained
from tokendial.train.recipe import TrainSection
from tokendial.vit import DialViT


def parameter_groups(
    model: DialViT, weight_decay: float, lr: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Trained parameters, grouped by weight decay and learning rate.

    Matrices decay; biases, norms, scales, prompts, positions and other vectors do not. With
    `layer_decay` the rate of the backbone falls by that factor from block to block towards the
    input, as in the fine-tuning recipes of BEiT and MAE; heads, adapters and reducers keep `lr`.
    """
    vectors = {"cls_token", "dist_token", "reg_token", "pos_embed", "position_embeddings"}
    inside = {
        id(parameter): number
        for number, block in enumerate(model.anatomy.blocks, start=1)
        for parameter in block.parameters()
    }
    # What stands behind the last block among the parameters is used after it.
    order = [id(parameter) for parameter in model.vit.parameters()]
    after = set(order[1 + max(order.index(number) for number in inside) :])
    heads = {id(p) for head in model.anatomy.heads for p in head.parameters()}
    depth = len(model.anatomy.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained(model).items():
        vector = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in vectors | {"prompts"}
        rate = lr
        if layer_decay and name.startswith("vit.") and id(parameter) not in heads:
            layer = inside.get(id(parameter), depth if id(parameter) in after else 0)
            rate = lr * layer_decay ** (depth + 1 - layer)
        groups.setdefault((0.0 if vector else weight_decay, rate), []).append(parameter)
    return [
        {"params": group, "weight_decay": decay, "lr": rate}
        for (decay, rate), group in groups.items()
    ]


def cosine(
    optimizer: torch.optim.Optimizer, settings: TrainSection, updates_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine down to `min_lr` at the end of the run, update by update."""
    warmup = round(settings.warmup_epochs * updates_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, updates_per_epoch * settings.epochs - warmup),
        lr_min=settings.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
