"""Treatments: changes that make a model faster on some machines. Each is measured first."""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from tokendial.measure.timing import time_in_rounds
from tokendial.model.dial_vit import DialViT

_MIN_SPEEDUP = 1.02
"""Speed-up from which a treatment is kept; a smaller one could be chance."""
_TURNS = 3
_ROUNDING = {torch.float32: 0.005, torch.float16: 0.01, torch.bfloat16: 0.06}
"""Largest change of the logits of the median image, relative to their norm, that rounding explains;
it includes float32 products that GPUs compute in TF32. A larger change means a wrong result."""
_MOST_OTHER_CLASSES = 0.1
"""Fraction of images whose top class may change by more than rounding: a near tie between tokens
can make the reduction merge or drop another one."""


@dataclass(frozen=True, slots=True)
class TreatmentTrial:
    """The result of trying one treatment on the example."""

    name: str
    """Name of the treatment, see `OptimizedViT`."""
    speedup: float | None
    """Time without the treatment over time with it. None if it failed or changed the logits."""
    kept: bool
    """Whether the treatment was faster and is kept."""
    problem: str = ""
    """Why the treatment failed."""

    def __str__(self) -> str:
        if self.speedup is None:
            return f"{self.name}: not supported here ({self.problem})"
        return f"{self.name}: {self.speedup:.2f}x, {'kept' if self.kept else 'left out'}"


class TreatableModel(Protocol):
    """The parts of an `OptimizedViT` that treatments change."""

    model: DialViT
    degrees: tuple[int, ...]
    fused_reduction: bool
    trials: list[TreatmentTrial]
    run: Callable[[Tensor], Tensor] | None

    def set_degree(self, degree: int) -> None:
        """Set the degree of the dial."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits."""


def _try(name: str, fast: TreatableModel, example: Tensor, use: Callable[[bool], None]) -> None:
    """Measure the model with and without a treatment, and keep the treatment if it is faster.

    `use` switches the treatment on and off.
    """
    use(False)
    wanted = fast(example).float()
    try:
        use(True)
        _check_same(fast(example).float(), wanted, _ROUNDING[example.dtype])
    except Exception as error:  # backends raise anything; the plain path remains
        use(False)
        fast.trials.append(_failed(name, error))
        return
    without, treated = time_in_rounds(
        (False, True),
        use,
        lambda _: fast(example),
        device=example.device,
        seconds=0.0,
        least_rounds=_TURNS,
    )
    speedup = without.seconds / treated.seconds
    use(speedup >= _MIN_SPEEDUP)
    fast.trials.append(TreatmentTrial(name, speedup, kept=speedup >= _MIN_SPEEDUP))


def _check_same(given: Tensor, wanted: Tensor, rounding: float) -> None:
    """Raise an ArithmeticError unless logits [B, classes, ...] agree up to rounding."""
    given, wanted = given.movedim(1, -1), wanted.movedim(1, -1)
    norm = wanted.norm(dim=-1)
    # The median, because a near tie between tokens may be decided otherwise in a few images.
    moved = float(((given - wanted).norm(dim=-1) / norm.clamp(min=1e-12)).median())
    if not moved <= rounding:
        raise ArithmeticError(f"its logits differ by {moved:.1%}")
    lost = wanted.amax(-1) - wanted.gather(-1, given.argmax(-1, keepdim=True)).squeeze(-1)
    others = float((lost > 2 * rounding * norm).double().mean())
    if others > _MOST_OTHER_CLASSES:
        raise ArithmeticError(f"its top class differs in {others:.0%} of the images")


def _failed(name: str, error: Exception) -> TreatmentTrial:
    return TreatmentTrial(name, None, kept=False, problem=str(error).strip().split("\n")[0])


