"""The models that take part: plain timm, and every method on the same weights."""

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
    "evit": td.EViT(),
    "evit_drop": td.EViT(rest="drop"),
    "evit_r": td.EViT(r=8),
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
    """A model of timm with random weights, always the same."""
    torch.manual_seed(0)
    size = {} if img_size is None else {"img_size": img_size}
    return timm.create_model(name, **size).eval().to(device, dtype)


def random_images(vit: nn.Module, batch: int) -> Tensor:
    """Images that `vit` takes, always the same."""
    weight = next(vit.parameters())
    # A seed of its own: dispatchers are centred on these images, so that decisions about their
    # tokens lie on the edge, and exported files are checked on images of other seeds.
    generator = torch.Generator().manual_seed(1000 + batch)
    images = torch.randn(batch, 3, *vit.patch_embed.img_size, generator=generator)
    return images.to(weight.device, weight.dtype)


def reduced(vit: nn.Module, method: str, images: Tensor) -> td.DialViT:
    """A method on the weights of `vit`.

    The dispatchers of DyT and DAR by threshold are centred and calibrated on (some of) `images`, so
    that each degree processes the share of tokens that it would be trained to, and costs are those
    of the shares that were measured.
    """
    if method not in METHODS:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, got {method}.")
    model = td.wrap(vit, reduce=METHODS[method]).eval()
    model.to(images.device, images.dtype)
    if ShareMeter.fits(model):
        centre(model, images[:8])
        calibrate(model, [images[:8]])
    return model


@torch.no_grad()
def centre(model: td.DialViT, images: Tensor) -> None:
    """Shift the dispatchers of DyT or DAR so that each selects half of the tokens of `images`."""
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
    """Degrees above 0 whose costs are nearest to these shares of the cost at degree 0."""
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
