"""Adapters that transform the outputs of the backbone's layers by forward hooks.

The layers themselves stay as they are, so state dicts keep the names of the backbone.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokendial.adapt.base import Adapter


class OutputTransform(nn.Module):
    """Transforms the output of one linear layer, convolution or norm of the backbone."""

    @abstractmethod
    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the transformed output of the layer, from its input `x` and its `output`."""

    def merged_parameters(self, module: nn.Module) -> dict[str, Tensor]:
        """Return parameters by name with which `module` alone gives the transformed output.

        Raises:
            ValueError: If the transform cannot be merged, or `module` lacks a parameter that this
                needs, such as a bias.
        """
        raise ValueError(f"{type(self).__name__} cannot be merged into the backbone's weights.")


class _OutputHook:
    """A forward hook that transforms the output of one layer of the backbone.

    It is an object, not a closure, so that a deep copy of the model copies what it points to.
    """

    def __init__(self, module: nn.Module, transform: OutputTransform) -> None:
        self.module, self.transform = module, transform
        self.own_parameters: dict[str, Tensor] | None = None
        """The layer's own parameters while the adapter is merged into it; None: not merged."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.own_parameters is not None:
            return output
        out: Tensor = self.transform(inputs[0], output)
        return out


class HookedAdapter(Adapter):
    """Base class of adapters that transform outputs, and can be merged into the backbone."""

    in_backbone = True

    def __init__(self) -> None:
        super().__init__()
        self._output_hooks: list[_OutputHook] = []
        self._handles: list[RemovableHandle] = []

    def act_on(self, module: nn.Module, transform: OutputTransform) -> None:
        """Let `module` return `transform(input, output)` from now on."""
        self._output_hooks.append(_OutputHook(module, transform))
        self._handles.append(module.register_forward_hook(self._output_hooks[-1]))

    def switch(self, *, on: bool) -> None:
        """Register or remove the hooks."""
        for handle in self._handles:
            handle.remove()
        hooks = self._output_hooks if on else []
        self._handles = [hook.module.register_forward_hook(hook) for hook in hooks]

    def _replicate_for_data_parallel(self) -> Any:
        """Raise a ValueError: hooks of a replica would call the original's layers on its device."""
        if not self.merged:
            raise ValueError(
                f"{type(self).__name__} acts by hooks, which torch.nn.DataParallel does not copy: "
                "use DistributedDataParallel, or call merge_adapters() first."
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the parameters of the backbone's layers, after a copy of them."""
        new = [(hook, hook.transform.merged_parameters(hook.module)) for hook in self._output_hooks]
        for hook, values in new:
            own = dict(hook.module.named_parameters(recurse=False))
            hook.own_parameters = {name: own[name].detach().clone() for name in values}
            for name, value in values.items():
                own[name].copy_(value)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the copied parameters."""
        for hook in self._output_hooks:
            own = dict(hook.module.named_parameters(recurse=False))
            for name, value in (hook.own_parameters or {}).items():
                own[name].copy_(value)
            hook.own_parameters = None
        self.merged = False
