"""DialViT: runs a ViT block by block, with a reducer, an adapter and the dial."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokendial.adapt.base import AdapterConfig
from tokendial.attention import ByProducts, attend
from tokendial.backbones import Backbone
from tokendial.decode import DecoderConfig
from tokendial.measure.cost import Cost, count_macs
from tokendial.model.adapted import AdaptedViT, check_degree
from tokendial.passes import ForwardPass
from tokendial.reduce.base import ReducerConfig
from tokendial.tokens import Tokens, to_grid


def wrap(
    vit: nn.Module,
    *,
    reduce: ReducerConfig | None = None,
    adapt: AdapterConfig | None = None,
    decode: DecoderConfig | None = None,
    backbone: Backbone | None = None,
) -> "DialViT":
    """Give a ViT token reduction, an adapter and the dial.

    Args:
        vit: A model of timm (VisionTransformer, Eva; for clips those of `video_vit` and videomae_*)
            or of transformers (ViT, DeiT, Dinov2, CLIPVisionModel). It stays `model.vit`; with an
            adapter its weights are frozen as the method says.
        reduce: Reduction method, such as `ToMe(r=8)`; None: none.
        adapt: Fine-tuning method, such as `DenseAdapter(dim=32)`; None: which weights train is
            left as it is.
        decode: Decoder of dense tasks, such as `DARDecoder()`, on a `vit` without a head; None: the
            head of `vit` gives the logits.
        backbone: How `vit` was built, written into saved models; None: read from `vit`.

    Returns:
        A module with the logits of `vit` at degree 0 (a model without a head: its pooled
        features; with a decoder: its logit maps).

    Raises:
        ValueError: If the model is not supported, a method does not fit it, or another wrapped
            model has it and one of both brings adapters. `vit` is then as it was.

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
    return DialViT(vit, reduce=reduce, adapt=adapt, decode=decode, backbone=backbone)


@dataclass(slots=True)
class Step:
    """State after one block."""

    layer: int
    """The block, counted from 1."""
    tokens: Tokens
    """Tokens that leave it."""
    attended: ByProducts
    """By-products of its attention."""
    entered: Tokens | None
    """Tokens that its attention saw: after reductions before the block, with prompts. Kept if
    positions are tracked; None otherwise."""


