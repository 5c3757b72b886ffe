"""AdaptedViT: a ViT, its dial, the adapters that take turns in it, and what is saved of them."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.backbones import Backbone, anatomy_of, fingerprint, fresh_head
from tokendial.decode import DecoderConfig
from tokendial.model.slot import Fitting, carried_by
from tokendial.reduce.base import ReducerConfig


class Compensation(Protocol):
    """Changes weights of the model whenever the dial turns; see `tokendial.compensate`."""

    @property
    def in_weights(self) -> bool:
        """Whether the weights are changed now, rather than what layers give."""

    def on(self) -> None:
        """Begin, at the degree of the model."""

    def off(self) -> None:
        """Give the model its own weights back."""

    def turn(self, degree: int) -> None:
        """Follow the dial."""


DEFAULT = "default"
"""Name of the adapter that a model was wrapped with."""
_MODELS: "WeakKeyDictionary[nn.Module, WeakSet[AdaptedViT]]" = WeakKeyDictionary()
"""The wrapped models that share a backbone, as long as they live."""


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
        self._described = Backbone.of(vit)
        self.fingerprint = fingerprint(vit)
        self.vit: Any = vit
        self.check_headless(decode)
        self._wrapped_head_size = self._head_size
        fitting = self._fitting(adapt, decode, self._head_size)
        self.compensation: Compensation | None = None
        """What turns with the dial, if a compensator is attached."""
        self._degree = 0
        if fitting.reducer:
            check_degree(fitting.reducer.degree, fitting.reducer.degrees)
            self._degree = fitting.reducer.degree
        self._check_alone(vit, adapts=adapt is not None)
        if adapt:
            heads = {name: vit.get_submodule(name) for name in self.head_names}
            fitting.install(vit, self.anatomy.blocks, heads, shared=False)
        self._fittings = {DEFAULT: fitting}
        self._activate(DEFAULT)
        _MODELS.setdefault(vit, WeakSet()).add(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "vit" and "vit" in self.__dict__.get("_modules", ()):
            self._follow(value)
        super().__setattr__(name, value)

    def _follow(self, vit: nn.Module) -> None:
        """Run another backbone from now on; a ValueError if it cannot replace the present one."""
        if getattr(self, "_is_replica", False):  # torch.nn.DataParallel puts in the replica's
            self.anatomy = type(self.anatomy)(vit)
            return
        anatomy, present = anatomy_of(vit), self.vit
        if self.compensation:
            raise ValueError("a compensator is attached: detach it before vit is replaced.")
        if any(fitting.adapter.in_backbone for fitting in self._fittings.values()):
            raise ValueError(
                "vit cannot be replaced: an adapter has put layers into it; wrap the other one."
            )
        if type(anatomy) is not type(self.anatomy) or _shapes(vit) != _shapes(present):
            raise ValueError("vit must be a model of the same kind and shape as the present one.")
        self._check_alone(vit, adapts=self._adapts)
        if self._adapts:
            for own, theirs in zip(vit.parameters(), present.parameters(), strict=True):
                own.requires_grad_(theirs.requires_grad)
        self.anatomy, self.fingerprint = anatomy, fingerprint(vit)
        _MODELS.setdefault(vit, WeakSet()).add(self)

    @property
    def _adapts(self) -> bool:
        """Whether it changes its backbone, now or when adapters take turns."""
        return len(self._fittings) > 1 or self._fittings[DEFAULT].config is not None

    def _check_alone(self, vit: nn.Module, *, adapts: bool) -> None:
        """Raise a ValueError if this model or another one would change what both run."""
        if carried := carried_by(vit):
            raise ValueError(
                f"this backbone holds the {carried} of a wrapped model: give that model more "
                "adapters by add_adapter(), or wrap a fresh backbone."
            )
        others = [m for m in _MODELS.get(vit, ()) if m is not self and m.vit is vit]
        if any(adapts or len(model._fittings) > 1 for model in others):
            raise ValueError(
                "another wrapped model has this backbone, and an adapter would change both: wrap a "
                "copy (copy.deepcopy), or give that model the adapter by add_adapter()."
            )

    def release_backbone(self) -> None:
        """Give the backbone back as `wrap` found it; the model cannot be used any more."""
        if self._fittings[DEFAULT].config is not None:
            self._fittings[DEFAULT].remove(self.vit)
        _MODELS[self.vit].discard(self)

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

    def check_headless(self, decode: DecoderConfig | None) -> None:
        """Raise a ValueError if this model cannot have a decoder, but should."""
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
        self.note_hooks()

    @property
    def backbone(self) -> Backbone:
        """How to build the backbone again, with the head and the settings that it has now."""
        before, now = self._described.args, Backbone.of(self.vit).args
        changed = {name: now[name] for name in now if now[name] != before.get(name)}
        changed.pop("num_classes", None)  # what a model says, whatever its head is
        backbone = dataclasses.replace(self._backbone, args={**self._backbone.args, **changed})
        size = self._head_size
        return backbone if size == self._wrapped_head_size else backbone.with_head(size)

    @property
    def pretrained_cfg(self) -> Any:
        """timm's notes on the backbone, such as mean and deviation of images; not all have them."""
        return self.vit.pretrained_cfg

    @property
    def default_cfg(self) -> Any:
        """The same by its older name."""
        return self.vit.default_cfg

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
                replace or one beside which no decoder can stand, adapters are merged, the method
                given to `wrap` trains the weights that all would share, or another wrapped model
                has the backbone.
        """
        default = self._fittings[DEFAULT]
        self._note_head_size()
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
        self.check_headless(decode)
        fitting = self._fitting(adapt, decode or default.decode, size)
        active = self._fittings[self.active_adapter]
        with self.own_weights():
            active.take_off(self.vit)
            try:
                self._check_alone(self.vit, adapts=True)
                heads = {
                    head: fresh_head(self.vit.get_submodule(head), size) for head in self.head_names
                }
                fitting.install(self.vit, self.anatomy.blocks, heads, shared=True)
                fitting.take_off(self.vit)
            finally:
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
        self._note_head_size()
        before = self._fittings[self.active_adapter]
        with self.own_weights():
            before.take_off(self.vit)
            try:
                self._fittings[name].put_on(self.vit)
            except BaseException:
                before.put_on(self.vit)
                raise
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
        from tokendial.model.loading import load_adapter

        load_adapter(self, name, directory)

    def _check_adapter(self, name: str) -> None:
        if name not in self._fittings:
            raise ValueError(f"name must be one of {', '.join(self._fittings)}, got {name!r}.")

    def _check_unmerged(self) -> None:
        if self.adapter.merged:
            raise ValueError("the adapters are merged: call unmerge_adapters() first.")

    def _note_head_size(self) -> None:
        """The head of the adapter that acts may be another one than it came with."""
        self._fittings[self.active_adapter].head_size = self._head_size

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

    @property
    def degree(self) -> int:
        """Position of the dial; setting it turns the dial, as `set_degree` does."""
        return self._degree

    @degree.setter
    def degree(self, degree: int) -> None:
        self.set_degree(degree)

    def set_degree(self, degree: int) -> None:
        """Turn the dial.

        Raises:
            ValueError: If `degree` is not one of `degrees`, or an attached compensator does not
                reach it.
        """
        check_degree(degree, self.degrees)
        degree = int(degree)
        if self.compensation:
            self.compensation.turn(degree)
        self._degree = degree

    @contextmanager
    def own_weights(self) -> Iterator[None]:
        """Run a block of code without what an attached compensator does to the weights."""
        compensation, self.compensation = self.compensation, None
        if compensation:
            compensation.off()
        try:
            yield
        finally:
            self.compensation = compensation
            if compensation:
                compensation.on()
            self.note_hooks()

    def _load_from_state_dict(self, *args: Any) -> None:
        # What is loaded would be lost when the kept weights come back.
        self._check_unmerged()
        if self.compensation and self.compensation.in_weights:
            raise ValueError("a compensator is in the weights: detach it before others are loaded.")
        super()._load_from_state_dict(*args)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what was trained, the configuration and the backbone's name; see `load`."""
        from tokendial.model.loading import save

        save(self, Path(directory))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; returns the address."""
        from tokendial.model.loading import push

        return push(self, repo_id, private=private, token=token)


def check_degree(degree: int, degrees: Sequence[int]) -> None:
    """Raise a ValueError unless `degree` is one of those that a dial offers."""
    if isinstance(degree, bool) or degree not in degrees:
        raise ValueError(f"degree must be an integer in [0, {degrees[-1]}], got {degree!r}.")


def _shapes(vit: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in vit.named_parameters()}
