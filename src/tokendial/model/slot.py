"""How one adapter is put into a backbone and taken out again, so that several can take turns."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.decode import DecoderConfig
from tokendial.reduce.base import Reducer

_METHOD_IN_BACKBONE = "carried_adapter"
"""Attribute of a backbone that names the method whose layers or hooks are in it."""


def method_in_backbone(vit: nn.Module) -> str | None:
    """Name of the method whose layers or hooks are in a backbone; None if there are none."""
    return getattr(vit, _METHOD_IN_BACKBONE, None)


@dataclass(slots=True)
class AdapterSlot:
    """One adapter with its head or decoder, and what it exchanges in the backbone.

    While the slot is on, its layers and weights are in the backbone and the slot stores the ones
    that they replace; while it is off, the other way round. Exchanging modules and parameters
    involves no arithmetic, so adapters can take turns without rounding errors.
    """

    config: AdapterConfig | None
    """The fine-tuning method; None: the backbone is used as it is."""
    adapter: Adapter
    """The module that runs the method."""
    reducer: Reducer | None
    """The adapter's own copy of the reducer, because some reducers have weights that train."""
    head_size: int
    """Number of classes of the adapter's head in the backbone; 0 without a head."""
    decode: DecoderConfig | None
    """The decoder method that replaces the head; None: there is no decoder."""
    decoder: nn.Module | None
    """The module that runs the decoder."""
    trains_backbone: bool = False
    """Whether it trains weights of the backbone itself, in place."""
    layers: dict[str, nn.Module] = field(default_factory=dict)
    """Exchanged modules by their names in the backbone: the backbone's while the slot is on, the
    adapter's while it is off."""
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    """Exchanged parameters by their names in the backbone, stored like `layers`."""
    trainable: dict[str, bool] = field(default_factory=dict)
    """Recorded when the slot is switched off: which parameters of the backbone train while on."""
    trainable_before: dict[str, bool] = field(default_factory=dict)
    """Which parameters of the backbone trained before `install`; empty if nothing was installed."""

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
            shared: Whether other adapters use the backbone too. If so, the method trains copies of
                the backbone's weights instead of the weights themselves.

        Raises:
            ValueError: If the method does not fit; the backbone is left as it was.
        """
        before, own = dict(vit.named_modules()), {id(p) for p in vit.parameters()}
        self.trainable_before = {name: p.requires_grad for name, p in vit.named_parameters()}
        vit.requires_grad_(False)
        for name, head in heads.items():
            vit.set_submodule(name, head)
        try:
            self.adapter.install(vit, blocks)
        except BaseException:
            self._record_replaced_layers(vit, before)
            self.remove(vit)
            raise
        self._record_replaced_layers(vit, before)
        changed = {n: p for n, p in vit.named_parameters() if p.requires_grad and id(p) in own}
        self.trains_backbone = bool(changed) and not shared
        if shared:
            for name, parameter in changed.items():
                parameter.requires_grad_(False)
                self.weights[name] = nn.Parameter(parameter.detach().clone())
            self._exchange_weights(vit)
        for head in heads.values():
            head.requires_grad_(True)
        self._mark(vit)

    def put_on(self, vit: nn.Module) -> None:
        """Put the adapter back into the backbone, on the backbone's device and in its dtype."""
        like = next(vit.parameters())
        for module in (self.adapter, self.reducer, self.decoder, *self.layers.values()):
            if module is not None:
                module.to(like.device, like.dtype).train(vit.training)
        for parameter in self.weights.values():
            parameter.data = parameter.data.to(like.device, like.dtype)
        self._exchange_layers(vit)
        self._exchange_weights(vit)
        for name, parameter in vit.named_parameters():
            if name in self.trainable:  # not so for a head that was replaced meanwhile
                parameter.requires_grad_(self.trainable[name])
        self.adapter.switch(on=True)
        self._mark(vit)

    def take_off(self, vit: nn.Module) -> None:
        """Leave the backbone as it was without the adapter."""
        self.trainable = {name: p.requires_grad for name, p in vit.named_parameters()}
        self._exchange_weights(vit)
        self._exchange_layers(vit)
        self.adapter.switch(on=False)
        vit.__dict__.pop(_METHOD_IN_BACKBONE, None)

    def remove(self, vit: nn.Module) -> None:
        """Leave the backbone as `install` found it, while the adapter is on."""
        self.take_off(vit)
        self._restore_trainable(vit)

    def dissolve(self, vit: nn.Module, heads: Collection[str]) -> None:
        """Take the adapter's layers out, but keep its head and the weights that it trained.

        Args:
            vit: The backbone, with the adapter on and merged if it has weights of its own.
            heads: Names of the heads in `vit`.
        """
        for name, module in self.layers.items():
            if name not in heads:
                vit.set_submodule(name, module)
        self.adapter.switch(on=False)
        vit.__dict__.pop(_METHOD_IN_BACKBONE, None)
        self._restore_trainable(vit)

    def _restore_trainable(self, vit: nn.Module) -> None:
        for name, parameter in vit.named_parameters():
            if name in self.trainable_before:
                parameter.requires_grad_(self.trainable_before[name])

    def _mark(self, vit: nn.Module) -> None:
        if self.adapter.in_backbone:
            setattr(vit, _METHOD_IN_BACKBONE, type(self.config).__name__)

    def _record_replaced_layers(self, vit: nn.Module, before: Mapping[str, nn.Module]) -> None:
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
