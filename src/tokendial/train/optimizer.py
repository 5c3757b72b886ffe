"""The optimizer's groups of parameters and its learning rate over a run."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from tokendial.train.checkpoint import trained
from tokendial.train.recipe import TrainSection
from tokendial.vit import DialViT

_VECTORS = {
    "cls_token",
    "dist_token",
    "reg_token",
    "pos_embed",
    "position_embeddings",
    "prompts",
}
"""Last parts of names of parameters that are vectors, whatever their shape."""


def parameter_groups(
    model: DialViT, weight_decay: float, lr: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Trained parameters, grouped by weight decay and learning rate.

    Matrices decay; biases, norms, scales, prompts, positions and other vectors do not. With
    `layer_decay` the rate of the backbone falls by that factor from block to block towards the
    input, as in the fine-tuning recipes of BEiT and MAE; heads, adapters and reducers keep `lr`.
    """
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

    def rate(name: str, parameter: nn.Parameter) -> float:
        if not layer_decay or not name.startswith("vit.") or id(parameter) in heads:
            return lr
        layer = inside.get(id(parameter), depth if id(parameter) in after else 0)
        return lr * layer_decay ** (depth + 1 - layer)

    return decay_groups(trained(model).items(), weight_decay, rate)


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    rate: float | Callable[[str, nn.Parameter], float],
) -> list[dict[str, Any]]:
    """Named parameters, grouped by weight decay (matrices have it) and learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        vector = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _VECTORS
        lr = rate(name, parameter) if callable(rate) else rate
        groups.setdefault((0.0 if vector else weight_decay, lr), []).append(parameter)
    return [
        {"params": group, "weight_decay": decay, "lr": lr} for (decay, lr), group in groups.items()
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
