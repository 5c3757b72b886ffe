"""Multiply-accumulates and parameters of a model, counted on the model itself without memory."""

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
_MOST_ANSWERS = 100_000


@dataclass(frozen=True)
class Cost:
    """What one image costs at one degree."""

    degree: int
    """The degree of the dial."""
    params: int
    """All parameters: backbone, adapters, head."""
    trainable_params: int
    """Parameters that train, head or decoder left out (as the papers count)."""
    macs: int
    """Multiply-accumulates for one image."""
    tokens_per_layer: tuple[int, ...]
    """Tokens (prefix included) that leave each block."""

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates in units of 1e9, what papers print as GFLOPs."""
        return self.macs / 1e9


def count_macs(module: nn.Module, run: Callable[[nn.Module], Any], *, products: bool = True) -> int:
    """Multiply-accumulates of a forward pass, counted operator by operator on the meta device.

    One per multiply-accumulate of linear layers, convolutions and matrix products (attention
    included), 5 per element of a LayerNorm, 4 per element that a bilinear interpolation makes, 0
    for the rest: the rule that reproduces the published costs to the last digit (17.58 G for
    ViT-B/16 at 224).

    Args:
        module: The model; its weights are neither touched nor copied.
        run: Called with the module whose weights are on the meta device; does the forward pass
            (with inputs on the meta device).
        products: Count products of two activations (attention, token matching); some papers leave
            them out.
    """

    def whole(call: nn.Module) -> Iterator[None]:
        run(call)
        yield

    return sum(count_parts(module, whole, products=products))


def count_parts(
    module: nn.Module, run: Callable[[nn.Module], Iterable[Any]], *, products: bool = True
) -> list[int]:
    """Multiply-accumulates of the parts of a forward pass, each of which ends with a `yield`.

    Args:
        module: As in `count_macs`.
        run: As there, but a generator.
        products: As there.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    meta = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    counter = _Counter()
    totals = [0]

    def run_all(call: nn.Module) -> None:
        for _ in run(call):
            flops = counter.flops.items()
            totals.append(sum(n for op, n in flops if products or not _is_product(op)))

    training = module.training
    module.eval()
    try:
        with torch.no_grad(), counter:
            functional_call(_Call(module, run_all), {f"module.{n}": v for n, v in meta.items()}, ())
    finally:
        module.train(training)
    return [(after - before) // 2 for before, after in pairwise(totals)]


class _Call(nn.Module):
    """Lets `functional_call` run any method of a module, not only its forward."""

    def __init__(self, module: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self) -> Any:
        return self.run(self.module)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and answers those that saw the same shapes before by what they gave then.

    Meta kernels are written in Python, and blocks have many operators in common: most of the time
    of counting would be spent in them. The number of answers that are kept is bounded.
    """

    answers: ClassVar[dict[Any, tuple[int, bool, list[_Meta]]]] = {}

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, op = kwargs or {}, func._overloadpacket
        key = None if func._schema.is_mutable else _key((func, args, kwargs))
        if key in self.answers:
            flops, single, metas = self.answers[key]
            self.flops[op] += flops
            tensors = [torch.empty_strided(s, t, dtype=d, device="meta") for s, t, d in metas]
            return tensors[0] if single else tuple(tensors)
        if op not in _FLOPS:
            with self:  # an operator that is made of others is counted by them
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        flops = _FLOPS[op](*args, **kwargs, out_val=out) if op in _FLOPS else 0
        self.flops[op] += flops
        given = (out,) if isinstance(out, Tensor) else out
        whole = isinstance(given, tuple) and all(isinstance(t, Tensor) and t.is_meta for t in given)
        if key is not None and whole and len(self.answers) < _MOST_ANSWERS:
            metas = [(t.shape, t.stride(), t.dtype) for t in given]
            self.answers[key] = flops, isinstance(out, Tensor), metas
        return out


def _key(value: Any) -> Any:
    """What an operator's result depends on; None if that is more than shapes."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else None
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple | list):
        parts = tuple(map(_key, value))
        return None if None in parts else parts
    # 1, 1.0 and True are equal, but do not give the same types.
    return type(value), value


# The unit of torch's table is FLOPs, two to a multiply-accumulate.


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
