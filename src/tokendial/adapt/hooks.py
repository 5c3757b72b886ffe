"""Adapters whose layers act on the output of a backbone's own layers, which stay as they are."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokendial.adapt.base import Adapter


class OutputLayer(nn.Module):
    """Acts on the output of one linear layer, convolution or norm of the backbone."""

    @abstractmethod
    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """What the layer returns in place of `output`, from its input and output."""

    @abstractmethod
    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """The layer's parameters, by name, with which it does the same by itself.

        Raises:
            ValueError: If it has not the parameters that this takes.
        """


class _Call:
    """A forward hook that calls a layer of the adapter.

    An object, not a closure: copying a model copies it together with the layers it points to.
    """

    def __init__(self, module: nn.Module, layer: OutputLayer) -> None:
        self.module, self.layer = module, layer
        self.kept: dict[str, Tensor] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.kept is not None:
            return output
        out: Tensor = self.layer(inputs[0], output)
        return out


class HookedAdapter(Adapter):
    """Owns the layers that act on outputs, and can merge them into the backbone."""

    in_backbone = True

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self._handles: list[RemovableHandle] = []

    def act_on(self, module: nn.Module, layer: OutputLayer) -> None:
        """From now on `module` returns `layer(its input, its output)`."""
        self._calls.append(_Call(module, layer))
        self._handles.append(module.register_forward_hook(self._calls[-1]))

    def switch(self, *, on: bool) -> None:
        """Register the hooks, or remove them."""
        for handle in self._handles:
            handle.remove()
        calls = self._calls if on else []
        self._handles = [call.module.register_forward_hook(call) for call in calls]

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse: a replica's hooks would call the layers of the original, on another device."""
        if not self.merged:
            raise ValueError(
                f"{type(self).__name__} acts by hooks, which torch.nn.DataParallel does not copy: "
                "use DistributedDataParallel, or call merge_adapters() first."
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the parameters of the backbone's layers, and keep the old ones."""
        new = [(call, call.layer.merged(call.module)) for call in self._calls]
        for call, values in new:
            own = dict(call.module.named_parameters(recurse=False))
            call.kept = {name: own[name].detach().clone() for name in values}
            for name, value in values.items():
                own[name].copy_(value)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept parameters back."""
        for call in self._calls:
            own = dict(call.module.named_parameters(recurse=False))
            for name, value in (call.kept or {}).items():
                own[name].copy_(value)
            call.kept = None
        self.merged = False
