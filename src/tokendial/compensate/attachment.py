"""A compensator that is attached to a model, and how it acts when the dial turns."""

# Shape legend: B batch, N tokens, D embed_dim, K rank of a pair times steps between two degrees.

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokendial.backbones.anatomy import bare
from tokendial.model.dial_vit import DialViT

Part = Literal["query", "value"]
"""Which output of attention's input projection a weight difference belongs to."""
PARTS: tuple[Part, Part] = ("query", "value")


class WeightDifference(Protocol):
    """The low-rank difference of q and v weights that a compensator has for two degrees."""

    depth: int
    steps: int

    @property
    def revision(self) -> str:
        """A text that differs from that of any other difference."""

    def check_degrees(self, source: int, target: int) -> None:
        """Raise a ValueError unless the compensator bridges both degrees."""

    def pair(self, part: Part, layer: int, source: int, target: int) -> tuple[Tensor, Tensor]:
        """`down` [K, D] and `up` [D, K], whose product `up @ down` is the difference."""

    def branch(self, part: Part, layer: int, source: int, target: int, x_BND: Tensor) -> Tensor:
        """The difference applied to `x_BND`, with dropout in training."""


class Attachment:
    """Adds a compensator's difference to the queries and values of one model.

    The difference leads from `source`, the degree that the model was fine-tuned at, to the degree
    of the dial. With `merge` it is written into the weights, each time from pristine copies.
    Otherwise forward hooks add it to the outputs of the layers.
    """

    def __init__(
        self, compensator: WeightDifference, model: DialViT, source: int, *, merge: bool
    ) -> None:
        self.compensator, self.model, self.source, self.merge = compensator, model, source, merge
        self._projections: list[_Projection] = []

    @property
    def steps(self) -> int:
        """Highest degree that the compensator bridges."""
        return self.compensator.steps

    @property
    def revision(self) -> str:
        """A text that differs from that of any other attachment."""
        return f"{self.compensator.revision} {self.source}"

    def start(self) -> None:
        """Find the layers of the active adapter; apply the difference for the present degree."""
        self._projections = [
            _Projection(self, layer, part, outer, rows)
            for layer in range(1, self.compensator.depth + 1)
            for part, (outer, rows) in self.model.anatomy.query_value(layer).items()
        ]
        adapter = self.model.adapter
        # An adapter that scales a layer's output would scale a difference in its weights, too.
        if self.merge and (adapter.is_additive or adapter.merged):
            for projection in self._projections:
                projection.keep_weights()
        else:
            for projection in self._projections:
                projection.add_hook()
        self.set_degree(self.model.degree)

    def stop(self) -> None:
        """Restore the weights, and remove the hooks."""
        for projection in self._projections:
            projection.restore()
        self._projections = []

    def set_degree(self, degree: int) -> None:
        """Write the difference for `degree` into the weights; hooks read the degree themselves.

        Raises:
            ValueError: If the compensator does not bridge `degree`.
        """
        self.compensator.check_degrees(self.source, degree)
        try:
            for projection in self._projections:
                projection.write_difference(degree)
        except BaseException:
            for projection in self._projections:
                projection.write_difference(self.model.degree)
            raise

    @property
    def in_weights(self) -> bool:
        """Whether the model's weights hold the difference now; otherwise hooks add it."""
        return any(projection.kept is not None for projection in self._projections)


class _Projection:
    """The rows of one linear layer that compute the queries or the values of one block."""

    def __init__(
        self, attachment: Attachment, layer: int, part: Part, outer: nn.Module, rows: slice
    ) -> None:
        self.attachment, self.layer, self.part = attachment, layer, part
        self.outer, self.linear, self.rows = outer, bare(outer), rows
        self.kept: Tensor | None = None
        self.handle: RemovableHandle | None = None

    def keep_weights(self) -> None:
        self.kept = self.linear.weight.detach()[self.rows].clone()

    def add_hook(self) -> None:
        # On the outermost module, so that it runs after everything that the adapter does here: the
        # difference belongs to the queries and values of the fine-tuned model.
        self.handle = self.outer.register_forward_hook(self)

    def restore(self) -> None:
        if self.kept is not None:
            self.linear.weight.detach()[self.rows].copy_(self.kept)
        if self.handle is not None:
            self.handle.remove()

    @torch.no_grad()
    def write_difference(self, degree: int) -> None:
        """Set the weights to the kept ones plus the difference; nothing where a hook acts."""
        if self.kept is None:
            return
        attachment, weight = self.attachment, self.linear.weight.detach()[self.rows]
        down, up = (
            matrix.detach().to(weight)
            for matrix in attachment.compensator.pair(
                self.part, self.layer, attachment.source, degree
            )
        )
        kept = self.kept.to(weight)
        if len(down):
            torch.addmm(kept, up, down, out=weight)
        else:
            weight.copy_(kept)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: add the difference to the rows of the output."""
        attachment = self.attachment
        source, degree = attachment.source, attachment.model.degree
        if source == degree:
            return output
        branch = attachment.compensator.branch(self.part, self.layer, source, degree, inputs[0])
        if branch.shape == output.shape:
            return output + branch
        before, after = output[..., : self.rows.start], output[..., self.rows.stop :]
        return torch.cat([before, output[..., self.rows] + branch, after], dim=-1)