class DialViT(AdaptedViT):
    """A ViT with token reduction, an adapter and a dial; built by `wrap`."""

    checkpoint_activations: bool = False
    """Whether training recomputes the blocks in the backward pass instead of keeping their
    activations: less memory, more time."""
    fused_attention: bool = True
    """Whether the fused kernel computes attention, see `attend`."""
    key_multiple: int = 1
    """Attention gets keys for a multiple of so many tokens, see `attend`."""
    sizes_in_keys: bool = False
    """Whether token sizes become channels of the keys, see `attend`."""
    skips_unread: bool = False
    """Whether the last block leaves out patch tokens, in `forward` alone, if the head reads prefix
    tokens only: the logits are the same, and nobody looks at the rest."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images [B, 3, H, W], or of clips [B, T, 3, H, W], at the present degree.

        Returns:
            [B, num_classes]; with a decoder [B, num_classes, h, w], at the decoder's resolution.
        """
        unread = self.skips_unread and self._reads_prefix_alone
        for step in self._steps_to_logits(images, skip_unread=unread):
            tokens = step.tokens
            del step  # as `steps` does
        return self._logits(tokens)

    @property
    def _reads_prefix_alone(self) -> bool:
        """Whether nothing reads the patch tokens that leave the last block."""
        if self.decoder is not None or self.adapter.needs_grid or self.adapter.needs_all:
            return False
        return self.anatomy.reads_prefix_alone

    def forward_at(self, images: Tensor, degrees: Sequence[int]) -> Tensor:
        """Logits of a batch whose images want degrees of their own; each degree runs once.

        With a compensator, attach it with `merge=False`: turning is free then.

        Args:
            images: [B, 3, H, W].
            degrees: One for each image.

        Raises:
            ValueError: If there are not as many degrees as images, or one is not in `degrees`.
        """
        if len(degrees) != len(images):
            raise ValueError(
                f"degrees must be one for each of the {len(images)} images, got {len(degrees)}."
            )
        if not degrees:
            return self(images)  # type: ignore[no-any-return]
        before = self.degree
        rows = {d: [i for i, own in enumerate(degrees) if own == d] for d in sorted(set(degrees))}
        parts = []
        try:
            for degree, some in rows.items():
                self.set_degree(degree)
                parts.append(self(images[some]))
        finally:
            self.set_degree(before)
        order = torch.tensor([i for some in rows.values() for i in some], device=images.device)
        return torch.cat(parts)[order.argsort()]

    def outcome(self, images: Tensor) -> ForwardPass:
        """Logits, features and the tokens of every layer: what the losses of methods read."""
        tokens = [step.tokens for step in self._steps_to_logits(images)]
        last = tokens[-1]
        read = self.restored_map(last) if self.decoder else None
        logits = self.decoder(read) if self.decoder else self.anatomy.classify(last)
        return ForwardPass(self.degree, logits.float(), self.anatomy.norm(last.x), tokens, read)

    def _steps_to_logits(self, images: Tensor, *, skip_unread: bool = False) -> Iterator[Step]:
        # A decoder needs every position back.
        track = self.decoder is not None
        return self._steps(images, track=track, dropped="own", skip_unread=skip_unread)

    def _logits(self, tokens: Tokens) -> Tensor:
        if self.decoder is None:
            return self.anatomy.classify(tokens)
        logits: Tensor = self.decoder(self.restored_map(tokens))
        return logits

    def restored_map(self, tokens: Tokens, *, norm: bool = True) -> Tensor:
        """The feature map [B, D, rows, columns] of tokens that were tracked, reductions undone.

        Of clips: the maps of all frames (time steps, where frames were joined), [B * T, ...].

        Args:
            tokens: That leave a block.
            norm: Apply the final norm.
        """
        rows, columns = tokens.grid
        x = tokens.restored()[:, -tokens.grids * rows * columns :]
        return to_grid(self.anatomy.norm(x) if norm else x, tokens.grid)

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
        return self._steps(images, track=track, dropped=dropped, needs=needs)

    def _steps(
        self,
        images: Tensor,
        *,
        track: bool,
        dropped: Literal["own", "fused"],
        needs: frozenset[str] = frozenset(),
        skip_unread: bool = False,
    ) -> Iterator[Step]:
        tokens = self.anatomy.embed(images)
        if track:
            tokens = tokens.tracked(fused_count=dropped == "fused")
        run = self._block
        if self.checkpoint_activations and self.training:
            run = partial(checkpoint, self._block, use_reentrant=False)
        degree = self.degree  # a recomputed block has to find it as it was
        # The number is never negative. That it decides something here, in a statement that Python
        # keeps, makes a compiled model depend on it: it is compiled anew when hooks change.
        depth = len(self.anatomy.blocks) if self.hooks >= 0 else 0
        for layer in range(1, depth + 1):
            step = run(layer, degree, tokens, needs, skip_unread and layer == depth)
            tokens = step.tokens
            yield step
            del step  # what it holds besides the tokens is not needed while the next block runs

    def _block(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        needs: frozenset[str],
        prefix_alone: bool = False,
    ) -> Step:
        reducer = self.reducer if degree else None
        if reducer:
            tokens = reducer.before_block(layer, degree, tokens)
        tokens = self.adapter.before_block(layer, tokens)
        # Methods reduce patch tokens; after the attention of prefix tokens alone there are none.
        acts = reducer and not prefix_alone and reducer.acts(layer, degree)
        acting = reducer if acts else None
        # Features that nobody will look at are not held while the FFN runs.
        entered = None if tokens.origin is None else tokens
        tokens, attended = self._attention(
            layer,
            tokens,
            needs=needs | acting.needs if acting else needs,
            size_BN=tokens.size if reducer and reducer.proportional_attention else None,
            prefix_alone=prefix_alone,
        )
        if acting:
            grouping = acting.group(layer, degree, tokens, attended)
            if grouping is not None:
                tokens = tokens.reduced(grouping, track_size=acting.tracks_size)
        around = partial(acting.around_ffn, layer, degree, tokens, attended) if acting else None
        tokens = self.adapter.after_block(layer, self._ffn(layer, tokens, around))
        return Step(layer, tokens, attended, entered)

    def _attention(
        self,
        layer: int,
        tokens: Tokens,
        *,
        needs: frozenset[str],
        size_BN: Tensor | None,
        prefix_alone: bool,
    ) -> tuple[Tokens, ByProducts]:
        anatomy = self.anatomy
        x = anatomy.attention_input(layer, tokens.x)
        q, k, v = anatomy.qkv(layer, x, tokens)
        if prefix_alone:  # they see all tokens
            tokens = tokens.prefix_alone()
            x, q = x[:, : tokens.prefix], q[:, :, : tokens.prefix]
        scale, dropout = anatomy.attention_settings(layer)
        heads, attended = attend(
            q,
            k,
            v,
            scale=scale,
            dropout=dropout,
            size_BN=size_BN,
            policy_BN=tokens.policy,
            needs=needs,
            fused=self.fused_attention,
            key_multiple=self.key_multiple,
            sizes_in_keys=self.sizes_in_keys,
        )
        del q, k, v  # what follows finds their memory free
        out = tokens.x + anatomy.attention_branch(layer, heads, x)
        beside = self.adapter.beside_attention(layer, x, tokens)
        return replace(tokens, x=out if beside is None else out + beside), attended

    def _ffn(
        self,
        layer: int,
        tokens: Tokens,
        around: Callable[[Callable[[Tensor], Tensor]], tuple[Tensor, Tensor | None] | None] | None,
    ) -> Tokens:
        anatomy, adapter = self.anatomy, self.adapter

        def ffn(x: Tensor) -> Tensor:
            branch = anatomy.ffn_branch(layer, anatomy.ffn_input(layer, x))
            return adapter.after_ffn(layer, branch)

        reduced = around(ffn) if around else None
        ffn_input = None
        if reduced is None or adapter.reads_ffn_input:
            ffn_input = anatomy.ffn_input(layer, tokens.x)
        if reduced is None:
            assert ffn_input is not None
            out = adapter.after_ffn(layer, anatomy.ffn_branch(layer, ffn_input))
            x, selected = tokens.x + out, None
        else:
            x, selected = reduced
        branch, carried = adapter.beside_ffn(layer, tokens, ffn_input)
        x = x if branch is None else x + branch
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
            [B, D, rows, columns]; the class and other prefix tokens are left out. Of clips:
            [B, T, D, rows, columns] (T: frames, or time steps where frames were joined).

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
            [B, D, rows, columns] for each layer, in the order of `layers`; of clips as
            `feature_map` says.

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
                maps[step.layer] = self.restored_map(step.tokens, norm=norm)
            if step.layer == max(layers):
                break
        found = [maps[layer] for layer in layers]
        if self.anatomy.frames is None:
            return found
        return [each.reshape(-1, self.anatomy.time_steps, *each.shape[1:]) for each in found]

    def cost(self, degree: int | None = None) -> Cost:
        """Parameters, multiply-accumulates and tokens of one image of the configured size.

        Of one clip, if this is a video model; tokens are then those of a sequence: of a frame where
        frames run by themselves.

        Args:
            degree: Degree to look at; None: the present one.

        Raises:
            ValueError: If `degree` is not one of `degrees`.
        """
        before = self.degree
        tokens: list[int] = []

        def run(call: nn.Module) -> None:
            dtype = next(self.parameters()).dtype
            images = torch.empty(1, *self.anatomy.input_shape, device="meta", dtype=dtype)
            for step in self._steps_to_logits(images):
                tokens.append(step.tokens.x.shape[1])
            self._logits(step.tokens)

        try:
            if degree is not None:
                check_degree(degree, self.degrees)
                self._degree = int(degree)  # weights need not follow to be counted
            macs = count_macs(self, run)
            at = self.degree
        finally:
            self._degree = before
        readouts = [*self.anatomy.heads, *([self.decoder] if self.decoder else [])]
        heads = {id(p) for readout in readouts for p in readout.parameters()}
        return Cost(
            degree=at,
            params=sum(p.numel() for p in self.parameters()),
            trainable_params=sum(
                p.numel() for p in self.trainable_parameters() if id(p) not in heads
            ),
            macs=macs,
            tokens_per_layer=tuple(tokens),
        )
