"""A compensator at work in a model: in its weights, or beside its layers."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokendial.backbones.anatomy import bare
from tokendial.model.dial_vit import DialViT

if TYPE_CHECKING:
    from tokendial.compensate.plugin import Compensator, Part


class Attachment:
    """Changes the queries and values of a model whenever its dial turns."""

    def __init__(
        self, compensator: "Compensator", model: DialViT, source: int, *, merge: bool
    ) -> None:
        self.compensator, self.model, self.source, self.merge = compensator, model, source, merge
        self._places: list[_Place] = []

    def on(self) -> None:
        """Find the layers of the adapter that acts, keep their weights, and turn to the degree."""
        self._places = [
            _Place(self, layer, part, outer, rows)
            for layer in range(1, self.compensator.depth + 1)
            for part, (outer, rows) in self.model.anatomy.query_value(layer).items()
        ]
        adapter = self.model.adapter
        # What does more than add to a layer's output would change a difference in its weights, too.
        if self.merge and (adapter.adds or adapter.merged):
            for place in self._places:
                place.keep()
        else:
            for place in self._places:
                place.hook()
        self.turn(self.model.degree)

    def off(self) -> None:
        """Give the layers back what they had."""
        for place in self._places:
            place.restore()
        self._places = []

    def turn(self, degree: int) -> None:
        """Make the weights those of a degree; a ValueError if the compensator does not reach it."""
        self.compensator.rows(self.source, degree)
        try:
            for place in self._places:
                place.put(degree)
        except BaseException:
            for place in self._places:
                place.put(self.model.degree)
            raise

    @property
    def in_weights(self) -> bool:
        """Whether the model's weights hold the difference now, rather than hooks add it."""
        return any(place.kept is not None for place in self._places)


class _Place:
    """The rows of one linear layer that make the queries or values of one block."""

    def __init__(
        self, attachment: Attachment, layer: int, part: "Part", outer: nn.Module, rows: slice
    ) -> None:
        self.attachment, self.layer, self.part = attachment, layer, part
        self.outer, self.linear, self.rows = outer, bare(outer), rows
        self.kept: Tensor | None = None
        self.handle: RemovableHandle | None = None

    def keep(self) -> None:
        self.kept = self.linear.weight.detach()[self.rows].clone()

    def hook(self) -> None:
        # After everything that the adapter does here: the difference is one of the tuned model's
        # queries and values.
        self.handle = self.outer.register_forward_hook(self)

    def restore(self) -> None:
        if self.kept is not None:
            self.linear.weight.detach()[self.rows].copy_(self.kept)
        if self.handle is not None:
            self.handle.remove()

    @torch.no_grad()
    def put(self, degree: int) -> None:
        if self.kept is None:
            return
        attachment, weight = self.attachment, self.linear.weight.detach()[self.rows]
        down, up = (
            half.detach().to(weight)
            for half in attachment.compensator.pair(
                self.part, self.layer, attachment.source, degree
            )
        )
        kept = self.kept.to(weight)
        if len(down):
            torch.addmm(kept, up, down, out=weight)
        else:
            weight.copy_(kept)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        attachment = self.attachment
        source, degree = attachment.source, attachment.model.degree
        if source == degree:
            return output
        branch = attachment.compensator.branch(self.part, self.layer, source, degree, inputs[0])
        if branch.shape == output.shape:
            return output + branch
        before, after = output[..., : self.rows.start], output[..., self.rows.stop :]
        return torch.cat([before, output[..., self.rows] + branch, after], dim=-1)
