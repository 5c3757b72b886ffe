"""`attach`: turn the dial of the ViTs inside of a larger model, which stays as it is."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy
from tokendial.backbones.kinds import SUPPORTED
from tokendial.backbones.towers import find_towers, refused_towers
from tokendial.backbones.windowed import WINDOWED, WindowedEncoder
from tokendial.measure.cost import Cost, count_macs_in_parts
from tokendial.model.arguments import check_method
from tokendial.model.dial import check_degree
from tokendial.model.dialed_blocks import BlocksDial
from tokendial.model.dialed_ffns import FFNsDial
from tokendial.model.tower_dial import DialedPart, TowerDial
from tokendial.reduce.base import ReducerConfig


class Tower:
    """A ViT inside of a larger model, with a dial."""

    def __init__(self, name: str, dial: TowerDial) -> None:
        self.name = name
        """Name of the ViT in the model, as in `named_modules`; "" for the model itself."""
        self._dial = dial

    def __repr__(self) -> str:
        kind = type(self.module).__name__
        return f"Tower({self.name!r}, {kind}, degree={self.degree} of 0 to {self.degrees[-1]})"

    @property
    def module(self) -> nn.Module:
        """The ViT itself."""
        return self._dial.vit

    @property
    def degrees(self) -> tuple[int, ...]:
        """Positions of the dial; 0 is the model as it was."""
        return self._dial.reducer.degrees

    @property
    def degree(self) -> int:
        """The present degree."""
        return self._dial.degree

    def set_degree(self, degree: int) -> None:
        """Turn the dial of this ViT.

        Raises:
            ValueError: If it is not one of `degrees`.
        """
        self._dial.set_degree(degree)

    def cost(self, degree: int | None = None) -> Cost:
        """Cost of one image of the configured size in this ViT.

        Args:
            degree: The degree; None: the present one.

        Raises:
            ValueError: If it is not one of `degrees`.
        """
        before = self.degree
        self.set_degree(before if degree is None else degree)
        try:
            return self._dial.cost()
        finally:
            self.set_degree(before)


class AttachedDial:
    """The dial of the ViTs inside of a model; `attach` returns it.

    As a context manager, it detaches at the end of the block.
    """

    def __init__(self, model: nn.Module, towers: Iterable[Tower]) -> None:
        self.model = model
        """The model."""
        self._towers = tuple(towers)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The ViTs that were found in the model. Each can also be turned by itself.

        Raises:
            ValueError: If the dial is detached.
        """
        if not self._towers:
            raise ValueError("the dial is detached: call td.attach(model, ...) again.")
        return self._towers

    def __repr__(self) -> str:
        return f"AttachedDial({type(self.model).__name__}, {list(self._towers)})"

    def __enter__(self) -> "AttachedDial":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    @property
    def degrees(self) -> tuple[int, ...]:
        """Positions that the dials of all towers offer; 0 is the model as it was."""
        first, *others = (tower.degrees for tower in self.towers)
        return tuple(d for d in first if all(d in degrees for degrees in others))

    @property
    def degree(self) -> int:
        """The present degree of the first tower."""
        return self.towers[0].degree

    def set_degree(self, degree: int) -> None:
        """Turn the dials of all towers.

        Raises:
            ValueError: If it is not one of `degrees`.
        """
        check_degree(degree, self.degrees)
        for tower in self.towers:
            tower.set_degree(degree)

    @contextmanager
    def protecting(self, mask: Tensor) -> Iterator[None]:
        """Leave chosen patches alone in all towers while a block of code runs.

        Args:
            mask: See `DialViT.protecting`.

        Raises:
            ValueError: If it is no such mask, or a tower cannot protect patches: its attention is
                in windows, or it pads batches.
        """
        dials = [tower._dial for tower in self.towers]
        try:
            for dial in dials:
                dial.protect(mask)
            yield
        finally:
            for dial in dials:
                dial.protect(None)

    def cost(self, degree: int | None = None) -> Cost:
        """Cost of one image in each of the towers, together; the rest of the model is left out.

        `tokens_per_layer` lists the towers one after another.

        Args:
            degree: The degree of all towers; None: each at its present one.

        Raises:
            ValueError: If it is not one of `degrees`.
        """
        if degree is not None:
            check_degree(degree, self.degrees)
        costs = [tower.cost(degree) for tower in self.towers]
        return Cost(
            degree=costs[0].degree,
            params=sum(cost.params for cost in costs),
            trainable_params=sum(cost.trainable_params for cost in costs),
            macs=sum(cost.macs for cost in costs),
            tokens_per_layer=tuple(count for cost in costs for count in cost.tokens_per_layer),
        )

    def cost_of_call(self, *inputs: Any, degree: int | None = None, **named: Any) -> int:
        """Multiply-accumulates of a call of the whole model, towers and all else.

        This is the number to compare times with: a tower that has half of the model's cost can
        make the model at most twice as fast.

        Args:
            *inputs: Arguments of the model, such as images or token ids.
            degree: The degree of all towers; None: each at its present one.
            **named: Its named arguments.

        Raises:
            ValueError: If `degree` is not one of `degrees`.
        """
        before = [tower.degree for tower in self.towers]
        if degree is not None:
            self.set_degree(degree)
        try:
            return count_macs_in_parts(lambda: self.model(*inputs, **named), ())[0]
        finally:
            for tower, own in zip(self.towers, before, strict=True):
                tower.set_degree(own)

    def detach(self) -> None:
        """Give the model back as it was; nothing happens if it is detached already."""
        for tower in self._towers:
            tower._dial.leave()
        self._towers = ()


