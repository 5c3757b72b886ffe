"""Agreement of a model that removes tokens with the same model when it removes none.

What is compared depends on what the model is for: the logits of a classifier, the embeddings of a
model without a head, the masks of a model with a decoder, or feature maps.
"""

# Shape legend: B batch, K classes, D width, h and w positions of a map.

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.checks import check_choice
from tokendial.measure.neighbours import neighbour_overlap
from tokendial.model.dial_vit import DialViT
from tokendial.reduce.base import kl_divergence
from tokendial.tune.cost_meters import ScheduledModel
from tokendial.tune.schedules import Schedule

AgreeBy = Literal["logits", "embeddings", "neighbours", "feature_map", "masks"]
"""What a model is compared with itself by; `fit` describes each."""
_NEIGHBOURS, _IMAGES_PER_NEIGHBOUR = 10, 8
"""Largest number of neighbours that are compared, and images for each of them. With few images,
most would be neighbours of each other whatever the model does."""
_MAX_BYTES = 2**30
"""Memory for the outputs of the unreduced model. Of large maps, fewer images are compared."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement with the unreduced model, as a mean over images."""

    divergence: float
    """Distance from the unreduced model; `divergence_title` says in what. 0 if both are equal."""
    top1: float
    """Fraction that stays the same; `same_title` says of what."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A way to compare a model with the unreduced one."""

    divergence_title: str
    """What `Agreement.divergence` is, for tables and plots."""
    same_title: str
    """What `Agreement.top1` is a fraction of."""
    run: Callable[[DialViT, Tensor], Tensor]
    """Computes what is compared, from the model and a batch of images."""
    compare: Callable[[Tensor, Tensor], Agreement]
    """Compares the outputs for some images with those of the unreduced model."""
    by_batch: bool = False
    """Whether `compare` gets one batch after the other, because maps take much memory."""


class AgreementMeter:
    """Measures the agreement of schedules on some images."""

    def __init__(
        self,
        scheduled_model: ScheduledModel,
        images: Sequence[Tensor],
        *,
        agree_by: AgreeBy = "logits",
        multi_label: bool = False,
    ) -> None:
        """Run the unreduced model, to compare with.

        Args:
            scheduled_model: The model to run by different schedules.
            images: Batches [B, 3, H, W] on the device of the model.
            agree_by: What is compared.
            multi_label: For logits: whether an image can have several labels; each is compared by
                itself.
        """
        self.scheduled_model, self.agree_by = scheduled_model, agree_by
        self.comparison = COMPARISONS[agree_by]
        if multi_label and agree_by == "logits":
            self.comparison = _MULTI_LABEL
        self.unreduced: list[Tensor] = []
        taken = 0
        for batch in images:
            self.unreduced.append(self._output(scheduled_model.space.none, batch))
            taken += self.unreduced[-1].nbytes
            if taken >= _MAX_BYTES:
                break
        self.images = images[: len(self.unreduced)]
        self.num_images = sum(map(len, self.images))
        """Number of images that are compared."""

    def __call__(self, schedule: Schedule) -> Agreement:
        """Run the images by `schedule`, and compare."""
        compare = self.comparison.compare
        outputs = (self._output(schedule, batch) for batch in self.images)
        if not self.comparison.by_batch:
            return compare(torch.cat(list(outputs)), torch.cat(self.unreduced))
        rows = [
            (len(batch), compare(output, unreduced))
            for batch, output, unreduced in zip(self.images, outputs, self.unreduced, strict=True)
        ]
        return Agreement(
            sum(size * row.divergence for size, row in rows) / self.num_images,
            sum(size * row.top1 for size, row in rows) / self.num_images,
        )

    @torch.no_grad()
    def _output(self, schedule: Schedule, batch: Tensor) -> Tensor:
        return self.comparison.run(self.scheduled_model.use(schedule), batch).float()


def choose_comparison(model: DialViT, agree_by: AgreeBy | None) -> AgreeBy:
    """Return what a model is compared by: `agree_by`, or what fits the model.

    Raises:
        ValueError: If there is no such way, or the model does not have what it compares.
    """
    if agree_by is None:
        return "masks" if model.decoder else "logits" if model.num_classes else "embeddings"
    check_choice("agree_by", agree_by, get_args(AgreeBy))
    if agree_by == "masks" and model.decoder is None:
        raise ValueError("agree_by masks needs a model with a decoder.")
    if agree_by == "logits" and (model.decoder is not None or not model.num_classes):
        raise ValueError("agree_by logits needs a model with a classification head.")
    return agree_by


