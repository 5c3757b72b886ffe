"""Methods of the PEFT library that act on linear layers: LoHa, LoKr, OFT, IA3, DoRA and others.

Source: the PEFT library, https://github.com/huggingface/peft. Its config classes document the
options of each method. LoRA also has a config of its own here, `LoRA`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.checks import check_target_modules
from tokendial.extras import check_installed
from tokendial.methods import register
from tokendial.shape import ViTShape

_ADDITIVE_METHODS = frozenset({"adalora", "loha", "lokr", "vera"})
"""PEFT's methods that only add to the output of a layer. Other methods scale the output, rotate the
input, or read the layer's weights; what PEFT's lora does depends on its options."""


@register("adapt", "peft")
@dataclass(frozen=True, kw_only=True)
class PEFT(AdapterConfig):
    """A method of the PEFT library on linear layers of the backbone."""

    method: str
    """PEFT's name of the method, such as loha, lokr, oft, ia3 or lora."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of PEFT's config class of that method, such as r, alpha or use_dora."""
    target_modules: tuple[str, ...] = ("qkv",)
    """Linear layers that the method acts on, each by the last part of its name: qkv, proj, fc1 or
    fc2 in timm's ViTs."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise ValueError(f"method must be the name of a method of PEFT, got {self.method!r}.")
        # A copy: later changes of the caller's dictionary must not change the method.
        object.__setattr__(self, "options", copy.deepcopy(dict(self.options)))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        check_target_modules(self.target_modules)

    def __hash__(self) -> int:
        # Values of options may be unhashable. Equal methods have equal names of options.
        return hash((self.method, frozenset(self.options), self.target_modules))

    def build(self, vit: ViTShape) -> "PEFTLayers":
        """Make the adapter. Raises a ValueError for a method or an option that PEFT lacks."""
        return PEFTLayers(self.peft_config(), self.target_modules)

    def peft_config(self) -> Any:
        """Return the same settings as PEFT's own config."""
        check_installed("PEFT", "peft")
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        names = sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
        if self.method.lower() not in names:
            raise ValueError(f"method must be one of {', '.join(names)}, got {self.method!r}.")
        make: Any = PEFT_TYPE_TO_CONFIG_MAPPING[self.method.upper()]  # type: ignore[index]
        try:
            return make(target_modules=list(self.target_modules), **copy.deepcopy(self.options))
        except TypeError as error:
            raise ValueError(f"options do not fit {self.method}: {error}.") from None


class PEFTLayers(Adapter):
    """Lets PEFT put its layers into the backbone. The weights belong to these layers."""

    in_backbone = True

    def __init__(self, peft_config: Any, target_modules: tuple[str, ...]) -> None:
        super().__init__()
        self.is_additive = peft_config.peft_type.value.lower() in _ADDITIVE_METHODS
        self.peft_config, self.target_modules = peft_config, target_modules
        self._layers: list[Any] = []
        self._base_weights: list[dict[str, Tensor]] = []
        # The backbone, and the attribute `peft_config` that PEFT sets on it. They are in a list, so
        # that the backbone does not become a submodule of the adapter.
        self._peft_configs: list[tuple[Any, Any]] = []

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Let PEFT replace the target modules by its layers.

        Raises:
            ValueError: If a target module does not exist, or PEFT cannot act on this model.
        """
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        check_targets(vit, self.target_modules)
        try:
            peft.inject_adapter_in_model(self.peft_config, vit)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"PEFT cannot put its layers into this model: {error}") from None
        finally:
            self._peft_configs = [(vit, getattr(vit, "peft_config", None))]
        self._layers = [module for module in vit.modules() if isinstance(module, BaseTunerLayer)]

    def switch(self, *, on: bool) -> None:
        """Set or remove PEFT's attribute `peft_config` of the backbone, with PEFT's layers."""
        for vit, peft_config in self._peft_configs:
            if on:
                vit.peft_config = peft_config
            elif hasattr(vit, "peft_config"):
                del vit.peft_config

    def merge(self) -> None:
        """Let PEFT merge its layers, after a copy of the weights that this changes.

        Raises:
            ValueError: If PEFT cannot merge the method.
        """
        bases = [layer.get_base_layer() for layer in self._layers]
        self._base_weights = [
            {name: p.detach().clone() for name, p in base.named_parameters()} for base in bases
        ]
        self.merged = True
        try:
            for layer in self._layers:
                layer.merge()
        except NotImplementedError as error:
            self.unmerge()
            method = self.peft_config.peft_type.value.lower()
            raise ValueError(f"PEFT cannot merge {method}: {error}") from None
        except BaseException:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Restore the copied weights: PEFT would subtract its updates, with rounding errors."""
        for layer, weights in zip(self._layers, self._base_weights, strict=True):
            if layer.merged:
                layer.unmerge()
            layer.get_base_layer().load_state_dict(weights)
        self._base_weights, self.merged = [], False


def check_targets(vit: nn.Module, targets: tuple[str, ...]) -> None:
    """Raise a ValueError unless each target is the last part of the name of a linear layer."""
    linear = [name for name, part in vit.named_modules() if isinstance(part, nn.Linear)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if missing := [name for name in targets if name not in endings]:
        raise ValueError(
            f"target_modules must name linear layers ({', '.join(endings)}), got {missing[0]!r}."
        )
