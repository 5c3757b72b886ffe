"""The adapters of one backbone, which take turns: exactly one is active at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokendial.model.slot import AdapterSlot

DEFAULT = "default"
"""Name of the adapter that a model was wrapped with."""


class AdapterSet:
    """Adapters by name; the active one is in the backbone, the others are outside of it."""

    def __init__(self, default: AdapterSlot) -> None:
        self.slots = {DEFAULT: default}
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

    @property
    def has_layers_in_backbone(self) -> bool:
        """Whether any adapter acts by layers or hooks in the backbone."""
        return any(slot.adapter.in_backbone for slot in self.slots.values())

    def check_known(self, name: str) -> None:
        """Raise a ValueError unless there is an adapter of that name."""
        if name not in self.slots:
            raise ValueError(f"name must be one of {', '.join(self.slots)}, got {name!r}.")

    def check_new(self, name: object) -> None:
        """Raise a ValueError unless `name` can be the name of another adapter."""
        if not isinstance(name, str) or not name or name in self.slots:
            raise ValueError(f"name must be one that is not taken, got {name!r}.")
        if self.default_slot.trains_backbone:
            raise ValueError(
                f"{type(self.default_slot.config).__name__} trains the backbone that all adapters "
                "share: wrap the model without it, and add it by add_adapter()."
            )

    @contextmanager
    def active_off(self, vit: nn.Module) -> Iterator[None]:
        """Run a block of code while no adapter is in the backbone."""
        self.active_slot.take_off(vit)
        try:
            yield
        finally:
            self.active_slot.put_on(vit)

    def activate(self, name: str, vit: nn.Module) -> None:
        """Replace the active adapter; if that fails, the old one stays active."""
        before = self.active_slot
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