def compare_logits(logits_BK: Tensor, unreduced_BK: Tensor) -> Agreement:
    """Divergence of the classes in nats, and fraction of images with the same top class."""
    same = logits_BK.argmax(dim=1) == unreduced_BK.argmax(dim=1)
    return Agreement(float(kl_divergence(logits_BK, unreduced_BK)), float(same.float().mean()))


def binary_logits(logits_BK: Tensor) -> Tensor:
    """Turn multi-label logits into [B * K, 2], one row per label.

    The softmax of a row is the sigmoid of the label and its complement.
    """
    return torch.stack([logits_BK, torch.zeros_like(logits_BK)], dim=-1).flatten(0, 1)


def compare_embeddings(embeddings_BD: Tensor, unreduced_BD: Tensor) -> Agreement:
    """1 - cosine similarity, and fraction of the nearest neighbours that stay the same."""
    cosine = float(F.cosine_similarity(embeddings_BD, unreduced_BD, dim=1).mean())
    return Agreement(max(0.0, 1 - cosine), _same_neighbours(embeddings_BD, unreduced_BD))


def compare_neighbours(embeddings_BD: Tensor, unreduced_BD: Tensor) -> Agreement:
    """Fraction of the nearest neighbours that change, and fraction that stay the same."""
    same = _same_neighbours(embeddings_BD, unreduced_BD)
    return Agreement(1 - same, same)


def _same_neighbours(embeddings_BD: Tensor, unreduced_BD: Tensor) -> float:
    count = min(_NEIGHBOURS, max(1, len(embeddings_BD) // _IMAGES_PER_NEIGHBOUR))
    return float(neighbour_overlap(embeddings_BD, unreduced_BD, neighbours=count).mean())


def compare_feature_maps(map_BDhw: Tensor, unreduced_BDhw: Tensor) -> Agreement:
    """1 - cosine similarity at each position, and the cosine similarity.

    Maps of clips are [B, T, D, h, w].
    """
    cosine = float(F.cosine_similarity(map_BDhw, unreduced_BDhw, dim=-3).mean())
    return Agreement(max(0.0, 1 - cosine), cosine)


def compare_masks(logits_BKhw: Tensor, unreduced_BKhw: Tensor) -> Agreement:
    """Divergence of the classes at each pixel in nats, and overlap of the masks.

    The overlap of binary masks (K = 1) is intersection over union, and 1 if both are empty. Of
    masks of classes it is the fraction of pixels with the same class.
    """
    rows, unreduced = (
        logits.permute(0, 2, 3, 1).flatten(0, 2) for logits in (logits_BKhw, unreduced_BKhw)
    )
    if logits_BKhw.shape[1] > 1:
        return compare_logits(rows, unreduced)
    divergence = float(kl_divergence(binary_logits(rows), binary_logits(unreduced)))
    inside, inside_unreduced = logits_BKhw > 0, unreduced_BKhw > 0
    common = (inside & inside_unreduced).sum((1, 2, 3))
    either = (inside | inside_unreduced).sum((1, 2, 3))
    overlap = torch.where(either > 0, common / either.clamp(min=1), 1.0)
    return Agreement(divergence, float(overlap.mean()))


def _compare_labels(logits_BK: Tensor, unreduced_BK: Tensor) -> Agreement:
    """Divergence of each label in nats, and fraction of labels with the same answer."""
    return compare_logits(binary_logits(logits_BK), binary_logits(unreduced_BK))


def _forward(model: DialViT, images: Tensor) -> Tensor:
    logits: Tensor = model(images)
    return logits


COMPARISONS: dict[AgreeBy, Comparison] = {
    "logits": Comparison("divergence (nats)", "same answer", _forward, compare_logits),
    "embeddings": Comparison(
        "1 - cosine", "same neighbours", DialViT.embeddings, compare_embeddings
    ),
    "neighbours": Comparison(
        "changed neighbours", "same neighbours", DialViT.embeddings, compare_neighbours
    ),
    "feature_map": Comparison(
        "1 - cosine", "cosine", DialViT.feature_map, compare_feature_maps, by_batch=True
    ),
    "masks": Comparison(
        "divergence (nats)", "mask overlap", _forward, compare_masks, by_batch=True
    ),
}
_MULTI_LABEL = Comparison("divergence (nats)", "same answer", _forward, _compare_labels)