class PackedLinear(nn.Linear):
    """A linear layer with a second copy of its weights, packed for the CPU's matrix units.

    The packed copy is renewed when the weights are changed in place. `gelu` fuses a GELU into the
    layer: "none" (exact) or "tanh", as in `nn.GELU`.
    """

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.gelu = gelu
        self.packed: Tensor | None = None
        self._version = -1

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., in_features]."""
        if torch.compiler.is_compiling():  # compilers cannot read the packed copy
            plain = super().forward(x)
            return F.gelu(plain, approximate=self.gelu) if self.gelu else plain
        if self.packed is None or self._version != self.weight._version:
            self._version = self.weight._version
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "gelu" if self.gelu else "none", [], self.gelu or ""
        )
        return out


def try_packed_weights(fast: TreatableModel, example: Tensor) -> None:
    """Try linear layers with weights in the order that the CPU reads."""
    vit = fast.model.vit
    linears = {
        name: module
        for name, module in vit.named_modules()
        # Layers that PEFT or hooks have changed do more than a matrix product.
        if type(module) is nn.Linear and not module._forward_hooks
    }
    gelus = {
        f"{name}.act": module.act
        for name, module in vit.named_modules()
        if type(module) is Mlp and f"{name}.fc1" in linears and type(module.act) is nn.GELU
    }
    applied = {name.removesuffix("act") + "fc1": gelu.approximate for name, gelu in gelus.items()}
    plain: dict[str, nn.Module] = {**linears, **gelus}
    packed: dict[str, nn.Module] = {
        **{name: PackedLinear(linear, applied.get(name)) for name, linear in linears.items()},
        **{name: nn.Identity() for name in gelus},
    }

    def use(on: bool) -> None:
        for name, linear in (packed if on else plain).items():
            vit.set_submodule(name, linear)

    _try("packed weights", fast, example, use)


def try_unfused_attention(fast: TreatableModel, example: Tensor) -> None:
    """Try attention by plain matrix products."""

    def use(on: bool) -> None:
        fast.model.attention_kernel = replace(fast.model.attention_kernel, fused=not on)

    _try("unfused attention", fast, example, use)


def try_sizes_in_keys(fast: TreatableModel, example: Tensor) -> None:
    """Try passing the sizes of merged tokens in the keys instead of a mask."""
    reducer = fast.model.reducer
    if reducer is None or not reducer.proportional_attention:
        return

    def use(on: bool) -> None:
        fast.model.attention_kernel = replace(fast.model.attention_kernel, sizes_in_keys=on)

    _try("sizes in keys", fast, example, use)


def try_padded_keys(fast: TreatableModel, example: Tensor) -> None:
    """Try padding the keys to a multiple of 32 tokens."""

    def use(on: bool) -> None:
        multiple = 32 if on else 1
        fast.model.attention_kernel = replace(fast.model.attention_kernel, key_multiple=multiple)

    _try("padded keys", fast, example, use)


def try_split_batch(fast: TreatableModel, example: Tensor) -> None:
    """Try splitting the batch over the cores."""
    cores = torch.get_num_threads()
    if cores == 1 or example.shape[0] == 1:
        return
    pool = ThreadPoolExecutor(cores, "tokendial", initializer=torch.set_num_threads, initargs=(1,))
    model = fast.model

    @torch.no_grad()
    def one(images: Tensor) -> Tensor:
        return model(images)  # type: ignore[no-any-return]

    def run(images: Tensor) -> Tensor:
        parts = images.tensor_split(max(1, min(cores, images.shape[0])))
        return one(images) if len(parts) == 1 else torch.cat(list(pool.map(one, parts)))

    def use(on: bool) -> None:
        fast.run = run if on else None

    _try("split batch", fast, example, use)
    torch.set_num_threads(cores)  # the pool's threads set it to 1 for new threads
    if not fast.trials[-1].kept:
        pool.shutdown()


def try_fused_reduction(fast: TreatableModel, example: Tensor) -> None:
    """Try fused kernels for the reduction."""

    def use(on: bool) -> None:
        fast.fused_reduction = on

    _try("fused reduction", fast, example, use)


def try_compilation(fast: TreatableModel, example: Tensor) -> None:
    """Try compiling every degree."""
    plain, before = fast.run, fast.model.degree
    # On GPUs this mode replays the kernels of a pass in one call (CUDA graphs).
    graphs = torch.compile(fast.model, dynamic=False, mode="reduce-overhead")

    def run(images: Tensor) -> Tensor:
        # A batch of another size runs at once, without a compiler.
        with torch.compiler.set_stance("eager_on_recompile"):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return graphs(images).clone()  # type: ignore[no-any-return]  # the next pass overwrites it

    def use(on: bool) -> None:
        fast.run = run if on else plain

    # CPUs multiply half precision fast only with packed weights. With freezing the compiler packs
    # them itself, once for every degree.
    freezing = example.dtype != torch.float32 and example.device.type == "cpu"
    try:
        with (
            torch.no_grad(),
            torch._dynamo.config.patch(recompile_limit=len(fast.degrees) + 1),
            torch._inductor.config.patch(freezing=freezing),
        ):
            for degree in fast.degrees:
                fast.set_degree(degree)
                graphs(example)
    except Exception as error:  # backends raise anything; the plain path remains
        fast.trials.append(_failed("compiled", error))
    else:
        _try("compiled", fast, example, use)
    finally:
        fast.set_degree(before)


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory.

    Token reduction allocates tensors of many different sizes. Returning their pages to the system
    would cost thousands of page faults in every forward pass.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        return
    trim_threshold, mmap_max = -1, -4
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)
