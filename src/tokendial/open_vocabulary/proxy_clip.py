"""ProxyCLIP: segmentation by class names, with token reduction in both image towers.

Source: Lan et al., "ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation",
ECCV 2024, https://arxiv.org/abs/2408.04883, and the authors' code.

    x = tokens of CLIP before its last block, all reductions undone
    V = values of the last block at the patches, resized to the grid of the proxy
    S = cosines of the proxy's patch features with each other
    A = softmax((S - beta * mean S) * gamma), entries below 0 left out
    y = projection(norm(output projection(A V)))                 no residual, no FFN
    logits = cosines of y with the embeddings of the class names

Departure: images are resized with antialiasing.
"""

# Shape legend: B batch, Q names, K classes, E width of embeddings, H and W pixels, R and S rows and
# columns of the proxy's patches.

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokendial.measure.cost import Cost
from tokendial.model.dial_vit import DialViT
from tokendial.model.model_cost import model_cost
from tokendial.model.windows import predict_windows
from tokendial.model.wrap import wrap
from tokendial.open_vocabulary.class_lists import ClassNames, check_classes, imagenet_prompts
from tokendial.open_vocabulary.clip_parts import Tokenizer, clip_parts, text_embeddings
from tokendial.open_vocabulary.config import ProxyCLIPConfig
from tokendial.open_vocabulary.proxies import Statistics, make_proxy
from tokendial.open_vocabulary.proxy_attention import proxy_attention
from tokendial.open_vocabulary.towers import check_no_dial, patch_sides, run_blocks
from tokendial.reduce.base import ReducerConfig
from tokendial.tokens import from_grid, to_grid


