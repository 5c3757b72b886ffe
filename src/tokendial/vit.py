"""DialViT: runs a ViT block by block, with a reducer, an adapter and the dial."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.adapt.fitting import Fitting
from tokendial.attention import Attended, attend
from tokendial.backbones import Backbone, anatomy_of, fingerprint
from tokendial.measure.cost import Cost, count_macs
from tokendial.reduce.base import Outcome, ReducerConfig
from tokendial.tokens import Tokens


def wrap(
    vit: nn.Module,
    *,
    reduce: ReducerConfig | None = None,
    adapt: AdapterConfig | None = None,
    backbone: Backbone | None = None,
) -> "DialViT":
    """Give a ViT token reduction, an adapter and the dial.

    Args:
        vit: A model of timm (VisionTransformer, Eva) or of transformers (ViT, DeiT, Dinov2,
            CLIPVisionModel). It stays `model.vit`; with an adapter its weights are frozen as the
            method says.
        reduce: Reduction method, such as `ToMe(r=8)`; None: none.
        adapt: Fine-tuning method, such as `DenseAdapter(dim=32)`; None: which weights train is
            left as it is.
        backbone: How `vit` was built, written into saved models; None: read from `vit`.

    Returns:
        A module with the logits of `vit` at degree 0 (a model without a head: its pooled
        features).

    Raises:
        ValueError: If the model is not supported or a method does not fit it.

    Example:
        >>> import timm, torch
        >>> from tokendial import ToMe
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> model = wrap(vit, reduce=ToMe(r=8))
        >>> model(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
        >>> model.cost().tokens_per_layer
        (189, 181)
    """
    return DialViT(vit, reduce=reduce, adapt=adapt, backbone=backbone)


DEFAULT = "default"
"""Name of the adapter that a model was wrapped with."""


@dataclass(slots=True)
class Step:
    """State after one block."""

    layer: int
    """The block, counted from 1."""
    tokens: Tokens
    """Tokens that leave it."""
    attended: Attended
    """Its attention output, with the by-products that were asked for."""
    entered: Tokens
    """Tokens that its attention saw: after reductions before the block, with prompts."""


class DialViT(nn.Module):
    """A ViT with token reduction, an adapter and a dial; built by `wrap`."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        reduce: ReducerConfig | None,
        adapt: AdapterConfig | None,
        backbone: Backbone | None,
    ) -> None:
        super().__init__()
        self.anatomy = anatomy_of(vit)
        self.reduce_config = reduce
        self._backbone = backbone or Backbone.of(vit)
        self.fingerprint = fingerprint(vit)
        self.vit: Any = vit
        fitting = self._fitting(adapt, self.num_classes)
        if adapt:
            heads = {name: vit.get_submodule(name) for name in self.head_names}
            fitting.install(vit, self.anatomy.blocks, heads, shared=False)
        fitting.on = True
        self._fittings = {DEFAULT: fitting}
        self._activate(DEFAULT)
        self.checkpoint_activations = False
        """Whether training recomputes the blocks in the backward pass instead of keeping their
        activations: less memory, more time."""
        self.degree = 0
        self.set_degree(self.reducer.degree if self.reducer else 0)

    def _fitting(self, adapt: AdapterConfig | None, num_classes: int) -> Fitting:
        """An adapter that is not yet in the backbone, and a reducer that goes with it."""
        shape, reduce = self.anatomy.shape, self.reduce_config
        reducer = reduce.build(shape) if reduce else None
        adapter = adapt.build(shape) if adapt else Adapter()
        if adapter.needs_grid and reducer and not reducer.keeps_grid:
            raise ValueError(
                f"{type(adapt).__name__} needs the tokens of all patches in every layer, but "
                f"{type(reduce).__name__} takes some away; use it with DAR, DyT or FFNMerge."
            )
        return Fitting(adapt, adapter, reducer, num_classes)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the classification heads in `vit`; none if it has no head."""
        heads = {id(head) for head in self.anatomy.heads if self.num_classes}
        return tuple(name for name, part in self.vit.named_modules() if id(part) in heads)

    def _activate(self, name: str) -> None:
        fitting = self._fittings[name]
        self.active_adapter = name
        """Name of the adapter that acts; "default": the one given to `wrap`."""
        self.adapt_config = fitting.config
        self.adapter, self.reducer = fitting.adapter, fitting.reducer
        other_head = fitting.head_size != self._fittings[DEFAULT].head_size
        self.backbone = (
            self._backbone.with_head(fitting.head_size) if other_head else self._backbone
        )

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters at hand; "default" is the one given to `wrap`."""
        return tuple(self._fittings)

    def add_adapter(
        self, name: str, adapt: AdapterConfig, *, num_classes: int | None = None
    ) -> None:
        """Add an adapter with a head of its own; `set_adapter` lets it act.

        All adapters share the backbone, which is in memory once; what a method trains of the
        backbone's own weights (`Full`, `BitFit`, `LastBlocks`), and the reducer's weights if it has
        some, each adapter has for itself. Only the one that acts is part of `parameters()`,
        `state_dict()` and `cost()`.

        Args:
            name: A name that is not taken.
            adapt: Fine-tuning method, such as `LoRA(rank=8)`.
            num_classes: Width of its head; None: that of the head given to `wrap`.

        Raises:
            ValueError: If the name is taken, the method does not fit, the model has no head to
                replace, adapters are merged, or the method given to `wrap` trains the weights that
                all would share.
        """
        default = self._fittings[DEFAULT]
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
        fitting = self._fitting(adapt, size)
        self._fittings[self.active_adapter].take_off(self.vit)
        heads = {head: _fresh_head(self.vit.get_submodule(head), size) for head in self.head_names}
        try:
            fitting.install(self.vit, self.anatomy.blocks, heads, shared=True)
        finally:
            fitting.take_off(self.vit)
            self._fittings[self.active_adapter].put_on(self.vit)
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
        self._fittings[self.active_adapter].take_off(self.vit)
        self._fittings[name].put_on(self.vit)
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
        from tokendial.saving import load_adapter

        load_adapter(self, name, directory)

    def _check_adapter(self, name: str) -> None:
        if name not in self._fittings:
            raise ValueError(f"name must be one of {', '.join(self._fittings)}, got {name!r}.")

    def _check_unmerged(self) -> None:
        if self.adapter.merged:
            raise ValueError("the adapters are merged: call unmerge_adapters() first.")

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that the dial offers, from 0 (no reduction) to the cheapest."""
        return self.reducer.degrees if self.reducer else (0,)

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 without a head."""
        heads = self.anatomy.heads
        return int(getattr(heads[0], "out_features", 0)) if heads else 0

    def set_degree(self, degree: int) -> None:
        """Turn the dial.

        Raises:
            ValueError: If `degree` is not one of `degrees`.
        """
        if isinstance(degree, bool) or degree not in self.degrees:
            last = self.degrees[-1]
            raise ValueError(f"degree must be an integer in [0, {last}], got {degree!r}.")
        self.degree = int(degree)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W] at the present degree."""
        for step in self.steps(images):
            tokens = step.tokens
        return self.anatomy.classify(tokens)

    def outcome(self, images: Tensor) -> Outcome:
        """Logits, features and the tokens of every layer: what the losses of methods read."""
        tokens = [step.tokens for step in self.steps(images)]
        last = tokens[-1]
        logits, features = self.anatomy.classify(last).float(), self.anatomy.norm(last.x)
        return Outcome(self.degree, logits, features, tokens)

    def steps(
        self,
        images: Tensor,
        *,
        track: bool = False,
        dropped: Literal["own", "fused"] = "fused",
        needs: frozenset[str] = frozenset(),
    ) -> Iterator[Step]:
        """Run block by block.

        Args:
            images: [B, 3, H, W], normalised.
            track: Keep for each original position which token holds it.
            dropped: With `track`: which features restored positions get that were given up for a
                fused token, see `feature_map`.
            needs: By-products of attention (see `tokendial.attention.BY_PRODUCTS`) to return for
                every block, besides those that the reducer needs.

        Yields:
            The state after each block, before the final norm.
        """
        tokens = self.anatomy.embed(images)
        if track:
            tokens = tokens.tracked(fused_count=dropped == "fused")
        run = self._block
        if self.checkpoint_activations and self.training:
            run = partial(checkpoint, self._block, use_reentrant=False)
        degree = self.degree  # a recomputed block has to find it as it was
        for layer in range(1, len(self.anatomy.blocks) + 1):
            step = run(layer, degree, tokens, needs)
            tokens = step.tokens
            yield step

    def _block(self, layer: int, degree: int, tokens: Tokens, needs: frozenset[str]) -> Step:
        reducer = self.reducer if degree else None
        if reducer:
            tokens = reducer.before_block(layer, degree, tokens)
        tokens = self.adapter.before_block(layer, tokens)
        acting = reducer if reducer and reducer.acts(layer, degree) else None
        entered = tokens
        tokens, attended = self._attention(
            layer,
            tokens,
            needs=needs | acting.needs if acting else needs,
            size_BN=tokens.size if reducer and reducer.proportional_attention else None,
        )
        if acting:
            grouping = acting.group(layer, degree, tokens, attended)
            if grouping is not None:
                tokens = tokens.reduced(grouping, track_size=acting.tracks_size)
        around = partial(acting.around_ffn, layer, degree, tokens, attended) if acting else None
        tokens = self.adapter.after_block(layer, self._ffn(layer, tokens, around))
        return Step(layer, tokens, attended, entered)

    def _attention(
        self, layer: int, tokens: Tokens, *, needs: frozenset[str], size_BN: Tensor | None
    ) -> tuple[Tokens, Attended]:
        anatomy = self.anatomy
        x = anatomy.attention_input(layer, tokens.x)
        q, k, v = anatomy.qkv(layer, x, tokens)
        scale, dropout = anatomy.attention_settings(layer)
        attended = attend(
            q,
            k,
            v,
            scale=scale,
            dropout=dropout,
            size_BN=size_BN,
            policy_BN=tokens.policy,
            needs=needs,
        )
        out = tokens.x + anatomy.attention_branch(layer, attended.out, x)
        beside = self.adapter.beside_attention(layer, x, tokens)
        return replace(tokens, x=out if beside is None else out + beside), attended

    def _ffn(
        self,
        layer: int,
        tokens: Tokens,
        around: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor | None]] | None,
    ) -> Tokens:
        anatomy, adapter = self.anatomy, self.adapter
        known: list[Tensor] = []

        def normed() -> Tensor:
            # Adapters may read what the FFN reads; it is computed once.
            if not known:
                known.append(anatomy.ffn_input(layer, tokens.x))
            return known[0]

        def ffn(x: Tensor) -> Tensor:
            y = normed() if x is tokens.x else anatomy.ffn_input(layer, x)
            return adapter.after_ffn(layer, anatomy.ffn_branch(layer, y))

        out, selected = around(ffn) if around else (ffn(tokens.x), None)
        branch, carried = adapter.beside_ffn(layer, tokens, normed)
        x = tokens.x + out if branch is None else tokens.x + out + branch
        return replace(tokens, x=x, carried=carried, selected=selected)

    def feature_map(
        self,
        images: Tensor,
        layer: int | None = None,
        *,
        dropped: Literal["own", "fused"] = "own",
    ) -> Tensor:
        """Features at every patch, all reductions undone.

        Merged tokens are copied back to all their positions.

        Args:
            images: [B, 3, H, W], normalised.
            layer: Block after which to look, counted from 1, before the final norm; None: after
                the last one and the final norm.
            dropped: What positions get whose tokens were given up for a fused one: the features
                that they had then ("own"), or those of the fused token ("fused"). Tokens that were
                dropped without a fused one always keep their own.

        Returns:
            [B, D, rows, columns]; the class and other prefix tokens are left out.

        Raises:
            ValueError: If there is no such layer.
        """
        layers = None if layer is None else [layer]
        return self.feature_maps(images, layers, dropped=dropped, norm=layer is None)[0]

    def feature_maps(
        self,
        images: Tensor,
        layers: Sequence[int] | None = None,
        *,
        dropped: Literal["own", "fused"] = "own",
        norm: bool = False,
    ) -> list[Tensor]:
        """Feature maps after several blocks in one run; like timm's `forward_intermediates`.

        Args:
            images: [B, 3, H, W], normalised.
            layers: Blocks, counted from 1, each once; None: the last one.
            dropped: As in `feature_map`.
            norm: Apply the final norm to each.

        Returns:
            [B, D, rows, columns] for each layer, in the order of `layers`.

        Raises:
            ValueError: If there is no such layer.
        """
        depth = len(self.anatomy.blocks)
        layers = [depth] if layers is None else list(layers)
        if bad := [layer for layer in layers if not 1 <= layer <= depth]:
            raise ValueError(f"layer must lie in [1, {depth}] (counted from 1), got {bad[0]}.")
        if dropped not in ("own", "fused"):
            raise ValueError(f"dropped must be one of own, fused, got {dropped!r}.")
        maps: dict[int, Tensor] = {}
        for step in self.steps(images, track=True, dropped=dropped):
            if step.layer in layers:
                rows, columns = step.tokens.grid
                x = step.tokens.restored()[:, -rows * columns :]
                x = self.anatomy.norm(x) if norm else x
                maps[step.layer] = x.transpose(1, 2).reshape(*x.shape[::2], rows, columns)
            if step.layer == max(layers):
                break
        return [maps[layer] for layer in layers]

    def cost(self, degree: int | None = None) -> Cost:
        """Parameters, multiply-accumulates and tokens of one image of the configured size.

        Args:
            degree: Degree to look at; None: the present one.

        Raises:
            ValueError: If `degree` is not one of `degrees`.
        """
        before = self.degree
        tokens: list[int] = []

        def run(call: nn.Module) -> None:
            size = self.anatomy.image_size
            images = torch.empty(1, self.anatomy.in_chans, *size, device="meta")
            for step in self.steps(images):
                tokens.append(step.tokens.x.shape[1])
            self.anatomy.classify(step.tokens)

        try:
            if degree is not None:
                self.set_degree(degree)
            macs = count_macs(self, run)
            at = self.degree
        finally:
            self.degree = before
        heads = {id(p) for head in self.anatomy.heads for p in head.parameters()}
        return Cost(
            degree=at,
            params=sum(p.numel() for p in self.parameters()),
            trainable_params=sum(
                p.numel() for p in self.trainable_parameters() if id(p) not in heads
            ),
            macs=macs,
            tokens_per_layer=tuple(tokens),
        )

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
        self.adapter.merge()

    def unmerge_adapters(self) -> None:
        """Undo `merge_adapters`, to the bit.

        Raises:
            ValueError: If nothing is merged.
        """
        if not self.adapter.merged:
            raise ValueError("the adapters are not merged.")
        self.adapter.unmerge()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write what was trained, the configuration and the backbone's name; see `load`."""
        from tokendial.saving import save

        save(self, Path(directory))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; returns the address."""
        from tokendial.saving import push

        return push(self, repo_id, private=private, token=token)


def _fresh_head(head: nn.Module, num_classes: int) -> nn.Linear:
    like = head.get_parameter("weight")
    fresh = nn.Linear(like.shape[1], num_classes, device=like.device, dtype=like.dtype)
    nn.init.trunc_normal_(fresh.weight, std=0.02)
    nn.init.zeros_(fresh.bias)
    return fresh
