"""ViTs of the transformers library that run as their table of names says.

Those with a computation of their own have a class of their own in another file.
"""

# Shape legend: B batch, H heads, N tokens, C head_dim, D embed_dim.

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokendial.backbones.anatomy import Anatomy, bare, mean_by_size, pair, split_heads
from tokendial.backbones.huggingface_names import CLASSES, Names, Pooling
from tokendial.shape import ViTShape
from tokendial.tokens import Tokens


class HuggingFaceViT(Anatomy):
    """A ViT of the transformers library, release 5.23 or later.

    Without a classification head, `classify` returns what the model itself calls its pooled output.
    Where it has none, it returns the class token (Dinov2Backbone, ViTMAEModel) or the mean of the
    patches (IJepaModel, VitPoseBackbone), after the final norm.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__(vit)
        self.names = CLASSES[type(vit).__name__]

    @property
    def trunk(self) -> Any:
        """The ViT without the classification model around it."""
        return _trunk(self.vit, self.names)

    @classmethod
    def recognises(cls, vit: nn.Module) -> bool:
        return type(vit).__module__.startswith("transformers.") and type(vit).__name__ in CLASSES

    @classmethod
    def problem(cls, vit: Any) -> str | None:
        name = type(vit).__name__
        if not cls.recognises(vit):
            return f"{name} is of another class"
        names = CLASSES[name]
        trunk = _trunk(vit, names)
        try:
            first: Any = trunk.get_submodule(names.blocks)
            for path in (names.norm1, names.norm2, *names.attention_branch):
                first[0].get_submodule(path)
            attention = first[0].get_submodule(names.attention)
            for part in (*names.query_key_value, names.attention_dropout):
                getattr(attention, part)
            trunk.get_submodule(names.norm)
            if getattr(trunk.config, "num_experts", 1) > 1:
                return "its layers are mixtures of experts (num_experts)"
            for path in names.ffn_branch:
                first[0].get_submodule(path)
        except AttributeError:
            return f"this {name} is of another release of transformers than 5.23 and later"
        if names.pooled == "patches" and getattr(vit, "pooler", None) is not None:
            return "its pooler reads the first patch (add_pooling_layer)"
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.get_submodule(self.names.blocks)  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """The configuration of the image tower."""
        return self.trunk.config

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation, register and detection tokens."""
        names = self.names
        more = getattr(self.config, names.more_tokens) if names.more_tokens else 0
        return names.class_tokens + int(more)

    @property
    def shape(self) -> ViTShape:
        height, width = self.image_size
        return ViTShape(
            depth=len(self.blocks),
            embed_dim=self.config.hidden_size,
            num_prefix_tokens=self.num_prefix_tokens,
            num_patches=(height // self.patch[0]) * (width // self.patch[1]),
            has_class_token=self.names.class_tokens > 0,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        return pair(self.config.image_size)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return pair(self.config.patch_size)

    @property
    def in_chans(self) -> int:
        return int(self.config.num_channels)

    @property
    def patch_convolution(self) -> nn.Module | None:
        path = self.names.patch_convolution
        return None if path is None else self.trunk.get_submodule(path)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.names.statistics if self.in_chans == 3 else super().statistics

    @property
    def heads(self) -> list[nn.Module]:
        names = ("classifier", "cls_classifier", "distillation_classifier")
        return [head for name in names if (head := getattr(self.vit, name, None)) is not None]

    def grid(self, images_B3HW: Tensor) -> tuple[int, int]:
        """Return rows and columns of patches; raise a ValueError if the image size does not fit."""
        height, width = images_B3HW.shape[-2:]
        (rows, columns), own = self.patch, self.image_size
        # A configured size may leave a rest, as 384 does with patches of 14: the model ignores it.
        if (height, width) != own:
            if self.names.resizing == "never":
                raise ValueError(
                    f"images must be {own[0]}x{own[1]}, got {height}x{width}: "
                    f"{type(self.vit).__name__} does not resize its positions."
                )
            if height % rows or width % columns:
                raise ValueError(
                    f"images must have sides divisible by the patch size {rows}x{columns}, "
                    f"got {height}x{width}."
                )
        return height // rows, width // columns

    def resize_options(self, images_B3HW: Tensor) -> dict[str, bool]:
        """Arguments by which the embedding resizes its positions to the images, if it has to."""
        resizes = images_B3HW.shape[-2:] != self.image_size
        asked = resizes and self.names.resizing == "on request"
        return {"interpolate_pos_encoding": True} if asked else {}

    def embed(self, images_B3HW: Tensor) -> Tokens:
        grid = self.grid(images_B3HW)
        x = self.trunk.embeddings(images_B3HW, **self.resize_options(images_B3HW))
        if self.names.pre_norm:
            x = getattr(self.trunk, self.names.pre_norm)(x)
        return Tokens(x, self.num_prefix_tokens, grid)

    def _part(self, layer: int, path: str) -> Any:
        return self.block(layer).get_submodule(path)

    def attention_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._part(layer, self.names.norm1)(x_BND)  # type: ignore[no-any-return]

    def _projections(self, layer: int) -> tuple[Any, Any, Any]:
        """The layers that compute queries, keys and values."""
        attn = self._part(layer, self.names.attention)
        query, key, value = self.names.query_key_value
        return getattr(attn, query), getattr(attn, key), getattr(attn, value)

    def qkv(self, layer: int, x_BND: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.config.num_attention_heads
        q, k, v = (split_heads(part(x_BND), heads) for part in self._projections(layer))
        return q, k, v

    def query_value(self, layer: int) -> dict[Literal["query", "value"], tuple[nn.Module, slice]]:
        (query, _, value), whole = self._projections(layer), slice(None)
        return {"query": (query, whole), "value": (value, whole)}

    def attention_branch(self, layer: int, out_BND: Tensor, x_BND: Tensor) -> Tensor:
        return self._run(layer, self.names.attention_branch, out_BND)

    def attention_settings(self, layer: int) -> tuple[float, float]:
        attn = self._part(layer, self.names.attention)
        head_dim = bare(self._projections(layer)[0]).out_features // self.config.num_attention_heads
        dropout = getattr(attn, self.names.attention_dropout)
        return head_dim**-0.5, dropout if attn.training else 0.0

    def ffn_input(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._part(layer, self.names.norm2)(x_BND)  # type: ignore[no-any-return]

    def ffn_branch(self, layer: int, x_BND: Tensor) -> Tensor:
        return self._run(layer, self.names.ffn_branch, x_BND)

    def _run(self, layer: int, paths: Sequence[str], x_BND: Tensor) -> Tensor:
        """Run modules of a block one after another."""
        for path in paths:
            x_BND = self._part(layer, path)(x_BND)
        return x_BND

    def norm(self, x_BND: Tensor) -> Tensor:
        return getattr(self.trunk, self.names.norm)(x_BND)  # type: ignore[no-any-return]

    @property
    def head_reads_prefix_only(self) -> bool:
        classifies = hasattr(self.vit, "classifier")
        read = self.names.classified if classifies else self.names.pooled
        return read == "class token"

    def classify(self, tokens: Tokens) -> Tensor:
        vit: Any = self.vit
        name = type(vit).__name__
        if hasattr(vit, "classifier"):
            return vit.classifier(self.pool(self.names.classified, tokens))  # type: ignore[no-any-return]
        if name == "DeiTForImageClassificationWithTeacher":
            x = self.norm(tokens.x)
            both = vit.cls_classifier(x[:, 0]) + vit.distillation_classifier(x[:, 1])
            return both / 2  # type: ignore[no-any-return]
        if getattr(vit, "pooler", None) is not None:
            return vit.pooler(self.norm(tokens.x))  # type: ignore[no-any-return]
        pooled = self.pool(self.names.pooled, tokens)
        if name == "CLIPVisionModelWithProjection":
            return vit.visual_projection(pooled)  # type: ignore[no-any-return]
        return pooled

    def pool(self, pooling: Pooling, tokens: Tokens) -> Tensor:
        """Pool the tokens of the last block, after the final norm unless `pooling` says otherwise.

        Returns:
            [B, D], or [B, 2 * D] of class token and patches.
        """
        patches = slice(tokens.prefix, None)
        size = None if tokens.size is None else tokens.size[:, patches]
        if pooling == "patches before norm":
            return mean_by_size(tokens.x[:, patches], size)
        x = self.norm(tokens.x)
        if pooling == "class token":
            return x[:, 0]
        mean = mean_by_size(x[:, patches], size)
        return mean if pooling == "patches" else torch.cat([x[:, 0], mean], dim=1)


def _trunk(vit: Any, names: Names) -> Any:
    return vit if names.trunk is None else getattr(vit, names.trunk, vit)
