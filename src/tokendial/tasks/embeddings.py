"""Embeddings that stay those of the pre-trained backbone while tokens are reduced."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.backbones import Backbone
from tokendial.data.transforms.image import Augment
from tokendial.model.dial_vit import DialViT
from tokendial.model.wrap import wrap
from tokendial.tasks.base import Metrics
from tokendial.tasks.whole_images import WholeImages


class Embeddings(WholeImages):
    """Training a backbone without a head to give its own embeddings; it needs no labels.

    The targets are the embeddings that the pre-trained backbone gives by itself, with all of its
    tokens and without an adapter. It is loaded a second time for this.
    """

    num_classes = 0
    score_name = "cosine"

    def __init__(self, backbone: Backbone, augment: Augment) -> None:
        """Set up the task.

        Args:
            backbone: The pre-trained backbone, without a head.
            augment: How images are augmented and cropped. Teacher and student see the same image.

        Raises:
            ValueError: If mixup, cutmix or label smoothing is set, which need classes.
        """
        if augment.mixup or augment.cutmix or augment.smoothing:
            raise ValueError("augment: mixup, cutmix and smoothing need images with labels.")
        self.backbone, self.augment = backbone, augment

    @cached_property
    def _frozen(self) -> DialViT:
        """The backbone by itself; loading it draws no random numbers from those of the training."""
        with torch.random.fork_rng(devices=[]):
            return wrap(self.backbone.create()).eval().requires_grad_(False)

    def mix_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the batch as it is."""
        return images, targets

    @torch.no_grad()
    def batch_targets(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the backbone's own embeddings [B, D] of the images; `targets` says nothing."""
        return self._frozen.to(images.device).embeddings(images).float()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return 1 - cosine similarity of embeddings and targets, both [B, D], mean over images."""
        return 1 - F.cosine_similarity(logits.float(), targets, dim=1).mean()

    def distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the same loss between the embeddings at two degrees."""
        return self.loss(student, teacher)

    def batch_score(self, logits: Tensor, targets: Tensor) -> float:
        """Return the mean cosine similarity of embeddings and targets."""
        return float(1 - self.loss(logits, targets))

    def metrics(self) -> Metrics:
        """Return the cosine similarity to the targets, and the share of equal neighbours."""
        from tokendial.tasks.metrics import EmbeddingMetrics

        return EmbeddingMetrics()
