"""The models of the benchmarks: plain timm, and every reduction method on the same weights."""

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import timm
import torch
from torch import Tensor, nn

import tokendial as td
from tokendial.measure import ShareMeter, calibrate
from tokendial.reduce.base import ReducerConfig

METHODS: dict[str, ReducerConfig] = {
    "tome": td.ToMe(),
    "tome_random": td.ToMe(matching="random"),
    "tome_stride4": td.ToMe(stride=4),
    "tome_similarity": td.ToMe(sizes="similarity"),
    "pitome": td.PiToMe(),
    "prune_merge": td.PruneMerge(),
    "learnt_metric": td.LearntMetric(),
    "evit": td.EViT(),
    "evit_drop": td.EViT(rest="drop"),
    "evit_r": td.EViT(r=8),
    "evit_shift": td.EViT(score="shift"),
    "dynamicvit": td.DynamicViT(),
    "dyt": td.DyT(),
    "dyt_topk": td.DyT(selection="topk"),
    "dar": td.DAR(),
    "dar_topk": td.DAR(selection="topk"),
    "ffn_merge": td.FFNMerge(r=98),
}


def backbone(
    name: str, *, img_size: int | None, device: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A timm model with random weights, the same in every call."""
    torch.manual_seed(0)
    size = {} if img_size is None else {"img_size": img_size}
    return timm.create_model(name, **size).eval().to(device, dtype)


def random_images(vit: nn.Module, batch: int) -> Tensor:
    """Random images for `vit`, the same in every call."""
    weight = next(vit.parameters())
    # Dispatchers are centred on these images, so decisions about their tokens are close. Exported
    # files are compared on images of other seeds, where rounding cannot change a decision.
    generator = torch.Generator().manual_seed(1000 + batch)
    images = torch.randn(batch, 3, *vit.patch_embed.img_size, generator=generator)
    return images.to(weight.device, weight.dtype)


def with_reduction(vit: nn.Module, method: str, images: Tensor) -> td.DialViT:
    """A reduction method on the weights of `vit`.

    The dispatchers of DyT and DAR by threshold are centred and calibrated on the first images. So
    each degree processes the fraction of tokens that it stands for, and costs count the measured
    fractions.
    """
    if method not in METHODS:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, got {method}.")
    model = td.wrap(vit, reduce=METHODS[method]).eval()
    model.to(images.device, images.dtype)
    if ShareMeter.supports(model):
        centre(model, images[:8])
        calibrate(model, [images[:8]])
    return model


@torch.no_grad()
def centre(model: td.DialViT, images: Tensor) -> None:
    """Shift the biases of DyT's or DAR's dispatchers so that each selects half of the tokens."""
    reducer = model.reducer
    with _shifting(reducer):
        model(images)


@contextmanager
def _shifting(reducer: nn.Module) -> Iterator[None]:
    logits = reducer.logits

    def centred(layer: int, tokens: td.tokens.Tokens) -> Tensor:
        found = logits(layer, tokens)
        reducer.dispatchers[layer - 1].bias -= found.median()
        return found - found.median()

    reducer.logits = centred
    try:
        yield
    finally:
        del reducer.logits


def degrees_at(model: td.DialViT, shares: Sequence[float]) -> list[int]:
    """The degrees above 0 whose costs are nearest to these fractions of the cost at degree 0."""
    cost = cache(lambda degree: model.cost(degree).gmacs)
    found = set()
    for share in shares:
        wanted = share * cost(0)
        # Costs fall with the degree.
        at = bisect.bisect_left(model.degrees, -wanted, lo=1, key=lambda degree: -cost(degree))
        near = model.degrees[max(1, at - 1) : at + 1]
        found.add(min(near, key=lambda degree: abs(cost(degree) - wanted)))
    return sorted(found)


def check_degrees(method: str, model: td.DialViT, degrees: Sequence[int]) -> None:
    """Raise a ValueError unless the dial has all of `degrees`."""
    if missing := [degree for degree in degrees if degree not in model.degrees]:
        first, last = model.degrees[0], model.degrees[-1]
        raise ValueError(f"degrees of {method} must lie in [{first}, {last}], got {missing[0]}.")
