"""`optimize`: find the fastest way to run a model on this machine, by measuring.

Which treatment helps depends on the processor. Packed weights help where matrix units multiply
bfloat16 tiles, and not where vector units multiply float32. Compiling takes minutes and may gain a
percent. So each treatment is tried on an example batch, and kept only if it is faster.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.kernels import fused_kernels_available, use_fused_kernels
from tokendial.model.dial_vit import DialViT
from tokendial.tune.treatments import (
    TreatmentTrial,
    keep_freed_memory,
    try_compilation,
    try_fused_reduction,
    try_packed_weights,
    try_padded_keys,
    try_sizes_in_keys,
    try_split_batch,
    try_unfused_attention,
)

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class OptimizedViT(nn.Module):
    """A model for inference that runs fast on this machine; `optimize` makes it.

    It is called like the model, and has the same dial. It has no adapters to switch, and cannot be
    trained. In the last block, patch outputs that the head ignores are skipped.

    Treatments, by name:
        packed weights: Linear layers keep a second copy of their weights in the order that the
            processor's matrix units read, where PyTorch would make it in every call, and apply a
            GELU that follows before they write their results.
        unfused attention: Matrix products and a softmax compute attention instead of the fused
            kernel.
        sizes in keys: Attention gets the sizes of merged tokens as channels of the keys instead of
            a mask, which the fastest kernels of GPUs do not take.
        padded keys: Attention gets keys for a multiple of 32 tokens, the surplus masked.
        split batch: The batch is split, and every core runs its images through the whole model,
            instead of all cores sharing every operation.
        fused reduction: On a GPU, one kernel finds each token's most similar one, and one merges
            tokens, in place of many small ones. What is compiled runs without.
        compiled: By torch.compile, one graph for each degree and for the example's batch size
            (on GPUs a CUDA graph); other batches run as without it.
    """

    def __init__(self, model: DialViT, degrees: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        """A copy of the model, changed by the treatments that were kept."""
        self.degrees = tuple(degrees)
        """Degrees that can be set."""
        self.fused_reduction = False
        """Whether reductions run in fused kernels, see `tokendial.kernels`."""
        self.trials: list[TreatmentTrial] = []
        """The treatments that were tried, in order, with their speed-ups."""
        self.notes: list[str] = []
        """Requests that this machine cannot fulfil, a line each."""
        self.run: Callable[[Tensor], Tensor] | None = None
        """Replaces the plain forward pass for images of the model's dtype, unless it is None."""

    @property
    def degree(self) -> int:
        """Present degree of the dial."""
        return self.model.degree

    def set_degree(self, degree: int) -> None:
        """Set the degree of the dial.

        Raises:
            ValueError: If `degree` is not in `degrees`.
        """
        if degree not in self.degrees:
            ready = ", ".join(map(str, self.degrees))
            if len(self.degrees) > 2 and self.degrees == self.model.degrees:
                ready = f"0 to {self.degrees[-1]}"
            raise ValueError(f"degree must be one that was made ready ({ready}), got {degree!r}.")
        self.model.set_degree(degree)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the wrapped ViT."""
        return self.model.anatomy

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the model, up to rounding."""
        with use_fused_kernels(self.fused_reduction):
            return (self.run or self.model)(images.to(next(self.model.parameters()).dtype))

    @torch.no_grad()
    def logits_and_embeddings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and embeddings of one pass, which is neither compiled nor split."""
        with use_fused_kernels(self.fused_reduction):
            images = images.to(next(self.model.parameters()).dtype)
            return self.model.logits_and_embeddings(images)

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """Return what `DialViT.feature_map` returns; this is neither compiled nor split."""
        with use_fused_kernels(self.fused_reduction):
            return self.model.feature_map(images.to(next(self.model.parameters()).dtype))


def optimize(
    model: DialViT,
    example: Tensor,
    *,
    degrees: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> OptimizedViT:
    """Find the fastest way to run a model on this machine.

    Treatments are tried one after another on the example, at the model's degree, in turns with a
    pass without the treatment. One that gains less than 2 % or changes the logits is left out. On
    Linux the whole process keeps freed memory from now on, for the next forward pass.

    Args:
        model: The model to optimise; it is left unchanged. The result shares its weights, unless
            `dtype` changes them or a compensator rewrites them when the dial turns. Merge linear
            adapters first, so that they cost nothing.
        example: A typical batch [B, 3, H, W] on the model's device.
        degrees: Degrees to prepare. By default all of them; with `compile` 0 and the present one.
        dtype: Dtype of weights and activations; by default the model's. A processor without
            instructions for half precision would be several times slower with it: then the result
            computes in float32, and `notes` says so.
        compile: Also try to compile every degree, which takes about a minute for each on a CPU.

    Raises:
        ValueError: If a degree is not one of the model's, or `dtype` is not one of float32,
            bfloat16 and float16.

    Example:
        >>> import timm, torch
        >>> from tokendial import ToMe, optimize, wrap
        >>> model = wrap(timm.create_model("vit_tiny_patch16_224", depth=2), reduce=ToMe(r=8))
        >>> fast = optimize(model, torch.zeros(2, 3, 224, 224))
        >>> fast(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 1000])
    """
    if degrees is None:
        degrees = sorted({0, model.degree}) if compile else model.degrees
    if bad := [degree for degree in degrees if degree not in model.degrees]:
        raise ValueError(f"degrees must lie in [0, {model.degrees[-1]}], got {bad[0]!r}.")
    notes: list[str] = []
    if dtype is not None:
        dtype = _supported(dtype, example.device, notes)
    fast = OptimizedViT(_twin(model, dtype), sorted({*degrees, model.degree}))
    fast.notes = notes
    fast.model.skip_unread_patches = True
    example = example.to(next(fast.model.parameters()).dtype)
    fast(example)  # raises if the example does not fit the model
    if example.device.type == "cpu":
        keep_freed_memory()
        try_packed_weights(fast, example)
        try_unfused_attention(fast, example)
        try_padded_keys(fast, example)
        try_split_batch(fast, example)
    else:
        try_sizes_in_keys(fast, example)
    if fused_kernels_available(example.device):
        try_fused_reduction(fast, example)
    if compile:
        try_compilation(fast, example)
    return fast


def _supported(dtype: torch.dtype, device: torch.device, notes: list[str]) -> torch.dtype:
    """Return `dtype`, or float32 if the processor would have to emulate it."""
    names = {known: str(known).removeprefix("torch.") for known in DTYPES.values()}
    if dtype not in names:
        raise ValueError(f"dtype must be one of {', '.join(names.values())}, got {dtype}.")
    native = (
        device.type != "cpu"
        or dtype == torch.float32
        or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    )
    if native:
        return dtype
    notes.append(f"this processor has no instructions for {names[dtype]}: running in float32.")
    return torch.float32


def _twin(model: DialViT, dtype: torch.dtype | None) -> DialViT:
    """Copy a model for inference; its tensors are shared where that is safe."""
    tensors = [*model.parameters(), *model.buffers()]
    changed = dtype is not None and any(t.is_floating_point() and t.dtype != dtype for t in tensors)
    shared = {} if changed or model.compensation else {id(t): t for t in tensors}
    twin = copy.deepcopy(model, shared).eval()
    return twin.to(dtype) if changed else twin
