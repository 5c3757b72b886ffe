"""DialViT: runs a timm ViT block by block, with a reducer, an adapter and the dial."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokendial.adapt.base import Adapter, AdapterConfig
from tokendial.attention import Attended, attend
from tokendial.backbones import (
    HEADS,
    Backbone,
    check_supported,
    classify,
    embed,
    fingerprint,
    shape_of,
)
from tokendial.measure.cost import Cost, count_macs
from tokendial.reduce.base import ReducerConfig
from tokendial.tokens import Tokens


def wrap(
    vit: VisionTransformer,
    *,
    reduce: ReducerConfig | None = None,
    adapt: AdapterConfig | None = None,
    backbone: Backbone | None = None,
) -> "DialViT":
    """Give a timm ViT token reduction, an adapter and the dial.

    Args:
        vit: A timm model made of the standard pre-norm block. It stays `model.vit`; with an
            adapter its weights are frozen as the method says.
        reduce: Reduction method, such as `ToMe(r=8)`; None: none.
        adapt: Fine-tuning method, such as `DenseAdapter(dim=32)`; None: which weights train is
            left as it is.
        backbone: How `vit` was built, written into saved models; None: read from `vit`.

    Returns:
        A module with the logits of `vit` at degree 0.

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
    check_supported(vit)
    return DialViT(vit, reduce=reduce, adapt=adapt, backbone=backbone or Backbone.of(vit))


@dataclass(slots=True)
class Step:
    """State after one block."""

    layer: int
    """The block, counted from 1."""
    tokens: Tokens
    """Tokens that leave it."""
    attended: Attended
    """Its attention output, with the by-products that were asked for."""


class DialViT(nn.Module):
    """A timm ViT with token reduction, an adapter and a dial; built by `wrap`."""

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        reduce: ReducerConfig | None,
        adapt: AdapterConfig | None,
        backbone: Backbone,
    ) -> None:
        super().__init__()
        shape = shape_of(vit)
        self.reduce_config, self.adapt_config, self.backbone = reduce, adapt, backbone
        self.fingerprint = fingerprint(vit)
        self.reducer = reduce.build(shape) if reduce else None
        self.adapter = adapt.build(shape) if adapt else Adapter()
        self.vit = vit
        if adapt:
            vit.requires_grad_(False)
            self.adapter.install(vit)
            for head in self._heads():
                head.requires_grad_(True)
        self.degree = 0
        self.set_degree(self.reducer.degree if self.reducer else 0)

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that the dial offers, from 0 (no reduction) to the cheapest."""
        return self.reducer.degrees if self.reducer else (0,)

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
        return classify(self.vit, tokens)

    def steps(
        self,
        images: Tensor,
        *,
        track: bool = False,
        needs: frozenset[str] = frozenset(),
    ) -> Iterator[Step]:
        """Run block by block.

        Args:
            images: [B, 3, H, W], normalised.
            track: Keep for each original position which token holds it.
            needs: By-products of attention ("mean_keys", "class_attention") to return for every
                block, besides those that the reducer needs.

        Yields:
            The state after each block, before the final norm.
        """
        tokens = embed(self.vit, images)
        if track:
            tokens = tokens.tracked()
        for layer in range(1, len(self.vit.blocks) + 1):
            tokens, attended = self._block(layer, tokens, needs)
            yield Step(layer, tokens, attended)

    def _block(self, layer: int, tokens: Tokens, needs: frozenset[str]) -> tuple[Tokens, Attended]:
        block: Any = self.vit.blocks[layer - 1]
        reducer = self.reducer
        acts = reducer is not None and reducer.acts(layer, self.degree)
        attended = attend(
            block.attn,
            block.norm1(tokens.x),
            size_BN=tokens.size if reducer and reducer.proportional_attention else None,
            needs=needs | reducer.needs if acts and reducer else needs,
        )
        tokens = replace(tokens, x=tokens.x + block.drop_path1(block.ls1(attended.out)))
        if acts and reducer:
            grouping = reducer.group(layer, self.degree, tokens, attended)
            if grouping is not None:
                tokens = tokens.reduced(grouping, track_size=reducer.tracks_size)
        x = tokens.x + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens.x))))
        branch, carried = self.adapter.beside_ffn(layer, tokens)
        return replace(tokens, x=x if branch is None else x + branch, carried=carried), attended

    def feature_map(self, images: Tensor, layer: int | None = None) -> Tensor:
        """Features at every patch, all reductions undone.

        Args:
            images: [B, 3, H, W], normalised.
            layer: Block after which to look, counted from 1, before the final norm; None: after
                the last one and the final norm.

        Returns:
            [B, D, rows, columns]; the class and other prefix tokens are left out.

        Raises:
            ValueError: If there is no such layer.
        """
        depth = len(self.vit.blocks)
        if layer is not None and not 1 <= layer <= depth:
            raise ValueError(f"layer must lie in [1, {depth}] (counted from 1), got {layer}.")
        for step in self.steps(images, track=True):
            if step.layer == layer:
                break
        x = step.tokens.restored()
        if layer is None:
            x = self.vit.norm(x)
        rows, columns = step.tokens.grid
        return x[:, step.tokens.prefix :].transpose(1, 2).reshape(*x.shape[::2], rows, columns)

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
            images = torch.empty(
                1, self.vit.in_chans, *self.vit.patch_embed.img_size, device="meta"
            )
            for step in self.steps(images):
                tokens.append(step.tokens.x.shape[1])
            classify(self.vit, step.tokens)

        try:
            if degree is not None:
                self.set_degree(degree)
            macs = count_macs(self, run)
            at = self.degree
        finally:
            self.degree = before
        heads = {id(p) for head in self._heads() for p in head.parameters()}
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

    def _heads(self) -> list[nn.Module]:
        return [head for name in HEADS if (head := getattr(self.vit, name, None)) is not None]
