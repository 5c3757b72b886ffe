"""Parameter groups of the optimizer, and the schedule of the learning rate."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tokendial.adapt.base import Adapter
from tokendial.model.dial_vit import DialViT
from tokendial.runs.recipe import TrainSection
from tokendial.train.checkpoint import trainable


def parameter_groups(
    model: DialViT,
    weight_decay: float,
    lr: float,
    layer_decay: float | None = None,
    *,
    vector_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Trainable parameters of a model, grouped by weight decay and learning rate.

    Args:
        model: A wrapped model.
        weight_decay: Weight decay of weight matrices; see `decay_groups`.
        lr: Learning rate.
        layer_decay: Factor by which the learning rate of the backbone falls from each block to the
            block before it, as in the fine-tuning recipes of BEiT and MAE. Heads, adapters and
            reducers keep `lr`. None means 1.
        vector_decay: Weight decay of everything else.
    """
    block_numbers = {
        id(parameter): number
        for number, block in enumerate(model.anatomy.blocks, start=1)
        for parameter in block.parameters()
    }
    # Parameters listed behind those of the last block are used after it, like the final norm;
    # those listed before are used first, like the patch embedding.
    order = [id(parameter) for parameter in model.vit.parameters()]
    after_blocks = set(order[1 + max(order.index(number) for number in block_numbers) :])
    heads = {id(p) for head in model.anatomy.heads for p in head.parameters()}
    depth = len(model.anatomy.blocks)

    def rate(name: str, parameter: nn.Parameter) -> float:
        if not layer_decay or not name.startswith("vit.") or id(parameter) in heads:
            return lr
        layer = block_numbers.get(id(parameter), depth if id(parameter) in after_blocks else 0)
        return lr * layer_decay ** (depth + 1 - layer)

    return decay_groups(model, weight_decay, rate, vector_decay=vector_decay)


def decay_groups(
    module: nn.Module,
    weight_decay: float,
    rate: float | Callable[[str, nn.Parameter], float],
    *,
    vector_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Trainable parameters of a module, grouped by weight decay and learning rate.

    Weight matrices decay: those of linear layers and convolutions, those that PEFT adds to them,
    and those that an adapter lists in `decayed_parameters`. Everything else consists of vectors,
    whatever its shape, and does not decay by default: biases, norms, scales, tokens, prompts,
    queries, positions, class embeddings.

    Args:
        module: The module.
        weight_decay: Weight decay of the matrices.
        rate: Learning rate of all parameters, or a function of name and parameter that gives it.
        vector_decay: Weight decay of everything else.
    """
    matrices = {id(parameter) for parameter in _matrices(module)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable(module).items():
        decay = weight_decay if id(parameter) in matrices else vector_decay
        lr = rate(name, parameter) if callable(rate) else rate
        groups.setdefault((decay, lr), []).append(parameter)
    return [
        {"params": group, "weight_decay": decay, "lr": lr} for (decay, lr), group in groups.items()
    ]


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    """The weight matrices of a module; see `decay_groups`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | _ConvNd):
            yield part.weight
        elif isinstance(part, nn.ParameterDict):
            # PEFT keeps bare parameters here. Those that are a single row or column are vectors.
            yield from (p for p in part.values() if p.ndim > 1 and min(p.shape) > 1)
        elif isinstance(part, Adapter):
            yield from (getattr(part, name) for name in part.decayed_parameters)


def cosine_schedule(
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
