"""The cost of a wrapped model at its present degree."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tokendial.measure.cost import Cost, count_macs


def model_cost(
    model: nn.Module,
    run: Callable[[Tensor], list[int]],
    *,
    degree: int,
    input_shape: tuple[int, ...],
    heads: Iterable[nn.Module],
) -> Cost:
    """Count the parameters, multiply-accumulates and tokens of one input.

    Args:
        model: The model. Its weights are neither changed nor copied.
        run: Runs the model on an input [1, ...] of the meta device, and returns the number of
            tokens that leave each block.
        degree: The present degree.
        input_shape: Shape of one image or clip.
        heads: Heads or decoder, which `trainable_params` leaves out.
    """
    tokens_per_layer: list[int] = []

    def run_on_meta(_: nn.Module) -> None:
        dtype = next(model.parameters()).dtype
        images = torch.empty(1, *input_shape, device="meta", dtype=dtype)
        tokens_per_layer.extend(run(images))

    macs = count_macs(model, run_on_meta)
    in_heads = {id(p) for head in heads for p in head.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in in_heads]
    return Cost(
        degree=degree,
        params=sum(p.numel() for p in model.parameters()),
        trainable_params=sum(p.numel() for p in trainable),
        macs=macs,
        tokens_per_layer=tuple(tokens_per_layer),
    )
