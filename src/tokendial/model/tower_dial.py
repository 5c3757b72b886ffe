"""The dial of one ViT inside of a model, and how it gets into the ViT's modules and out again.

A part of the ViT (a block, or an FFN) gets a class of its own that is made from its present one, as
torch's parametrizations do. So the module stays the same object with the same name, weights and
hooks, and `isinstance` holds. At degree 0 its own code runs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokendial.measure.cost import Cost, count_macs
from tokendial.model.dial import check_degree
from tokendial.model.protect import check_mask
from tokendial.reduce.base import Reducer
from tokendial.shape import ViTShape


class TowerDial(ABC):
    """The dial of one ViT inside of a model."""

    def __init__(
        self,
        vit: nn.Module,
        parts: Sequence[nn.Module],
        reducer: Reducer,
        shape: ViTShape,
        input_shape: tuple[int, ...],
    ) -> None:
        self.vit = vit
        """The ViT."""
        self.parts = parts
        """The modules that run under the dial, one for each layer."""
        self.reducer = reducer
        """The reduction method."""
        self.degree = reducer.degree
        """The present degree."""
        self.shape = shape
        """Sizes of the ViT."""
        self.input_shape = input_shape
        """Shape of an image of the configured size, [C, H, W]."""
        self.protected: Tensor | None = None
        """Mask of patches that are left alone; None: there are none."""
        self.counts: list[int] | None = None
        """If it is a list, each layer adds the number of tokens that leave it."""

    @abstractmethod
    def run(self, part: "DialedPart", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part under the dial, above degree 0.

        Args:
            part: The part as it was called, which may be a replica of the model's own.
            args: Positional arguments of the call.
            kwargs: Named arguments of the call.

        Returns:
            What the part returns; NotImplemented if its own code has to run.
        """

    @abstractmethod
    def run_vit(self, images_B3HW: Tensor) -> Any:
        """Run the ViT's own forward pass on images of the configured size."""

    def set_degree(self, degree: int) -> None:
        """Turn the dial; raise a ValueError if there is no such degree."""
        check_degree(degree, self.reducer.degrees)
        self.degree = degree

    def protect(self, mask: Tensor | None) -> None:
        """Leave the patches of a mask alone from now on; None: no patches.

        Raises:
            ValueError: If it is no mask, or the dial cannot protect patches.
        """
        if mask is not None:
            check_mask(mask, self.reducer)
        self.protected = mask

    def cost(self) -> Cost:
        """Cost of one image of the configured size at the present degree."""
        counts: list[int] = []
        self.counts = counts
        try:
            macs = count_macs(self.vit, self._run_on_meta)
        finally:
            self.counts = None
        parameters = list(self.vit.parameters())
        whole = self.shape.num_prefix_tokens + self.shape.num_patches
        return Cost(
            degree=self.degree,
            params=sum(p.numel() for p in parameters),
            trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
            macs=macs,
            tokens_per_layer=tuple(counts) or (whole,) * self.shape.depth,
        )

    def _run_on_meta(self, vit: nn.Module) -> None:
        dtype = next(vit.parameters()).dtype
        self.run_vit(torch.empty(1, *self.input_shape, device="meta", dtype=dtype))

    def enter(self) -> None:
        """Make the parts run under this dial, in place."""
        for layer, part in enumerate(self.parts, start=1):
            part.tower_dial, part.tower_layer = self, layer  # type: ignore[assignment]
            _set_class(part, dialed_class(type(part)))

    def leave(self) -> None:
        """Make the parts as they were."""
        for part in self.parts:
            _set_class(part, _own_class(part))
            del part.tower_dial, part.tower_layer


class DialedPart(nn.Module):
    """Mixed into the class of a part: at degree 0 the part's own code runs."""

    tower_dial: TowerDial
    """The dial of the ViT that the part belongs to."""
    tower_layer: int
    """The layer of the part, counted from 1."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part under the dial."""
        if self.tower_dial.degree:
            out = self.tower_dial.run(self, args, kwargs)
            if out is not NotImplemented:
                return out
        return self.run_own_code(*args, **kwargs)

    def run_own_code(self, *args: Any, **kwargs: Any) -> Any:
        """Run the code of the part's own class."""
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made while the program runs: a copy makes it again from the part's own.
        return _empty_part, (_own_class(self),), self.__dict__


_DIALED: dict[type[nn.Module], type[nn.Module]] = {}
"""The classes that `dialed_class` has made."""


def dialed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a part with `DialedPart` mixed in; it has the same name."""
    if cls not in _DIALED:
        facts = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        _DIALED[cls] = type(cls.__name__, (DialedPart, cls), facts)
    return _DIALED[cls]


def _own_class(part: nn.Module) -> type[nn.Module]:
    cls: type[nn.Module] = type(part).__bases__[1]
    return cls


def _empty_part(cls: type[nn.Module]) -> nn.Module:
    dialed = dialed_class(cls)
    return dialed.__new__(dialed)


def _set_class(part: nn.Module, cls: type[nn.Module]) -> None:
    part.__class__ = cls
    if "_old_forward" in part.__dict__:  # Accelerate's hooks keep the forward that they found
        part._old_forward = cls.forward.__get__(part)
