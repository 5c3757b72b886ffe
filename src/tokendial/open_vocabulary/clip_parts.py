"""The parts of a CLIP model that ProxyCLIP calls, for open_clip and for transformers."""

# Shape legend: B batch, N tokens, D width of the image tower, P prompts, E width of embeddings.

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn

Tokenizer = Callable[..., Any]
"""Turns a list of prompts into what the text tower reads: a tensor of open_clip's tokenizers, or a
mapping of those of transformers."""
_CLIP_VOCABULARY = 49408


class ClipParts(ABC):
    """Access to the image tower, the text tower and the projections of one kind of CLIP model."""

    def __init__(self, clip: nn.Module, tokenizer: Tokenizer | None) -> None:
        self.clip: Any = clip
        self.tokenizer = self.default_tokenizer() if tokenizer is None else tokenizer

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The image tower, which `wrap` takes."""

    @property
    @abstractmethod
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation with which images are normalised."""

    @abstractmethod
    def default_tokenizer(self) -> Tokenizer:
        """Return the tokenizer that belongs to the model.

        Raises:
            ValueError: If the model does not say which one that is.
        """

    @abstractmethod
    def project(self, x_BND: Tensor) -> Tensor:
        """Apply the final norm and the projection into the space of the texts, [B, N, E]."""

    @abstractmethod
    def encode(self, prompts: list[str]) -> Tensor:
        """Return the embeddings of prompts [P, E], not normalised."""


class OpenClipParts(ClipParts):
    """Parts of a CLIP model of open_clip that has a VisionTransformer of its own."""

    @property
    def tower(self) -> nn.Module:
        return self.clip.visual  # type: ignore[no-any-return]

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        visual = self.clip.visual
        mean, std = (getattr(visual, name, None) for name in ("image_mean", "image_std"))
        return tuple(mean or OPENAI_CLIP_MEAN), tuple(std or OPENAI_CLIP_STD)

    def default_tokenizer(self) -> Tokenizer:
        text = getattr(self.clip, "text", self.clip)
        if getattr(text, "vocab_size", None) != _CLIP_VOCABULARY:
            raise ValueError(
                "tokenizer must be given, because the text tower has another vocabulary than CLIP: "
                "pass open_clip.get_tokenizer(name)."
            )
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer: Tokenizer = SimpleTokenizer(context_length=self.clip.context_length)
        return tokenizer

    def project(self, x_BND: Tensor) -> Tensor:
        visual = self.clip.visual
        x: Tensor = visual.ln_post(x_BND)
        return x if visual.proj is None else torch.matmul(x, visual.proj)

    def encode(self, prompts: list[str]) -> Tensor:
        device = next(self.clip.parameters()).device
        embeddings: Tensor = self.clip.encode_text(self.tokenizer(prompts).to(device))
        return embeddings


class HuggingFaceClipParts(ClipParts):
    """Parts of transformers' CLIPModel."""

    @property
    def tower(self) -> nn.Module:
        return self.clip.vision_model  # type: ignore[no-any-return]

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    def default_tokenizer(self) -> Tokenizer:
        source = self.clip.config.name_or_path
        if not source:
            raise ValueError(
                "tokenizer must be given, because the model was not loaded by from_pretrained."
            )
        from transformers import AutoTokenizer

        local = Path(source).is_dir()
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        return tokenizer

    def project(self, x_BND: Tensor) -> Tensor:
        x = self.clip.vision_model.post_layernorm(x_BND)
        return self.clip.visual_projection(x)  # type: ignore[no-any-return]

    def encode(self, prompts: list[str]) -> Tensor:
        device = next(self.clip.parameters()).device
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        inputs = {name: value.to(device) for name, value in tokens.items()}
        pooled = self.clip.text_model(**inputs).pooler_output
        return self.clip.text_projection(pooled)  # type: ignore[no-any-return]


def clip_parts(clip: nn.Module, tokenizer: Tokenizer | None) -> ClipParts:
    """Find out which kind of CLIP model it is, and return its parts.

    Raises:
        ValueError: If the kind is not supported.
    """
    name, module = type(clip).__name__, type(clip).__module__
    if module.startswith("transformers.") and name == "CLIPModel":
        return HuggingFaceClipParts(clip, tokenizer)
    visual: Any = getattr(clip, "visual", None)
    if not module.startswith("open_clip.") or visual is None:
        raise ValueError(f"clip must be a CLIP of open_clip or CLIPModel, got {name}.")
    if type(visual).__name__ != "VisionTransformer":
        raise ValueError(
            "clip must have open_clip's VisionTransformer as its image tower, got "
            f"{type(visual).__name__}."
        )
    if visual.attn_pool is not None:
        raise ValueError(
            "clip must not have attentional pooling, which leaves patches without a projection."
        )
    return OpenClipParts(clip, tokenizer)


def text_embeddings(
    parts: ClipParts, names: Sequence[str], prompts: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """Return the embedding of each name: the mean over its prompts, normalised.

    Args:
        parts: The model.
        names: Names of classes.
        prompts: Prompts with {} in place of the name.
        batch_size: Number of prompts that the text tower encodes at a time.

    Returns:
        [len(names), E].
    """
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    encoded = [
        parts.encode(texts[first : first + batch_size])
        for first in range(0, len(texts), batch_size)
    ]
    each = nn.functional.normalize(torch.cat(encoded), dim=-1)
    mean = torch.unflatten(each, 0, (len(names), len(prompts))).mean(dim=1)
    return nn.functional.normalize(mean, dim=-1)
