"""Combined: several fine-tuning methods in one model, such as prompts and bottlenecks.

Source: DyT's code trains AdaptFormer together with prompts, and NOAH (Zhang et al., "Neural Prompt
Search", 2022, https://arxiv.org/abs/2206.04673) adapters, LoRA and prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.methods import from_json, register
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


@register("adapt", "combined")
@dataclass(frozen=True, kw_only=True)
class Combined(AdapterConfig):
    """Run several fine-tuning methods in one model, in the order of the list."""

    methods: Sequence[Any]
    """The methods, such as `[VPT(prompts=8), AdaptFormer(dim=8)]`, or their plain-JSON forms; at
    least two, of which one at most may put layers or hooks into the backbone (LoRA, PEFT, SSF,
    FacT, NOAH), and one at most may add prompts (VPT, NOAH)."""

    def __post_init__(self) -> None:
        methods = self.methods if isinstance(self.methods, list | tuple) else ()
        read = tuple(from_json("adapt", m) if isinstance(m, dict) else m for m in methods)
        if len(read) < 2 or not all(
            isinstance(m, AdapterConfig) and not isinstance(m, Combined) for m in read
        ):
            raise ValueError(
                f"methods must be two or more fine-tuning methods, got {self.methods}."
            )
        object.__setattr__(self, "methods", read)

    def build(self, vit: ViTShape) -> "CombinedAdapter":
        """Make the adapters.

        Raises:
            ValueError: If a method does not fit the backbone, or two act inside of it.
        """
        return CombinedAdapter(self, vit)


class CombinedAdapter(Adapter):
    """Runs several adapters: each reads what the backbone gives, and what they add is summed."""

    def __init__(self, config: Combined, vit: ViTShape) -> None:
        super().__init__()
        self.methods = nn.ModuleList(method.build(vit) for method in config.methods)
        adapters = self._adapters
        inside = [
            type(method).__name__
            for method, adapter in zip(config.methods, adapters, strict=True)
            if adapter.in_backbone
        ]
        if len(inside) > 1:
            raise ValueError(
                f"methods: {inside[0]} and {inside[1]} both act inside of the backbone's layers; "
                "one such method at most can be combined with others."
            )
        self.adds_prompts = _one_of("add prompts", [a.adds_prompts for a in adapters])
        self.replaces_class_token = _one_of(
            "replace the class token", [a.replaces_class_token for a in adapters]
        )
        self.asks_blocks = any(adapter.asks_blocks for adapter in adapters)
        self.needs_grid = any(adapter.needs_grid for adapter in adapters)
        self.depends_on_other_tokens = any(a.depends_on_other_tokens for a in adapters)
        self.reads_ffn_input = any(adapter.reads_ffn_input for adapter in adapters)
        self.in_backbone = bool(inside)
        self.is_additive = all(adapter.is_additive for adapter in adapters)

    @property
    def _adapters(self) -> list[Adapter]:
        return list(self.methods)  # type: ignore[arg-type]  # a ModuleList names no type

    def install(self, vit: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Let each adapter act on the backbone, and choose which of its weights train."""
        for adapter in self._adapters:
            adapter.install(vit, blocks)

    def switch(self, *, on: bool) -> None:
        """Start or stop all adapters."""
        for adapter in self._adapters:
            adapter.switch(on=on)

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Let each adapter prepare the tokens."""
        for adapter in self._adapters:
            tokens = adapter.before_block(layer, tokens)
        return tokens

    def ask_block(
        self, layer: int, tokens: Tokens, ask: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> dict[str, Tensor]:
        """Let each adapter that has queries send them through the block."""
        aside = tokens.aside
        for adapter in self._adapters:
            if adapter.asks_blocks:
                aside = aside | adapter.ask_block(layer, tokens, ask)
        return aside

    def beside_attention(self, layer: int, x_BND: Tensor, tokens: Tokens) -> Tensor | None:
        """Return the sum of what the adapters add to attention."""
        return _sum([a.beside_attention(layer, x_BND, tokens) for a in self._adapters])

    def after_ffn(self, layer: int, out: Tensor) -> Tensor:
        """Return the output of the FFN as one adapter after the other changes it."""
        for adapter in self._adapters:
            out = adapter.after_ffn(layer, out)
        return out

    def beside_ffn(
        self, layer: int, tokens: Tokens, ffn_input: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the sum of what the adapters add to the FFN, and all that they carry."""
        carried = tokens.carried
        added = []
        for adapter in self._adapters:
            branch, changed = adapter.beside_ffn(layer, tokens, ffn_input)
            added.append(branch)
            carried = carried | changed
        return _sum(added), carried

    def after_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Let each adapter finish, the last one first: prompts leave as they came."""
        for adapter in reversed(self._adapters):
            tokens = adapter.after_block(layer, tokens)
        return tokens


def _one_of(what: str, which: Sequence[bool]) -> bool:
    """Whether one method does something; a ValueError if more than one does."""
    if sum(which) > 1:
        raise ValueError(f"methods: {sum(which)} of them {what}; one at most can.")
    return any(which)


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of what is there; None if nothing is."""
    given = [part for part in parts if part is not None]
    return sum(given[1:], start=given[0]) if given else None
