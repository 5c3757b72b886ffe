"""The optimizer's groups of parameters and its learning rate over a run."""

from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from tokendial.train.checkpoint import trained
from tokendial.train.recipe import TrainSection


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; biases, norms and other vectors do not."""
    exempt = {"cls_token", "dist_token", "reg_token", "pos_embed"}
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for name, parameter in trained(model).items():
        groups[parameter.ndim < 2 or name.rsplit(".", 1)[-1] in exempt].append(parameter)
    decays = (weight_decay, 0.0)
    return [
        {"params": group, "weight_decay": decay}
        for group, decay in zip(groups, decays, strict=True)
        if group
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
