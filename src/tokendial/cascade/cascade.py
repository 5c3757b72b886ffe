"""A model that answers at a cheap degree, and again at a better one where it is unsure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tokendial.backbones.anatomy import Anatomy
from tokendial.cascade.answers import ScoreName, answers, are_same
from tokendial.cascade.stages import CascadeStages
from tokendial.cascade.thresholds import (
    CascadeCalibration,
    Harm,
    Observations,
    choose_thresholds,
    read_promise,
)
from tokendial.model.dial import InferenceModel, check_degree


@dataclass(frozen=True, slots=True)
class CascadeAnswer:
    """Answers of a cascade for a batch of B images."""

    logits: Tensor
    """Logits [B, ...] as the model returns them, of the stage that answered."""
    degrees: tuple[int, ...]
    """The degree that answered for each image."""


class Cascade:
    """Runs a model at the first degree, and again at the next one for images it is unsure of.

    It is called like the model. `calibrate` finds how sure a stage must be, so that with a given
    confidence no more than a given share of the answers are worse than those of the last degree.

    Example:
        >>> import timm, torch, tokendial as td
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3)
        >>> model = td.wrap(vit, reduce=td.ToMe(r=4)).eval()
        >>> cascade = td.Cascade(model, degrees=(4, 0))
        >>> calibrated = cascade.calibrate([torch.randn(500, 3, 64, 64)], max_changed=0.05)
        >>> calibrated.bound <= 0.05
        True
        >>> cascade(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 3])

    Source:
        Deferral by confidence: arXiv 2307.02764; the bound: see `choose_thresholds`.
    """

    def __init__(
        self,
        model: InferenceModel,
        degrees: Sequence[int],
        *,
        score: ScoreName = "margin",
        multi_label: bool = False,
    ) -> None:
        """Set up the stages. Before `calibrate`, every image reaches the last one.

        Args:
            model: A wrapped model, or what `Runtime.start` returns. Its dial is turned by calls and
                left as it was.
            degrees: Two or three degrees, falling: the cheapest first.
            score: How sure the model is: "margin", "probability" or "entropy".
            multi_label: Whether each logit is a label of its own (a sigmoid), not one of K classes.

        Raises:
            ValueError: If degrees are not offered or do not fall, `score` is unknown, or the model
                has no logits.
        """
        for degree in degrees:
            check_degree(degree, model.degrees)
        if getattr(model, "num_classes", None) == 0 and getattr(model, "decoder", None) is None:
            raise ValueError(
                "a cascade needs a model with a head or a decoder: an embedding does not say how "
                "sure the model is."
            )
        self.model = model
        """The model. Another one of the same logits may take its place, as that of a runtime."""
        self.stages = CascadeStages(tuple(degrees), score, multi_label)
        """Degrees, score and thresholds."""

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees of the stages, the cheapest first."""
        return self.stages.degrees

    @property
    def calibration(self) -> CascadeCalibration | None:
        """The thresholds and their bound; None: not calibrated."""
        return self.stages.calibration

    @calibration.setter
    def calibration(self, found: CascadeCalibration) -> None:
        self.stages = replace(self.stages, calibration=found)

    @property
    def anatomy(self) -> Anatomy:
        """The parts of the model's ViT."""
        return self.model.anatomy

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def eval(self) -> "Cascade":
        """Put the model into evaluation mode."""
        self.model.eval()
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of images [B, 3, H, W], each of the stage that answered for it."""
        return self.answer(images).logits

    @torch.no_grad()
    def answer(self, images: Tensor) -> CascadeAnswer:
        """Logits of images [B, 3, H, W], and the degree that answered for each."""
        before = self.model.degree
        try:
            self.model.set_degree(self.degrees[0])
            logits = self.model(images)
            answered = torch.zeros(len(images), dtype=torch.long)
            unsure = torch.arange(len(images), device=images.device)
            for stage, threshold in enumerate(self.stages.thresholds, 1):
                sure = self.stages.how_sure(logits[unsure])
                unsure = unsure[(sure < threshold).to(unsure.device)]
                if not len(unsure):
                    break
                self.model.set_degree(self.degrees[stage])
                logits = logits.index_copy(0, unsure, self.model(images[unsure]).to(logits))
                answered[unsure.cpu()] = stage
        finally:
            self.model.set_degree(before)
        return CascadeAnswer(logits, tuple(self.degrees[stage] for stage in answered.tolist()))

    def calibrate(
        self,
        batches: Iterable[Tensor | Sequence[Tensor]],
        *,
        max_changed: float | None = None,
        max_lost: float | None = None,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> CascadeCalibration:
        """Choose thresholds within a bound on worse answers; see `choose_thresholds`.

        Args:
            batches: Batches of images [B, 3, H, W], or of (images, labels [B]) for `max_lost`, like
                those to come: the bound holds for images of the same kind only.
            max_changed: Largest share of images that may get another answer than at the last
                degree. Needs no labels. A mask has changed if it overlaps by less than 90 %.
            max_lost: Largest share of images that may get a wrong answer where the last degree's is
                right.
            confidence: Probability with which the bound is to hold.
            seed: Seed of the split of the images into choosing and counting.

        Raises:
            ValueError: If not exactly one share is given, labels are missing, there are too few
                images, or a number is out of range.
        """
        harm, allowed = read_promise(max_changed, max_lost)
        observations = self.observe(batches, harm)
        found = choose_thresholds(observations, harm, allowed, confidence=confidence, seed=seed)
        self.calibration = found
        return found

    @torch.no_grad()
    def observe(
        self, batches: Iterable[Tensor | Sequence[Tensor]], harm: Harm = "changed"
    ) -> Observations:
        """Run all stages on images, and note what the early ones would do.

        Args:
            batches: See `calibrate`.
            harm: What counts as a worse answer.

        Raises:
            ValueError: If there are no images, or labels are missing.
        """
        before = self.model.degree
        self.eval()
        found: list[Observations] = []
        try:
            for batch in batches:
                images, labels = (
                    (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
                )
                logits = []
                for degree in self.degrees:
                    self.model.set_degree(degree)
                    logits.append(self.model(images.to(self.device)))
                found.append(self.compare(logits, labels, harm))
        finally:
            self.model.set_degree(before)
        if not found:
            raise ValueError("calibrate needs at least one batch of images, got none.")
        return Observations.joined(found)

    def compare(
        self, logits: Sequence[Tensor], labels: Tensor | None = None, harm: Harm = "changed"
    ) -> Observations:
        """Note what the early stages would do, from the logits of all stages for the same images.

        Args:
            logits: Logits [B, ...] at each of `degrees`.
            labels: Labels [B] (or [B, K] of several labels) for harm "lost".
            harm: What counts as a worse answer.

        Raises:
            ValueError: If labels are missing.
        """
        sure = torch.stack([self.stages.how_sure(each).cpu() for each in logits[:-1]])
        given = [answers(each, multi_label=self.stages.multi_label).cpu() for each in logits]
        if harm == "changed":
            return Observations(sure, torch.stack([~are_same(e, given[-1]) for e in given[:-1]]))
        if labels is None or given[-1].dim() == 3:
            raise ValueError(
                "max_lost needs batches of images and labels, and a model that classifies images; "
                "max_changed needs neither."
            )
        right = [are_same(each, labels.cpu().long()) for each in given]
        return Observations(sure, torch.stack([~early & right[-1] for early in right[:-1]]))

    def save(self, path: Path, *, revision: str | None = None, numerics: str = "fp32") -> None:
        """Write degrees, score and calibration into a JSON file.

        Args:
            path: The file.
            revision: Revision of the model's weights; `load` can check it.
            numerics: How the model computes, as `Runtime.numerics` says it; `load` can check it.
        """
        replace(self.stages, revision=revision, numerics=numerics).save(path)

    @classmethod
    def load(
        cls,
        model: InferenceModel,
        path: Path,
        *,
        revision: str | None = None,
        numerics: str | None = None,
    ) -> "Cascade":
        """Read what `save` wrote, for the same model.

        Args:
            model: The model.
            path: The file.
            revision: Revision of the model's weights; None: not checked.
            numerics: How the model computes, as `Runtime.numerics` says it; None: not checked.

        Raises:
            ValueError: If there is no such file, or it is no cascade for this model, revision or
                numerics.
        """
        stages = CascadeStages.load(path)
        if revision not in (None, stages.revision):
            raise ValueError(
                f"{path} was calibrated for other weights; run `tokendial cascade` again."
            )
        if numerics is not None:
            stages.check_numerics(numerics)
        try:
            cascade = cls(model, stages.degrees, score=stages.score, multi_label=stages.multi_label)
        except ValueError as error:
            raise ValueError(f"{path} holds no cascade for this model: {error}") from None
        cascade.stages = stages
        return cascade
