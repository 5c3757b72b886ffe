"""AdaptedViT: a ViT, its dial, the adapters that take turns in it, and what is saved of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.adapt.fitting import Fitting
from tokendial.backbones import Backbone, anatomy_of, fingerprint, fresh_head
from tokendial.decode import DecoderConfig
from tokendial.reduce.base import ReducerConfig


class Compensation(Protocol):
    """Changes weights of the model whenever the dial turns; see `tokendial.compensate`."""

    def on(self) -> None:
        """Begin, at the degree of the model."""

    def off(self) -> None:
        """Give the model its own weights back."""

    def turn(self, degree: int) -> None:
        """Follow the dial."""


DEFAULT = "default"
"""Name of the adapter that a model was wrapped with."""


class AdaptedViT(nn.Module):
    """A ViT with a reducer and its dial, and adapters, one of which acts."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        reduce: ReducerConfig | None,
        adapt: AdapterConfig | None,
        decode: DecoderConfig | None,
        backbone: Backbone | None,
    ) -> None:
        super().__init__()
        self.anatomy = anatomy_of(vit)
        self.reduce_config = reduce
        self._backbone = backbone or Backbone.of(vit)
        self.fingerprint = fingerprint(vit)
        self.vit: Any = vit
        self._check_headless(decode)
        fitting = self._fitting(adapt, decode, self._head_size)
        if adapt:
            heads = {name: vit.get_submodule(name) for name in self.head_names}
            fitting.install(vit, self.anatomy.blocks, heads, shared=False)
        self._fittings = {DEFAULT: fitting}
        self._activate(DEFAULT)
        self.compensation: Compensation | None = None
        """What turns with the dial, if a compensator is attached."""
        self.degree = 0
        """Position of the dial."""
        self.set_degree(self.reducer.degree if self.reducer else 0)

    def _fitting(
        self, adapt: AdapterConfig | None, decode: DecoderConfig | None, head_size: int
    ) -> Fitting:
        """An adapter that is not yet in the backbone; a reducer and a decoder that go with it."""
        shape, reduce = self.anatomy.shape, self.reduce_config
        reducer = reduce.build(shape) if reduce else None
        adapter = adapt.build(shape) if adapt else Adapter()
        if adapter.needs_grid and reducer and not reducer.keeps_grid:
            raise ValueError(
                f"{type(adapt).__name__} needs the tokens of all patches in every layer, but "
                f"{type(reduce).__name__} takes some away; use it with DAR, DyT or FFNMerge."
            )
        decoder = decode.build(shape) if decode else None
        return Fitting(adapt, adapter, reducer, head_size, decode, decoder)

    def _check_headless(self, decode: DecoderConfig | None) -> None:
        if decode and self.anatomy.frames is not None:
            raise ValueError("a decoder reads images, but this model takes clips.")
        if decode and self._head_size:
            raise ValueError(
                "a decoder needs a backbone without a classification head (num_classes=0), this "
                f"one has {self._head_size} classes."
            )

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the classification heads in `vit`; none if it has no head."""
        heads = {id(head) for head in self.anatomy.heads if self._head_size}
        return tuple(name for name, part in self.vit.named_modules() if id(part) in heads)

    def _activate(self, name: str) -> None:
        fitting = self._fittings[name]
        self.active_adapter = name
        """Name of the adapter that acts; "default": the one given to `wrap`."""
        self.adapt_config = fitting.config
        self.adapter, self.reducer = fitting.adapter, fitting.reducer
        self.decode_config, self.decoder = fitting.decode, fitting.decoder
        other_head = fitting.head_size != self._fittings[DEFAULT].head_size
        self.backbone = (
            self._backbone.with_head(fitting.head_size) if other_head else self._backbone
        )
        self.note_hooks()

    def note_hooks(self) -> None:
        """Number the hooks in the backbone: another number for other hooks.

        `torch.compile` does not look whether hooks have changed, but at this number.
        """
        handles = (handle for module in self.vit.modules() for handle in module._forward_hooks)
        self.hooks = abs(hash(tuple(handles)))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters at hand; "default" is the one given to `wrap`."""
        return tuple(self._fittings)

    def add_adapter(
        self,
        name: str,
        adapt: AdapterConfig,
        *,
        num_classes: int | None = None,
        decode: DecoderConfig | None = None,
    ) -> None:
        """Add an adapter with a head or decoder of its own; `set_adapter` lets it act.

        All adapters share the backbone, which is in memory once; what a method trains of the
        backbone's own weights (`Full`, `BitFit`, `LastBlocks`), and the reducer's weights if it has
        some, each adapter has for itself. Only the one that acts is part of `parameters()`,
        `state_dict()` and `cost()`.

        Args:
            name: A name that is not taken.
            adapt: Fine-tuning method, such as `LoRA(rank=8)`.
            num_classes: Width of its head; None: that of the head given to `wrap`.
            decode: Its decoder; None: a fresh one like that given to `wrap`, if one was.

        Raises:
            ValueError: If the name is taken, the method does not fit, the model has no head to
                replace or one beside which no decoder can stand, adapters are merged, or the method
                given to `wrap` trains the weights that all would share.
        """
        default = self._fittings[DEFAULT]
        if not isinstance(name, str) or not name or name in self._fittings:
            raise ValueError(f"name must be one that is not taken, got {name!r}.")
        if default.in_place:
            raise ValueError(
                f"{type(default.config).__name__} trains the backbone that adapters share: wrap "
                "the model without it, and add it by a name."
            )
        size = default.head_size if num_classes is None else num_classes
        if type(size) is not int or size < 0 or bool(size) != bool(default.head_size):
            allowed = "at least 1" if default.head_size else "None: this model has no head"
            raise ValueError(f"num_classes must be {allowed}, got {num_classes}.")
        self._check_unmerged()
        self._check_headless(decode)
        fitting = self._fitting(adapt, decode or default.decode, size)
        active = self._fittings[self.active_adapter]
        with self.own_weights():
            active.take_off(self.vit)
            heads = {
                head: fresh_head(self.vit.get_submodule(head), size) for head in self.head_names
            }
            try:
                fitting.install(self.vit, self.anatomy.blocks, heads, shared=True)
            finally:
                fitting.take_off(self.vit)
                active.put_on(self.vit)
        self._fittings[name] = fitting

    def set_adapter(self, name: str) -> None:
        """Let the adapter of that name act, with its head.

        Raises:
            ValueError: If there is none of that name, or adapters are merged.
        """
        self._check_adapter(name)
        if name == self.active_adapter:
            return
        self._check_unmerged()
        with self.own_weights():
            self._fittings[self.active_adapter].take_off(self.vit)
            self._fittings[name].put_on(self.vit)
            self._activate(name)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: If there is none of that name, or it acts, or it is the default.
        """
        self._check_adapter(name)
        if name in (DEFAULT, self.active_adapter):
            raise ValueError(f"{name!r} acts or is the default, so it cannot be deleted.")
        del self._fittings[name]

    def save_adapter(self, name: str, directory: str | Path) -> None:
        """Write one adapter with its head, as `save_pretrained` does for the one that acts."""
        active = self.active_adapter
        self.set_adapter(name)
        try:
            self.save_pretrained(directory)
        finally:
            self.set_adapter(active)

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Add an adapter that `save_adapter` or `save_pretrained` wrote; `set_adapter` to use it.

        Args:
            name: A name that is not taken.
            directory: Local folder, or the name of a repository on the Hugging Face hub.

        Raises:
            ValueError: If the folder holds no saved model, or one of another backbone or reduction
                method.
        """
        from tokendial.saving import load_adapter

        load_adapter(self, name, directory)

    def _check_adapter(self, name: str) -> None:
        if name not in self._fittings:
            raise ValueError(f"name must be one of {', '.join(self._fittings)}, got {name!r}.")

    def _check_unmerged(self) -> None:
        if self.adapter.merged:
            raise ValueError("the adapters are merged: call unmerge_adapters() first.")

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 without a head or decoder."""
        return self.decode_config.num_classes if self.decode_config else self._head_size

    @property
    def _head_size(self) -> int:
        heads = self.anatomy.heads
        return int(getattr(heads[0], "out_features", 0)) if heads else 0

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: adapters and heads, or everything in full fine-tuning."""
        return (p for p in self.parameters() if p.requires_grad)

    def merge_adapters(self) -> None:
        """Put linear adapters (LoRA, SSF, FacT) into the backbone's weights: they cost nothing.

        Outputs stay the same up to rounding. The original weights are kept in memory, so that
        `unmerge_adapters` brings back their bits.

        Raises:
            ValueError: If the adapter is not linear, or is merged already.
        """
        if self.adapter.merged:
            raise ValueError("the adapters are merged already.")
        with self.own_weights():
            self.adapter.merge()

    def unmerge_adapters(self) -> None:
        """Undo `merge_adapters`, to the bit.

        Raises:
            ValueError: If nothing is merged.
        """
        if not self.adapter.merged:
            raise ValueError("the adapters are not merged.")
        with self.own_weights():
            self.adapter.unmerge()

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that the dial offers, from 0 (no reduction) to the cheapest."""
        return self.reducer.degrees if self.reducer else (0,)

    def set_degree(self, degree: int) -> None:
        """Turn the dial.

        Raises:
            ValueError: If `degree` is not one of `degrees`, or an attached compensator does not
                reach it.
        """
        self._check_degree(degree)
        if self.compensation:
            self.compensation.turn(degree)
        self.degree = int(degree)

    def _check_degree(self, degree: int) -> None:
        if isinstance(degree, bool) or degree not in self.degrees:
            last = self.degrees[-1]
            raise ValueError(f"degree must be an integer in [0, {last}], got {degree!r}.")

    @contextmanager
    def own_weights(self) -> Iterator[None]:
        """Run a block of code without what an attached compensator does to the weights."""
        if self.compensation:
            self.compensation.off()
        try:
            yield
        finally:
            if self.compensation:
                self.compensation.on()
            self.note_hooks()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what was trained, the configuration and the backbone's name; see `load`."""
        from tokendial.saving import save

        save(self, Path(directory))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; returns the address."""
        from tokendial.saving import push

        return push(self, repo_id, private=private, token=token)
