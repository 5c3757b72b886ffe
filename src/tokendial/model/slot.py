"""How an adapter sits in a backbone, so that several can take turns in one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.decode import DecoderConfig
from tokendial.reduce.base import Reducer

_CARRIED = "carried_adapter"
"""Attribute of a backbone that says which method's layers or hooks stand in it."""


def carried_by(vit: nn.Module) -> str | None:
    """Name of the method whose layers or hooks stand in a backbone; None: it has only its own."""
    return getattr(vit, _CARRIED, None)


@dataclass(slots=True)
class Fitting:
    """An adapter, and what changes in the backbone when it is put on or taken off."""

    config: AdapterConfig | None
    """The method; None: the backbone as it is."""
    adapter: Adapter
    reducer: Reducer | None
    """Of its own, because some have weights that train."""
    head_size: int
    """Width of the logits of its head in the backbone; 0 without one."""
    decode: DecoderConfig | None
    """What reads the feature map instead of a head; None: nothing does."""
    decoder: nn.Module | None
    """Runs it."""
    in_place: bool = False
    """Whether it trains weights that belong to the backbone itself."""
    layers: dict[str, nn.Module] = field(default_factory=dict)
    """By name: while it is off, its layers; while it is on, the backbone's that they replace."""
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    """The same for single parameters."""
    trained: dict[str, bool] = field(default_factory=dict)
    """While it is off: which parameters of the backbone train when it is on."""
    found: dict[str, bool] = field(default_factory=dict)
    """Which of them trained before it was installed."""

    def install(
        self,
        vit: nn.Module,
        blocks: Sequence[nn.Module],
        heads: Mapping[str, nn.Module],
        *,
        shared: bool,
    ) -> None:
        """Put the adapter into a backbone for the first time.

        Args:
            vit: The backbone, with no adapter on.
            blocks: Its blocks, in order.
            heads: The heads to train, by their names in `vit`; new ones replace the old.
            shared: Whether others use the backbone too: weights of it that the method trains are
                copied first.

        Raises:
            ValueError: If the method does not fit; the backbone is left as it was.
        """
        before, own = dict(vit.named_modules()), {id(p) for p in vit.parameters()}
        self.found = {name: p.requires_grad for name, p in vit.named_parameters()}
        vit.requires_grad_(False)
        for name, head in heads.items():
            vit.set_submodule(name, head)
        try:
            self.adapter.install(vit, blocks)
        except BaseException:
            self._note_layers(vit, before)
            self.remove(vit)
            raise
        self._note_layers(vit, before)
        changed = {n: p for n, p in vit.named_parameters() if p.requires_grad and id(p) in own}
        self.in_place = bool(changed) and not shared
        if shared:
            for name, parameter in changed.items():
                parameter.requires_grad_(False)
                self.weights[name] = nn.Parameter(parameter.detach().clone())
            self._exchange_weights(vit)
        for head in heads.values():
            head.requires_grad_(True)
        self._mark(vit)

    def remove(self, vit: nn.Module) -> None:
        """Leave the backbone as `install` found it, while the adapter is on."""
        self.take_off(vit)
        for name, parameter in vit.named_parameters():
            parameter.requires_grad_(self.found[name])

    def put_on(self, vit: nn.Module) -> None:
        """Put the adapter back on, where the backbone is now and in its arithmetic."""
        like = next(vit.parameters())
        for module in (self.adapter, self.reducer, self.decoder, *self.layers.values()):
            if module is not None:
                module.to(like.device, like.dtype).train(vit.training)
        for parameter in self.weights.values():
            parameter.data = parameter.data.to(like.device, like.dtype)
        self._exchange_layers(vit)
        self._exchange_weights(vit)
        for name, parameter in vit.named_parameters():
            if name in self.trained:  # a head may have come since
                parameter.requires_grad_(self.trained[name])
        self.adapter.switch(on=True)
        self._mark(vit)

    def take_off(self, vit: nn.Module) -> None:
        """Leave the backbone as it was without the adapter."""
        self.trained = {name: p.requires_grad for name, p in vit.named_parameters()}
        self._exchange_weights(vit)
        self._exchange_layers(vit)
        self.adapter.switch(on=False)
        vit.__dict__.pop(_CARRIED, None)

    def _mark(self, vit: nn.Module) -> None:
        if self.adapter.in_backbone:
            setattr(vit, _CARRIED, type(self.config).__name__)

    def _note_layers(self, vit: nn.Module, before: Mapping[str, nn.Module]) -> None:
        """Find what `install` has replaced."""
        for name, module in vit.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in self.layers)
            if before.get(name) is not module and not inside:
                self.layers[name] = before[name]

    def _exchange_layers(self, vit: nn.Module) -> None:
        for name, module in self.layers.items():
            self.layers[name] = vit.get_submodule(name)
            vit.set_submodule(name, module)

    def _exchange_weights(self, vit: nn.Module) -> None:
        for name, parameter in self.weights.items():
            owner, _, leaf = name.rpartition(".")
            self.weights[name] = vit.get_parameter(name)
            setattr(vit.get_submodule(owner), leaf, parameter)
