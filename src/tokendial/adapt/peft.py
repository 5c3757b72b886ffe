"""Any method of the PEFT library that puts layers into linear ones: LoHa, LoKr, OFT, IA3, DoRA.

Source: the PEFT library, https://github.com/huggingface/peft, whose configuration classes say what
each method's options mean. `LoRA` has a class of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.extras import check_installed
from tokendial.methods import register
from tokendial.shape import ViTShape

_ADDING = frozenset({"adalora", "loha", "lokr", "vera"})
"""Methods that only add to what a layer gives. Others scale it, rotate its input, or read its
weights; what PEFT's lora does depends on its options."""


@register("adapt", "peft")
@dataclass(frozen=True, kw_only=True)
class PEFT(AdapterConfig):
    """A method of PEFT on linear layers of the backbone."""

    method: str
    """PEFT's name of the method, such as loha, lokr, oft, ia3, or lora with options of its own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of PEFT's configuration of that method, such as r, alpha, use_dora."""
    target_modules: tuple[str, ...] = ("qkv",)
    """Endings of the names of the layers: qkv, proj, fc1, fc2."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not self.target_modules:
            raise ValueError("target_modules must name at least one layer, got none.")

    def build(self, vit: ViTShape) -> "PEFTLayers":
        """Make the module; raises a ValueError for a method or an option that PEFT has not."""
        return PEFTLayers(self.peft_config(), self.target_modules)

    def peft_config(self) -> Any:
        """The same settings as PEFT's own config."""
        check_installed("PEFT", "peft")
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        names = sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
        if self.method.lower() not in names:
            raise ValueError(f"method must be one of {', '.join(names)}, got {self.method!r}.")
        make: Any = PEFT_TYPE_TO_CONFIG_MAPPING[self.method.upper()]  # type: ignore[index]
        try:
            return make(target_modules=list(self.target_modules), **self.options)
        except TypeError as error:
            raise ValueError(f"options do not fit {self.method}: {error}.") from None


class PEFTLayers(Adapter):
    """Lets PEFT put its layers into the backbone; owns no weights itself."""

    in_backbone = True

    def __init__(self, peft_config: Any, target_modules: tuple[str, ...]) -> None:
        super().__init__()
        self.adds = peft_config.peft_type.value.lower() in _ADDING
        self.peft_config, self.target_modules = peft_config, target_modules
        self._layers: list[Any] = []
        self._kept: list[dict[str, Tensor]] = []
        # PEFT's note on the backbone of what it put there; in a list, so that the backbone does not
        # become a part of the adapter.
        self._noted: list[tuple[Any, Any]] = []

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Inject PEFT's layers.

        Raises:
            ValueError: If a target module does not exist, or the method does not act on layers.
        """
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        _check_targets(vit, self.target_modules)
        try:
            peft.inject_adapter_in_model(self.peft_config, vit)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"PEFT cannot put its layers into this model: {error}") from None
        finally:
            self._noted = [(vit, getattr(vit, "peft_config", None))]
        self._layers = [module for module in vit.modules() if isinstance(module, BaseTunerLayer)]

    def switch(self, *, on: bool) -> None:
        """Keep PEFT's note on the backbone as long as its layers are there."""
        for vit, note in self._noted:
            if on:
                vit.peft_config = note
            elif hasattr(vit, "peft_config"):
                del vit.peft_config

    def merge(self) -> None:
        """Let PEFT merge its layers, and keep the weights that they change.

        Raises:
            ValueError: If PEFT cannot merge the method.
        """
        bases = [layer.get_base_layer() for layer in self._layers]
        self._kept = [
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
        """Put the kept weights back: PEFT subtracts what it added, which leaves rounding errors."""
        for layer, kept in zip(self._layers, self._kept, strict=True):
            if layer.merged:
                layer.unmerge()
            layer.get_base_layer().load_state_dict(kept)
        self._kept, self.merged = [], False


def _check_targets(vit: nn.Module, targets: tuple[str, ...]) -> None:
    """Raise a ValueError unless every target is the ending of the name of a linear layer."""
    linear = [name for name, part in vit.named_modules() if isinstance(part, nn.Linear)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if missing := [name for name in targets if name not in endings]:
        raise ValueError(
            f"target_modules must name linear layers ({', '.join(endings)}), got {missing[0]!r}."
        )