def attach(
    model: nn.Module,
    reduce: ReducerConfig,
    *,
    towers: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
) -> AttachedDial:
    """Give the ViTs inside of a larger model a dial, in place.

    Everything around them stays as it is, and so do their names, weights, inputs and outputs: last
    and intermediate hidden states and feature maps have every position, because reductions are
    undone. So a pipeline, a training script or `save_pretrained` notices nothing but the speed.
    With `td.wrap` one gets a model that can also be fine-tuned with adapters, saved and served.

    Args:
        model: Any model that holds ViTs: CLIP, a depth or detection model, a vision language
            model, or a ViT itself.
        reduce: A reduction method without weights of its own, such as `ToMe(r=8)`. Each tower
            starts at the degree that its settings say.
        towers: Which ViTs get a dial: names as in `model.named_modules()`, or a function of name
            and module that returns whether. None: all.

    Returns:
        The handle: `set_degree`, `degrees`, `cost`, `towers`, `detach`.

    Raises:
        ValueError: If the model has no ViT that is supported, `towers` names none of those that
            were found, one has a dial already, or the method has weights or does not fit.

    Example:
        >>> import timm, torch, tokendial as td
        >>> model = torch.nn.Sequential(timm.create_model("vit_tiny_patch16_224", depth=2))
        >>> with td.attach(model, td.ToMe(r=8)) as dial:
        ...     dial.set_degree(16)
        ...     model(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r:.60}.")
    if reduce is None:
        raise ValueError("reduce must be a reduction method such as td.ToMe(r=8), got None.")
    check_method("reduce", reduce)
    if any(isinstance(module, DialedPart) for module in model.modules()):
        raise ValueError(
            "model has a dial already: use td.attached(model), or call detach() of its handle."
        )
    found = find_towers(model)
    dials = {name: _dial(found[name], reduce) for name in _chosen(found, towers, model)}
    for name, dial in dials.items():
        own = [part for part in dial.parts if "forward" in vars(part)]
        if any("_old_forward" not in vars(part) for part in own):  # that of Accelerate's hooks
            raise ValueError(
                f"a module in {name or 'model'} has a forward method that was set on the instance, "
                "which would hide the dial: remove it first."
            )
    for dial in dials.values():
        dial.enter()
    return AttachedDial(model, (Tower(name, dial) for name, dial in dials.items()))


def attached(model: nn.Module) -> AttachedDial:
    """The handle of a model that `attach` gave a dial, such as a copy of that model.

    Raises:
        ValueError: If no ViT in the model has a dial.
    """
    dials = {id(m.tower_dial): m.tower_dial for m in model.modules() if isinstance(m, DialedPart)}
    if not dials:
        raise ValueError("model has no dial: call td.attach(model, td.ToMe(r=8)) first.")
    names = {id(module): name for name, module in model.named_modules()}
    return AttachedDial(model, (Tower(names.get(id(d.vit), ""), d) for d in dials.values()))


def _dial(tower: Anatomy | WindowedEncoder, reduce: ReducerConfig) -> TowerDial:
    if isinstance(tower, WindowedEncoder):
        return FFNsDial(tower, reduce)
    return BlocksDial(tower, reduce)


def _chosen(found: dict[str, Any], towers: Any, model: nn.Module) -> list[str]:
    """Names of the ViTs that get a dial."""
    refused = refused_towers(model)
    if not found and refused:
        listed = "; ".join(f"{name!r}, {reason}" for name, reason in refused.items())
        raise ValueError(
            f"model ({type(model).__name__}) holds no ViT that can have a dial: {listed}."
        )
    if not found:
        raise ValueError(
            f"model ({type(model).__name__}) holds no ViT that is supported. Supported are "
            f"{SUPPORTED}; with FFNMerge only {', '.join(WINDOWED)}."
        )
    listed = ", ".join(
        f"{name!r} ({type(anatomy.vit).__name__})" for name, anatomy in found.items()
    )
    if towers is None:
        return list(found)
    if callable(towers):
        chosen = [name for name, anatomy in found.items() if towers(name, anatomy.vit)]
        if not chosen:
            raise ValueError(f"towers chooses none of the ViTs in the model: {listed}.")
        return chosen
    chosen = [towers] if isinstance(towers, str) else list(towers)
    if not chosen or (unknown := [name for name in chosen if name not in found]):
        got = repr(unknown[0]) if chosen else "none"
        if chosen and unknown[0] in refused:
            got += f", which cannot have a dial ({refused[unknown[0]]})"
        raise ValueError(f"towers must be names of ViTs in the model: {listed}, got {got}.")
    return chosen
