"""One block of a ViT: attention, reduction, FFN, and the adapter beside them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tokendial.adapt.base import Adapter
from tokendial.attention import AttentionKernel, ByProducts, attend
from tokendial.backbones import Anatomy
from tokendial.reduce.base import Reducer
from tokendial.tokens import Tokens


@dataclass(slots=True)
class Step:
    """State after one block."""

    layer: int
    """The block, counted from 1."""
    tokens: Tokens
    """Tokens that leave the block."""
    attended: ByProducts
    """By-products of the block's attention: those that the reducer or the caller needs."""
    entered: Tokens | None
    """Tokens that the block's attention saw, prompts included, after any reduction before the
    block. None if positions are not tracked."""


@dataclass(frozen=True, slots=True)
class BlockRunner:
    """Runs the blocks of a backbone at one degree, with a reducer and an adapter."""

    anatomy: Anatomy
    """Calls the backbone's own layers."""
    reducer: Reducer | None
    """The reduction method; None at degree 0 or without one."""
    degree: int
    """The degree of the dial. A value of its own, so that a block which the backward pass
    recomputes finds the degree that it first ran at."""
    adapter: Adapter
    """The active adapter."""
    kernel: AttentionKernel
    """How attention is computed."""

    def run(
        self,
        layer: int,
        tokens: Tokens,
        needs: frozenset[str] = frozenset(),
        *,
        prefix_only: bool = False,
    ) -> Step:
        """Run one block.

        Args:
            layer: The block, counted from 1.
            tokens: Tokens that enter it.
            needs: By-products of attention to return, besides those that the reducer needs.
            prefix_only: Leave out the outputs of patch tokens, which then serve as keys and values
                only. For the last block, if the head reads prefix tokens only.
        """
        reducer, adapter, degree = self.reducer, self.adapter, self.degree
        # 1. What the model does between its blocks (YOLOS), a reduction before the block
        # (DynamicViT), and tokens of the adapter (prompts).
        if self.anatomy.acts_between_blocks:
            tokens = self.anatomy.enter_block(layer, tokens)
        if reducer is not None:
            tokens = reducer.before_block(layer, degree, tokens)
        tokens = adapter.before_block(layer, tokens)
        entered = None if tokens.origin is None else tokens

        # 2. Attention. Methods reduce patch tokens: of prefix tokens only, nothing can be reduced.
        acting = None
        if reducer is not None and not prefix_only and reducer.reduces_in(layer, degree):
            acting = reducer
            needs = needs | acting.needs
        tokens, attended = self._attention(layer, tokens, needs, prefix_only)

        # 3. A reduction between attention and FFN (ToMe, EViT).
        if acting is not None:
            seen = tokens.guarded() if tokens.num_protected else tokens
            grouping = acting.group(layer, degree, seen, attended)
            if grouping is not None:
                tokens = tokens.apply_grouping(grouping, track_size=acting.tracks_size)

        # 4. The FFN, on all tokens or on those that the reducer chooses (DyT, DAR, FFNMerge).
        tokens = self._ffn(layer, tokens, attended, acting)
        return Step(layer, adapter.after_block(layer, tokens), attended, entered)

    def _attention(
        self, layer: int, tokens: Tokens, needs: frozenset[str], prefix_only: bool
    ) -> tuple[Tokens, ByProducts]:
        """Tokens after attention and its residual connection."""
        x = self.anatomy.attention_input(layer, tokens.x)
        heads, attended, tokens = self._attend(layer, x, tokens, needs, prefix_only)
        if prefix_only:
            tokens, x = tokens.prefix_only(), x[:, : tokens.prefix]
        if "attention_input" in needs:
            attended.attention_input = x
        change = self.anatomy.attention_branch(layer, heads, x)
        if "shift" in needs:
            attended.shift = torch.linalg.vector_norm(change.detach(), dim=-1, dtype=torch.float32)
        out = tokens.x + change
        branch = self.adapter.beside_attention(layer, x, tokens)
        return replace(tokens, x=out if branch is None else out + branch), attended

    def _attend(
        self, layer: int, x: Tensor, tokens: Tokens, needs: frozenset[str], prefix_only: bool
    ) -> tuple[Tensor, ByProducts, Tokens]:
        """Outputs of all heads. Queries, keys and values are freed when this returns."""
        q, k, v = self.anatomy.qkv(layer, x, tokens)
        scale, dropout = self.anatomy.attention_settings(layer)
        weighs_sizes = self.reducer is not None and self.reducer.proportional_attention
        attention = partial(
            attend,
            k_BHMC=k,
            v_BHMC=v,
            scale=scale,
            dropout=dropout,
            size_BM=tokens.size if weighs_sizes else None,
            policy_BN=tokens.policy,
            kernel=self.kernel,
        )
        heads, attended = attention(
            q[:, :, : tokens.prefix] if prefix_only else q,
            needs=needs - {"shift", "attention_input"},
        )
        if self.adapter.asks_blocks:
            ask = partial(self._ask, layer, tokens, attention)
            tokens = replace(tokens, aside=self.adapter.ask_block(layer, tokens, ask))
        return heads, attended, tokens

    def _ask(
        self,
        layer: int,
        tokens: Tokens,
        attention: Callable[..., tuple[Tensor, ByProducts]],
        queries_BQD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What attention and FFN add to queries of the adapter, [B, Q, D] each.

        The queries read the keys and values of the tokens. No token reads them. Where the model
        rotates patches by their positions, queries are not rotated, like prefix tokens.
        """
        anatomy, nowhere = self.anatomy, None
        if tokens.rope is not None:
            nowhere = queries_BQD.new_zeros(len(queries_BQD), 0, dtype=torch.long)
        asking = replace(tokens, x=queries_BQD, prefix=queries_BQD.shape[1], position=nowhere)
        x = anatomy.attention_input(layer, queries_BQD)
        # The keys and values of the queries themselves are not needed.
        q, _, _ = anatomy.qkv(layer, x, asking)
        heads, _ = attention(q, of_tokens=False)
        of_attention = anatomy.attention_branch(layer, heads, x)
        ffn_input = anatomy.ffn_input(layer, queries_BQD + of_attention)
        return of_attention, anatomy.ffn_branch(layer, ffn_input)

    def _ffn(
        self, layer: int, tokens: Tokens, attended: ByProducts, acting: Reducer | None
    ) -> Tokens:
        """Tokens after the FFN and its residual connection."""
        adapter, ran = self.adapter, None
        if acting is not None:
            ffn = partial(self._ffn_branch, layer)
            seen = tokens.guarded() if tokens.num_protected else tokens
            ran = acting.around_ffn(layer, self.degree, seen, attended, ffn)
        if ran is None:
            ffn_input = self.anatomy.ffn_input(layer, tokens.x)
            out = adapter.after_ffn(layer, self.anatomy.ffn_branch(layer, ffn_input))
            x, selected = tokens.x + out, None
        else:
            x, selected = ran
            ffn_input = None
            if adapter.reads_ffn_input:
                ffn_input = self.anatomy.ffn_input(layer, tokens.x)
        branch, carried = adapter.beside_ffn(layer, tokens, ffn_input)
        x = x if branch is None else x + branch
        return replace(tokens, x=x, carried=carried, selected=selected)

    def _ffn_branch(self, layer: int, x: Tensor) -> Tensor:
        """What the FFN adds to the tokens `x` [..., D] that a reducer chose."""
        branch = self.anatomy.ffn_branch(layer, self.anatomy.ffn_input(layer, x))
        return self.adapter.after_ffn(layer, branch)