class ProxyCLIP(nn.Module):
    """Finds the class of each pixel by names, with CLIP and a self-supervised model.

    CLIP knows which words an image fits, the self-supervised model (the proxy) knows which patches
    belong together. Nothing is trained. Tokens are reduced in all blocks of CLIP's image tower but
    the last, and in the proxy.

    Args:
        clip: A CLIP model of open_clip with a VisionTransformer of its own, or CLIPModel of
            transformers.
        proxy: A ViT such as DINO or DINOv2 that `wrap` takes and that takes windows of
            `config.window` pixels (timm: created with dynamic_img_size=True), or a `DialViT`. Or
            the encoder of SAM or ViTDet, or a model that holds one, such as SamModel of
            transformers: windows are resized to the size that it was made for.
        reduce: Reduction method of CLIP's image tower; None: no tokens are removed there.
        proxy_reduce: Reduction method of the proxy; None: no tokens are removed there. Encoders of
            SAM and ViTDet take `FFNMerge` only, which stays in them as by `attach`.
        clip_tower: CLIP's image tower if it is wrapped already, for instance fine-tuned with an
            adapter; then `reduce` is None.
        tokenizer: Turns prompts into the input of the text tower; None: the one that belongs to
            the model.
        proxy_statistics: Mean and deviation of the proxy's images; None: those that the proxy
            names, and ImageNet's for models of transformers.
        config: Settings.

    Raises:
        ValueError: If a model is not supported, or arguments do not fit together.

    Example:
        >>> import open_clip, timm, torch, tokendial as td
        >>> vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 56}
        >>> text = {"layers": 1, "width": 16, "heads": 2}
        >>> clip = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()
        >>> sizes = {"img_size": 56, "embed_dim": 24, "depth": 2, "num_heads": 3}
        >>> proxy = timm.create_model("vit_small_patch8_224.dino", **sizes).eval()
        >>> config = td.ProxyCLIPConfig(shortest_side=56, window=56, stride=28)
        >>> model = td.ProxyCLIP(clip, proxy, reduce=td.ToMe(r=4), config=config)
        >>> model.set_classes(["grass", ("sofa", "couch")])
        >>> model.predict(torch.rand(1, 3, 60, 80)).shape
        torch.Size([1, 60, 80])
    """

    def __init__(
        self,
        clip: nn.Module,
        proxy: nn.Module,
        *,
        reduce: ReducerConfig | None = None,
        proxy_reduce: ReducerConfig | None = None,
        clip_tower: DialViT | None = None,
        tokenizer: Tokenizer | None = None,
        proxy_statistics: Statistics | None = None,
        config: ProxyCLIPConfig | None = None,
    ) -> None:
        super().__init__()
        self._parts = clip_parts(clip, tokenizer)
        self.config = ProxyCLIPConfig() if config is None else config
        """Settings."""
        if clip_tower is not None:
            check_no_dial("reduce", reduce, "clip_tower")
            if clip_tower.vit is not self._parts.tower:
                raise ValueError(
                    "clip_tower must be the wrapped image tower of clip, not another one."
                )
        self.clip = clip
        """The CLIP model, whose text tower encodes the class names."""
        self.tower = clip_tower or wrap(self._parts.tower, reduce=reduce)
        """CLIP's image tower under the dial."""
        if len(self.tower.anatomy.blocks) < 2:
            raise ValueError("clip must have at least 2 blocks in its image tower, got 1.")
        self._features_of = make_proxy(proxy, proxy_reduce)
        self.proxy = self._features_of.model
        """The self-supervised model under the dial: a `DialViT`, or SAM's encoder."""
        self.classes: tuple[tuple[str, ...], ...] = ()
        """Names of each class; none before `set_classes`."""
        self._text: Tensor | None
        self._class_of_name: Tensor
        self.register_buffer("_text", None, persistent=False)
        self.register_buffer("_class_of_name", torch.zeros(0, dtype=torch.long), persistent=False)
        if proxy_statistics is None:
            proxy_statistics = self._features_of.statistics
        self._clip_mean: Tensor
        self._clip_std: Tensor
        self._proxy_mean: Tensor
        self._proxy_std: Tensor
        for name, values in (("_clip", self._parts.statistics), ("_proxy", proxy_statistics)):
            mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in values)
            self.register_buffer(f"{name}_mean", mean, persistent=False)
            self.register_buffer(f"{name}_std", std, persistent=False)

    def extra_repr(self) -> str:
        """Classes and degrees, for `repr(model)`."""
        return (
            f"{len(self.classes)} classes, degree={self.degree} of 0 to {self.degrees[-1]}, "
            f"proxy_degree={self.proxy_degree} of 0 to {self.proxy_degrees[-1]}"
        )

    # The classes.

    @torch.no_grad()
    def set_classes(self, classes: ClassNames, prompts: Sequence[str] | None = None) -> None:
        """Choose the classes. The text tower runs here, and not for each image.

        Args:
            classes: One entry for each class: its name, or several names of it. A pixel's
                probability of a class is the largest of its names.
            prompts: Prompts with {} in place of the name, whose embeddings are averaged; None: the
                80 that CLIP's authors wrote for ImageNet.

        Raises:
            ValueError: If there is no class, a class has no name, or a prompt has no {}.
        """
        checked = check_classes(classes)
        prompts = imagenet_prompts() if prompts is None else tuple(prompts)
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, got none.")
        for prompt in prompts:
            if "{}" not in prompt:
                raise ValueError(f"prompts must have {{}} in place of the name, got {prompt!r}.")
        names = [name for each in checked for name in each]
        self._text = text_embeddings(self._parts, names, prompts)
        numbers = [number for number, each in enumerate(checked) for _ in each]
        self._class_of_name = torch.tensor(numbers, device=self._text.device)
        self.classes = checked

    # From images to masks.

    def forward(self, images: Tensor) -> Tensor:
        """Cosines of each pixel with each name, at the size that images are resized to.

        Args:
            images: [B, 3, H, W], RGB in [0, 1], not normalised.

        Returns:
            [B, Q, h, w]; the names of a class stand next to each other.

        Raises:
            ValueError: If no classes were set, or `images` is something else.
        """
        _check_images(images)
        self._check_classes()
        config = self.config
        height, width = _resized_size(images.shape[-2:], config.shortest_side)
        resized = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
        window = (min(config.window, height), min(config.window, width))
        return predict_windows(
            self.window_logits,
            resized,
            window,
            config.stride / config.window,
            windows_per_pass=max(1, config.windows_per_pass // len(images)),
        )

    def window_logits(self, windows: Tensor) -> Tensor:
        """Cosines of each pixel of windows with each name.

        Args:
            windows: [B, 3, H, W], RGB in [0, 1], not normalised.

        Returns:
            [B, Q, H, W].

        Raises:
            ValueError: If no classes were set, or a tower does not take the padded size.
        """
        text = self._check_classes()
        padded, (top, left) = self._pad(windows)
        embeddings, _ = self._embeddings(padded)
        logits = torch.einsum("bers,qe->bqrs", embeddings, text.to(embeddings.dtype))
        logits = F.interpolate(logits, tuple(padded.shape[-2:]), mode="bilinear")
        height, width = windows.shape[-2:]
        return logits[..., top : top + height, left : left + width]

    def patch_embeddings(self, windows: Tensor) -> Tensor:
        """Normalised embeddings of the proxy's patches in the space of CLIP's texts.

        Args:
            windows: [B, 3, H, W], RGB in [0, 1]; both towers must take this size.

        Returns:
            [B, E, R, S].
        """
        return self._embeddings(windows)[0]

    def probabilities(self, images: Tensor) -> Tensor:
        """Probability of each class at each pixel: the largest one of its names.

        All names share one softmax, so the probabilities of classes with several names add up to
        less than 1.

        Args:
            images: [B, 3, H, W], RGB in [0, 1], not normalised.

        Returns:
            [B, K, H, W].
        """
        logits = F.interpolate(self(images), tuple(images.shape[-2:]), mode="bilinear")
        of_names = (logits.float() * self.config.scale).softmax(dim=1)
        shape = (len(images), len(self.classes), *images.shape[-2:])
        index = self._class_of_name.view(1, -1, 1, 1).expand_as(of_names)
        return of_names.new_zeros(shape).scatter_reduce(1, index, of_names, "amax")

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Class of each pixel: the most probable one, or class 0 below `config.threshold`.

        Args:
            images: [B, 3, H, W], RGB in [0, 1], not normalised.

        Returns:
            [B, H, W] class indices.
        """
        cosines, size = self(images), tuple(images.shape[-2:])
        # Name by name, because the probabilities of all names at the size of a photograph might not
        # fit in memory. The best class is that of the best name.
        best = self._logits_of_name(cosines, 0, size)
        index, total = torch.zeros_like(best, dtype=torch.long), best
        for number in range(1, cosines.shape[1]):
            logits = self._logits_of_name(cosines, number, size)
            index[logits > best] = number
            best, total = torch.maximum(best, logits), torch.logaddexp(total, logits)
        classes = self._class_of_name[index]
        return classes.masked_fill((best - total).exp() < self.config.threshold, 0)

    def _logits_of_name(self, cosines: Tensor, number: int, size: tuple[int, ...]) -> Tensor:
        """Scaled cosines of one name at the size of the images, [B, H, W]."""
        resized = F.interpolate(cosines[:, number : number + 1], size, mode="bilinear")
        return resized[:, 0].float() * self.config.scale

    def _embeddings(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """Do what `patch_embeddings` does; also return the tokens that leave each block."""
        anatomy, last = self.tower.anatomy, len(self.tower.anatomy.blocks)
        clip_images = (images - self._clip_mean) / self._clip_std
        proxy_images = (images - self._proxy_mean) / self._proxy_std
        features, proxy_tokens = self._features_of.features(proxy_images)
        patches, tokens = run_blocks(self.tower, clip_images, last - 1)
        x = from_grid(patches, patches.shape[-2] * patches.shape[-1])
        projection, rows = anatomy.query_value(last)["value"]
        values = projection(anatomy.attention_input(last, x))[..., rows]
        out = proxy_attention(
            to_grid(values, _grid(patches)),
            features,
            beta=self.config.beta,
            gamma=self.config.gamma,
        )
        embeddings = self._parts.project(anatomy.attention_branch(last, out, out))
        maps = to_grid(F.normalize(embeddings, dim=-1), _grid(features))
        return maps, [*tokens, *proxy_tokens]

    def _pad(self, windows: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pad windows on all sides; also return the rows and columns before the window."""
        sides = (*patch_sides(self.tower), *self._features_of.patch_sides)
        multiple = math.lcm(self.config.multiple, *sides)
        height, width = windows.shape[-2:]
        more_rows, more_columns = -height % multiple, -width % multiple
        top, left = more_rows // 2, more_columns // 2
        padding = (left, more_columns - left, top, more_rows - top)
        # Zeros once the images are normalised for CLIP.
        return F.pad(windows - self._clip_mean, padding) + self._clip_mean, (top, left)

    def _check_classes(self) -> Tensor:
        """Return the embeddings of the names; raise a ValueError if there are none."""
        if self._text is None:
            raise ValueError("classes are not set: call set_classes(['cat', 'dog']) first.")
        return self._text

    # The dial.

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of CLIP's image tower, from 0 (no reduction) to the cheapest."""
        return self.tower.degrees

    @property
    def proxy_degrees(self) -> tuple[int, ...]:
        """Degrees of the proxy, from 0 (no reduction) to the cheapest."""
        return self._features_of.degrees

    @property
    def degree(self) -> int:
        """Position of the dial of CLIP's image tower."""
        return self.tower.degree

    @property
    def proxy_degree(self) -> int:
        """Position of the dial of the proxy."""
        return self._features_of.degree

    def set_degree(self, degree: int) -> None:
        """Turn the dial of CLIP's image tower.

        Raises:
            ValueError: If it is not one of `degrees`.
        """
        self.tower.set_degree(degree)

    def set_proxy_degree(self, degree: int) -> None:
        """Turn the dial of the proxy.

        Raises:
            ValueError: If it is not one of `proxy_degrees`.
        """
        self._features_of.set_degree(degree)

    def cost(self) -> Cost:
        """Parameters, multiply-accumulates and tokens of one window at the present degrees.

        The text tower is part of the parameters only, because it runs once for all images.
        `tokens_per_layer` holds all blocks of CLIP's image tower but the last, then those of the
        proxy.
        """
        tokens: list[int] = []

        def run(images: Tensor) -> list[int]:
            embeddings, counts = self._embeddings(self._pad(images)[0])
            if self._text is not None:
                torch.einsum("bers,qe->bqrs", embeddings, self._text.to(embeddings.dtype))
            tokens[:] = counts
            return tokens

        side = self.config.window
        return model_cost(self, run, degree=self.degree, input_shape=(3, side, side), heads=())


def _grid(maps: Tensor) -> tuple[int, int]:
    """Rows and columns of feature maps."""
    rows, columns = maps.shape[-2:]
    return rows, columns


def _check_images(images: Any) -> None:
    """Raise a ValueError unless `images` is a batch of RGB images of floating-point numbers."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must have the shape [B, 3, H, W], got {shape}.")
    if not images.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], got {images.dtype}: divide by 255.")


def _resized_size(size: torch.Size | tuple[int, ...], shortest: int) -> tuple[int, int]:
    """Height and width with a given shorter side and the same aspect ratio."""
    height, width = size
    factor = shortest / min(height, width)
    return max(shortest, round(height * factor)), max(shortest, round(width * factor))
