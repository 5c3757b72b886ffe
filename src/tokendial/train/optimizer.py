"""The optimizer's groups of parameters and its learning rate over a run."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tokendial.adapt.base import Adapter
from tokendial.model.dial_vit import DialViT
from tokendial.runs.recipe import TrainSection
from tokendial.train.checkpoint import trained


def parameter_groups(
    model: DialViT, weight_decay: float, lr: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Trained parameters, grouped by weight decay and learning rate.

    With `layer_decay` the rate of the backbone falls by that factor from block to block towards
    the input, as in the fine-tuning recipes of BEiT and MAE; heads, adapters and reducers keep
    `lr`. What decays: see `decay_groups`.
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

    return decay_groups(model, weight_decay, rate)


def decay_groups(
    module: nn.Module,
    weight_decay: float,
    rate: float | Callable[[str, nn.Parameter], float],
) -> list[dict[str, Any]]:
    """Trained parameters of a module, grouped by weight decay and learning rate.

    Matrices decay: the weights of linear layers and convolutions, what PEFT puts beside them, and
    what an adapter names as its `matrices`. All else is a vector or many of them, whatever its
    shape: biases, norms, scales, tokens, prompts, queries, positions, embeddings of classes.
    """
    matrices = {id(parameter) for parameter in _matrices(module)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained(module).items():
        decay = weight_decay if id(parameter) in matrices else 0.0
        lr = rate(name, parameter) if callable(rate) else rate
        groups.setdefault((decay, lr), []).append(parameter)
    return [
        {"params": group, "weight_decay": decay, "lr": lr} for (decay, lr), group in groups.items()
    ]


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        if isinstance(part, nn.Linear | _ConvNd):
            yield part.weight
        elif isinstance(part, nn.ParameterDict):
            # PEFT's layers hold so what is no layer by itself; some of it is a row or a column.
            yield from (p for p in part.values() if p.ndim > 1 and min(p.shape) > 1)
        elif isinstance(part, Adapter):
            yield from (getattr(part, name) for name in part.matrices)


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
