"""Checks of the arguments of `wrap`: one line that says what to pass instead."""

from typing import Any

from torch import nn

from tokendial.adapt.base import AdapterConfig
from tokendial.decode import DecoderConfig
from tokendial.methods import method_class, method_names
from tokendial.model.tower_dial import DialedPart
from tokendial.reduce.base import ReducerConfig

_KINDS: dict[str, tuple[type, str, str]] = {
    "reduce": (ReducerConfig, "a reduction method", "td.ToMe(r=8)"),
    "adapt": (AdapterConfig, "a fine-tuning method", "td.LoRA(rank=8)"),
    "decode": (DecoderConfig, "a decoder", "td.LinearDecoder(num_classes=21)"),
}
"""By argument: the class of its values, what they are, and an example."""


def check_method(kind: str, value: object) -> None:
    """Raise a ValueError unless `value` is None or a method of that kind.

    Args:
        kind: The argument: "reduce", "adapt" or "decode".
        value: What was passed.
    """
    base, what, example = _KINDS[kind]
    if value is None or isinstance(value, base):
        return
    if isinstance(value, type) and issubclass(value, base):
        raise ValueError(
            f"{kind} must be an instance, got the class {value.__name__}: pass "
            f"td.{value.__name__}(...)."
        )
    if isinstance(value, str) and value in method_names(kind):
        name = method_class(kind, value).__name__
        raise ValueError(f"{kind} must be {what}, got the string {value!r}: pass td.{name}(...).")
    for other, (other_base, other_what, _) in _KINDS.items():
        own = value if isinstance(value, type) else type(value)
        if issubclass(own, other_base):
            raise ValueError(
                f"{kind} must be {what} such as {example}; {own.__name__} is {other_what}: pass it "
                f"as {other}=."
            )
    raise ValueError(f"{kind} must be {what} such as {example}, got {value!r:.60}.")


def check_bare(vit: Any, wrapped_class: type[nn.Module]) -> None:
    """Raise a ValueError if `vit` is no model, a PeftModel, or a model that is wrapped already."""
    if isinstance(vit, wrapped_class):
        raise ValueError(
            "vit is a DialViT already: use it as it is (set_degree(), add_adapter()), or wrap "
            "vit.unwrap()."
        )
    if any(isinstance(module, DialedPart) for module in getattr(vit, "modules", tuple)()):
        raise ValueError(
            "vit has a dial of td.attach: call detach() of its handle first, or use that dial."
        )
    if any(base.__module__.startswith("peft.") for base in type(vit).__mro__):
        raise ValueError(
            f"vit is a {type(vit).__name__} of PEFT: pass vit.get_base_model(), which keeps the "
            "layers that PEFT put into it."
        )
    if not isinstance(vit, nn.Module):
        raise ValueError(
            "vit must be a model such as timm.create_model('vit_small_patch16_224'), got "
            f"{vit!r:.60}."
        )
