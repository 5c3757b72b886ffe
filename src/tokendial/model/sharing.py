"""Which wrapped models use the same backbone: an adapter may not change the model of another."""

from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from tokendial.model.slot import method_in_backbone


class BackboneUser(Protocol):
    """A wrapped model, as far as sharing its backbone matters."""

    vit: nn.Module
    """Its backbone at present."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of its adapters."""


_USERS: "WeakKeyDictionary[nn.Module, WeakSet[BackboneUser]]" = WeakKeyDictionary()
"""The wrapped models of each backbone, as long as they live."""


def add_user(vit: nn.Module, model: BackboneUser) -> None:
    """Note that a model uses a backbone."""
    _USERS.setdefault(vit, WeakSet()).add(model)


def remove_user(vit: nn.Module, model: BackboneUser) -> None:
    """Note that a model does not use a backbone any more; a copied model was never noted."""
    _USERS.get(vit, WeakSet()).discard(model)


def check_sharing(vit: nn.Module, model: BackboneUser, *, adapts: bool) -> None:
    """Raise a ValueError if `model` or another model would change the backbone that both use.

    Args:
        vit: The backbone.
        model: The model that is to use it.
        adapts: Whether `model` brings an adapter.
    """
    if method := method_in_backbone(vit):
        raise ValueError(
            f"this backbone holds the {method} of a wrapped model: give that model more "
            "adapters by add_adapter(), or wrap a fresh backbone."
        )
    others = [user for user in _USERS.get(vit, ()) if user is not model and user.vit is vit]
    if any(adapts or len(other.adapters) > 1 for other in others):
        raise ValueError(
            "another wrapped model has this backbone, and an adapter would change both: wrap a "
            "copy (copy.deepcopy), or give that model the adapter by add_adapter()."
        )
