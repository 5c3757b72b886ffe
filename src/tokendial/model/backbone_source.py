"""How to build the backbone of a model again, although the model may have changed since."""

import dataclasses

from tokendial.backbones import Anatomy, Backbone
from tokendial.model.heads import head_size


class BackboneSource:
    """The description of a backbone when it was wrapped. Later changes are found against it."""

    def __init__(self, anatomy: Anatomy, given: Backbone | None) -> None:
        """Record a backbone.

        Args:
            anatomy: Its parts.
            given: How to build it; None: read from the backbone.
        """
        found = Backbone.of(anatomy.vit)
        self._given = given or found
        self._args = found.args
        self._head_size = head_size(anatomy)

    def describe(self, anatomy: Anatomy) -> Backbone:
        """How to build the backbone with its present head and settings."""
        now = Backbone.of(anatomy.vit).args
        changed = {name: now[name] for name in now if now[name] != self._args.get(name)}
        changed.pop("num_classes", None)  # a model may say one number and have another head
        backbone = dataclasses.replace(self._given, args={**self._given.args, **changed})
        size = head_size(anatomy)
        return backbone if size == self._head_size else backbone.with_head(size)
