"""The adapters of one backbone, which take turns: exactly one is active at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.backbones import Anatomy, new_head
from tokendial.decode import DecoderConfig
from tokendial.model.heads import check_headless, head_names, head_size
from tokendial.model.sharing import BackboneUser, check_sharing
from tokendial.model.slot import AdapterSlot
from tokendial.reduce.base import ReducerConfig

DEFAULT = "default"
"""Name of the adapter that a model was wrapped with."""


class AdapterSet:
    """Adapters by name; the active one is in the backbone, the others are outside of it."""

    def __init__(
        self,
        anatomy: Anatomy,
        reduce: ReducerConfig | None,
        adapt: AdapterConfig | None,
        decode: DecoderConfig | None,
    ) -> None:
        """Build the default adapter; `install_default` puts it into the backbone.

        Args:
            anatomy: The parts of the backbone.
            reduce: The reduction method, of which every adapter has its own module.
            adapt: The default adapter's fine-tuning method.
            decode: The default adapter's decoder.

        Raises:
            ValueError: If a method does not fit the backbone or another method.
        """
        check_headless(anatomy, decode)
        self.anatomy = anatomy
        """The parts of the backbone that the adapters share."""
        self.reduce = reduce
        """The reduction method; None: there is none."""
        self.slots = {DEFAULT: self._build(adapt, decode, head_size(anatomy))}
        """All adapters by name."""
        self.active = DEFAULT
        """Name of the active adapter."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, in the order in which they were added."""
        return tuple(self.slots)

    @property
    def default_slot(self) -> AdapterSlot:
        """The adapter that the model was wrapped with."""
        return self.slots[DEFAULT]

    @property
    def active_slot(self) -> AdapterSlot:
        """The active adapter."""
        return self.slots[self.active]

    @property
    def changes_backbone(self) -> bool:
        """Whether any adapter changes the backbone, now or when it becomes active."""
        return len(self.slots) > 1 or self.default_slot.config is not None

    def check_unmerged(self) -> None:
        """Raise a ValueError if the active adapter is merged into the backbone."""
        if self.active_slot.adapter.merged:
            raise ValueError("the adapters are merged: call unmerge_adapters() first.")

    # Adding, choosing and deleting adapters.

    def install_default(self) -> None:
        """Put the default adapter into the backbone for the first time, if there is one."""
        if self.default_slot.config is None:
            return
        vit = self.anatomy.vit
        heads = {name: vit.get_submodule(name) for name in head_names(self.anatomy)}
        self.default_slot.install(vit, self.anatomy.blocks, heads, shared=False)

    def new_slot(
        self,
        name: str,
        adapt: AdapterConfig,
        num_classes: int | None,
        decode: DecoderConfig | None,
    ) -> AdapterSlot:
        """Build another adapter for `add`; see `DialViT.add_adapter` for the arguments.

        Raises:
            ValueError: If it cannot be added.
        """
        self._record_head_size()
        self._check_new(name)
        default = self.default_slot
        size = default.head_size if num_classes is None else num_classes
        if type(size) is not int or size < 0 or bool(size) != bool(default.head_size):
            allowed = "at least 1" if default.head_size else "None: this model has no head"
            raise ValueError(f"num_classes must be {allowed}, got {num_classes}.")
        self.check_unmerged()
        check_headless(self.anatomy, decode)
        return self._build(adapt, decode or default.decode, size)

    def add(self, name: str, slot: AdapterSlot, user: BackboneUser) -> None:
        """Add an adapter, which stays inactive.

        Args:
            name: Its name.
            slot: What `new_slot` returned.
            user: The model of this set.

        Raises:
            ValueError: If the method does not fit, or another model has the backbone.
        """
        vit = self.anatomy.vit
        with self._active_off():
            check_sharing(vit, user, adapts=True)
            names = head_names(self.anatomy)
            heads = {head: new_head(vit.get_submodule(head), slot.head_size) for head in names}
            slot.install(vit, self.anatomy.blocks, heads, shared=True)
            slot.take_off(vit)
        self.slots[name] = slot

    def check_known(self, name: str) -> None:
        """Raise a ValueError unless there is an adapter of that name."""
        if name not in self.slots:
            raise ValueError(f"name must be one of {', '.join(self.slots)}, got {name!r}.")

    def activate(self, name: str) -> None:
        """Replace the active adapter; if that fails, the old one stays active."""
        self._record_head_size()
        vit, before = self.anatomy.vit, self.active_slot
        before.take_off(vit)
        try:
            self.slots[name].put_on(vit)
        except BaseException:
            before.put_on(vit)
            raise
        self.active = name

    def delete(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: If there is none of that name, or it is active or the default.
        """
        self.check_known(name)
        if name in (DEFAULT, self.active):
            raise ValueError(f"{name!r} is active or the default, so it cannot be deleted.")
        del self.slots[name]

    # Giving the backbone back, or using another one.

    def leave_backbone(self, *, merge: bool) -> None:
        """Take the active adapter out of the backbone; see `DialViT.unwrap`.

        Raises:
            ValueError: If it cannot be merged, or has a decoder that would be lost (both with
                `merge` only).
        """
        vit, slot = self.anatomy.vit, self.active_slot
        if not merge:
            if slot.adapter.merged:
                slot.adapter.unmerge()
            slot.remove(vit)
            return
        if slot.decoder is not None:
            raise ValueError("the backbone cannot hold the decoder: use unwrap(merge=False).")
        if not slot.adapter.merged and _has_own_weights(slot.adapter):
            try:
                slot.adapter.merge()
            except ValueError as error:
                raise ValueError(
                    f"{str(error).rstrip('.')}; unwrap(merge=False) gives the backbone without it."
                ) from None
        slot.dissolve(vit, head_names(self.anatomy))

    def check_replaceable(self, anatomy: Anatomy) -> None:
        """Raise a ValueError unless the adapters can use another backbone from now on."""
        if any(slot.adapter.in_backbone for slot in self.slots.values()):
            raise ValueError(
                "vit cannot be replaced: an adapter has put layers into it; wrap the other one."
            )
        same_shapes = _shapes(anatomy.vit) == _shapes(self.anatomy.vit)
        if type(anatomy) is not type(self.anatomy) or not same_shapes:
            raise ValueError("vit must be a model of the same kind and shape as the present one.")

    def replace_backbone(self, anatomy: Anatomy) -> None:
        """Use another backbone, in which the same parameters train."""
        if self.changes_backbone:
            pairs = zip(anatomy.vit.parameters(), self.anatomy.vit.parameters(), strict=True)
            for new, present in pairs:
                new.requires_grad_(present.requires_grad)
        self.anatomy = anatomy

    def _build(
        self, adapt: AdapterConfig | None, decode: DecoderConfig | None, size: int
    ) -> AdapterSlot:
        """An adapter that is not yet in the backbone, with its own reducer and decoder."""
        shape = self.anatomy.shape
        reducer = self.reduce.build(shape) if self.reduce else None
        adapter = adapt.build(shape) if adapt else Adapter()
        if adapter.needs_grid and reducer and not reducer.keeps_grid:
            raise ValueError(
                f"{type(adapt).__name__} needs the tokens of all patches in every layer, but "
                f"{type(self.reduce).__name__} takes some away; use it with DAR, DyT or FFNMerge."
            )
        if adapter.replaces_class_token and not (decode is None and self._reads_class_token()):
            raise ValueError(
                f"{type(adapt).__name__} needs a model with one head, or none, that reads the "
                "class token alone: not a decoder, two heads, pooled patches or a clip."
            )
        decoder = decode.build(shape) if decode else None
        return AdapterSlot(adapt, adapter, reducer, size, decode, decoder)

    def _reads_class_token(self) -> bool:
        """Whether the model's logits are those of the class token alone."""
        anatomy = self.anatomy
        one_head = len(anatomy.heads) < 2  # the second one reads a distillation token
        return anatomy.shape.has_class_token and anatomy.head_reads_prefix_only and one_head

    def _check_new(self, name: object) -> None:
        """Raise a ValueError unless `name` can be the name of another adapter."""
        if not isinstance(name, str) or not name or name in self.slots:
            raise ValueError(f"name must be one that is not taken, got {name!r}.")
        if self.default_slot.trains_backbone:
            raise ValueError(
                f"{type(self.default_slot.config).__name__} trains the backbone that all adapters "
                "share: wrap the model without it, and add it by add_adapter()."
            )

    def _record_head_size(self) -> None:
        """Note the active adapter's head size: its head may have been replaced."""
        self.active_slot.head_size = head_size(self.anatomy)

    @contextmanager
    def _active_off(self) -> Iterator[None]:
        """Run a block of code while no adapter is in the backbone."""
        self.active_slot.take_off(self.anatomy.vit)
        try:
            yield
        finally:
            self.active_slot.put_on(self.anatomy.vit)


def _has_own_weights(adapter: Adapter) -> bool:
    """Whether an adapter acts by more than weights of the backbone."""
    return adapter.in_backbone or next(adapter.parameters(), None) is not None


def _shapes(vit: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in vit.named_parameters()}
