"""Counts the multiply-accumulates of a model.

The model itself runs on the meta device, which knows shapes but holds no values, so counting needs
no memory for weights and activations.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_Meta = tuple[torch.Size, tuple[int, ...], torch.dtype]
_MAX_CACHED = 100_000
"""Number of operator calls whose counts and output shapes are cached."""


@dataclass(frozen=True)
class Cost:
    """Cost of one image at one degree of the dial."""

    degree: int
    """Degree of the dial."""
    params: int
    """Number of all parameters: backbone, adapters, reducer, head or decoder."""
    trainable_params: int
    """Number of trainable parameters without those of the head or decoder, as papers count them."""
    macs: int
    """Number of multiply-accumulates for one image; one multiply-accumulate is two FLOPs."""
    tokens_per_layer: tuple[int, ...]
    """Number of tokens, prefix tokens included, that leave each block."""

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates in units of 1e9. Papers often call this number GFLOPs."""
        return self.macs / 1e9


def count_macs(module: nn.Module, run: Callable[[nn.Module], Any], *, products: bool = True) -> int:
    """Count the multiply-accumulates of a forward pass, operator by operator.

    Linear layers, convolutions and matrix products (attention included) count each of their
    multiply-accumulates. A LayerNorm counts 5 per element, a bilinear interpolation 4 per element
    of its output, everything else 0. This rule reproduces published costs to the last digit
    (17.58 G for ViT-B/16 at 224).

    Args:
        module: The model. Its weights are neither changed nor copied.
        run: Receives the module with weights on the meta device, and runs the forward pass with
            inputs on the meta device.
        products: Whether to count products of two activations (attention, token matching), which
            some papers leave out.
    """

    def run_as_one_part(model: nn.Module) -> Iterator[None]:
        run(model)
        yield

    return sum(count_macs_by_part(module, run_as_one_part, products=products))


def count_macs_in_parts(call: Callable[[], Any], parts: Iterable[nn.Module]) -> tuple[int, int]:
    """Count the multiply-accumulates of a call on real tensors, and those in some modules of it.

    For models that look at values, and so cannot run on the meta device.

    Args:
        call: Calls a model.
        parts: Modules of that model, none of them inside of another.

    Returns:
        The count of the whole call, and the count of its passes through the parts together.
    """
    counter, starts, in_parts = _FlopCounter(), list[int](), list[int]()
    handles = []
    for part in parts:
        handles += [
            part.register_forward_pre_hook(lambda *_: starts.append(counter.flops.total())),
            part.register_forward_hook(
                lambda *_: in_parts.append(counter.flops.total() - starts.pop())
            ),
        ]
    try:
        with torch.no_grad(), counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return counter.flops.total() // 2, sum(in_parts) // 2


def count_macs_by_part(
    module: nn.Module, run: Callable[[nn.Module], Iterable[Any]], *, products: bool = True
) -> list[int]:
    """Count the multiply-accumulates of each part of a forward pass.

    Args:
        module: The model. Its weights are neither changed nor copied.
        run: Receives the module with weights on the meta device, runs the forward pass, and yields
            at the end of each part.
        products: Whether to count products of two activations, see `count_macs`.

    Returns:
        One count for each part.
    """
    meta = {
        name: torch.empty_like(value, device="meta") for name, value in _own_tensors(module).items()
    }
    counter = _FlopCounter()
    totals = [0]

    def run_all(model: nn.Module) -> None:
        for _ in run(model):
            flops = counter.flops.items()
            totals.append(sum(n for op, n in flops if products or not _is_product(op)))

    training = module.training
    module.eval()
    try:
        with torch.no_grad(), counter:
            functional_call(
                _Runner(module, run_all),
                {f"module.{n}": v for n, v in meta.items()},
                (),
                tie_weights=False,
            )
    finally:
        module.train(training)
    return [(after - before) // 2 for before, after in pairwise(totals)]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each place that holds one exactly once.

    `functional_call` would replace the weights of a module with two names twice, and then restore
    them to their first replacement.
    """
    places = (
        (f"{prefix}.{name}".removeprefix("."), value)
        for prefix, part in module.named_modules()
        for name, value in (*part._parameters.items(), *part._buffers.items())
    )
    return {name: value for name, value in places if value is not None}


class _Runner(nn.Module):
    """Lets `functional_call`, which calls `forward`, run any function of a module."""

    def __init__(self, module: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self) -> Any:
        return self.run(self.module)


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of operators, and caches them by operator and input shapes.

    PyTorch computes output shapes on the meta device in Python, which would take most of the time.
    Blocks repeat the same operators with the same shapes, so a cached result replaces the call.
    """

    cache: ClassVar[dict[Any, tuple[int, bool, list[_Meta]]]] = {}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, op = kwargs or {}, func._overloadpacket
        key = None if func._schema.is_mutable else _cache_key((func, args, kwargs))
        if key in self.cache:
            flops, single, metas = self.cache[key]
            self.flops[op] += flops
            tensors = [torch.empty_strided(s, t, dtype=d, device="meta") for s, t, d in metas]
            return tensors[0] if single else tuple(tensors)
        if op not in _FLOPS:
            with self:  # a composite operator is counted by the operators that it consists of
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        flops = _FLOPS[op](*args, **kwargs, out_val=out) if op in _FLOPS else 0
        self.flops[op] += flops
        outs = (out,) if isinstance(out, Tensor) else out
        tensors_only = isinstance(outs, tuple) and all(
            isinstance(tensor, Tensor) and tensor.is_meta for tensor in outs
        )
        if key is not None and tensors_only and len(self.cache) < _MAX_CACHED:
            metas = [(t.shape, t.stride(), t.dtype) for t in outs]
            self.cache[key] = flops, isinstance(out, Tensor), metas
        return out


def _cache_key(value: Any) -> Any:
    """Return a key for an operator's arguments; None if its result depends on more than shapes."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple | list):
        parts = tuple(map(_cache_key, value))
        return None if None in parts else parts
    # The type is part of the key: 1, 1.0 and True are equal, but give outputs of other types.
    return type(value), value


# torch's table counts FLOPs, two for each multiply-accumulate.


def _layer_norm_flops(x: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * 5 * x.numel()


def _interpolation_flops(*args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return 2 * 4 * out_val.numel()


_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    torch.ops.aten.native_layer_norm: _layer_norm_flops,
    torch.ops.aten.upsample_bilinear2d: _interpolation_flops,
}


def _is_product(op: Any) -> bool:
    """Whether an operator multiplies two activations: attention, batched matrix products."""
    return "attention" in str(op) or str(op) in ("aten.bmm", "aten.baddbmm")
