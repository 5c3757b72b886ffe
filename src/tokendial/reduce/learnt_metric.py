"""LearntMetric: merge tokens by a similarity that was learnt for merging.

Source: Lee & Hong, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision
Transformers" (DTEM), NeurIPS 2024, https://arxiv.org/abs/2412.10569, and the authors' code: what
the metric reads, the relaxed choice of pairs, effective sizes, and the order of tokens in training.

A linear layer in each block maps the input of attention to a small feature; ToMe's matching uses it
in place of the keys. Matching has no gradient. So training merges softly: every token stays, a
share of it moves to the tokens that are like it, and its effective size falls by that share.

Departures: any number of prefix tokens is left alone; effective sizes do not fall below a
millionth, because attention reads their logarithm.
"""

# Shape legend: B batch, N tokens (prefix + patch), C width of the metric, A tokens that may be
# absorbed, E that absorb, K targets that a token may move to.

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tokendial.attention import ByProducts
from tokendial.checks import check_count
from tokendial.methods import register
from tokendial.reduce.base import Reducer
from tokendial.reduce.schedules import (
    ScheduledConfig,
    freeze_removal,
    make_removal_dial,
    patches_after_layers,
)
from tokendial.reduce.tome import bipartite_matching, in_float32, max_merged
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens, take

_LEAST_SIZE = 1e-6


@register("reduce", "learnt_metric")
@dataclass(frozen=True, kw_only=True)
class LearntMetric(ScheduledConfig):
    """LearntMetric: ToMe, with a similarity that is learnt while the backbone may stay frozen."""

    r: int | Sequence[int | float] | Sequence[Sequence[int | float]] = 8
    """Tokens that each layer merges, as in `ToMe`; training merges as many softly."""
    dim: int = 64
    """Width of the feature whose cosine is the similarity, at least 1."""
    targets: int = 3
    """In training: number of most similar tokens that a token may move to, at least 1."""
    temperatures: tuple[float, float] = (0.1, 0.1)
    """In training: what similarities, and then the logits of all pairs, are divided by; above 0.
    Lower values choose pairs more sharply."""
    proportional_attention: bool = True
    """Whether attention adds the logarithm of the token sizes to its logits. In training, this is
    how the model feels that a token has moved."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", freeze_removal(self.r))
        check_count("dim", self.dim, at_least=1)
        check_count("targets", self.targets, at_least=1)
        pair: object = self.temperatures
        if not isinstance(pair, list | tuple) or not (
            len(pair) == 2 and all(type(value) in (int, float) and value > 0 for value in pair)
        ):
            raise ValueError(f"temperatures must be two numbers above 0, got {pair!r}.")
        object.__setattr__(self, "temperatures", tuple(map(float, pair)))

    def max_removed(self, num_patches: int) -> int:
        """Largest number of patch tokens that one layer can merge of `num_patches`."""
        return max_merged(num_patches)

    def with_schedules(self, schedules: Sequence[Sequence[int | float]]) -> "LearntMetric":
        """The same method with these schedules as its degrees 1, 2, ..."""
        return replace(self, r=[list(each) for each in schedules])

    def build(self, vit: ViTShape) -> "LearntMetricReducer":
        """Make the module. Raises a ValueError if lists do not fit, see `make_schedule_dial`."""
        return LearntMetricReducer(self, vit)


class LearntMetricReducer(Reducer):
    """Runs LearntMetric, with one linear layer of D * dim + dim parameters per block.

    With one number r the degree is r. With lists of r, degree 0 merges nothing, degree 1 follows
    the first list, and so on.
    """

    needs = frozenset({"attention_input"})
    tracks_size = True

    def __init__(self, config: LearntMetric, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.proportional_attention = config.proportional_attention
        self.schedules, self.degree = make_removal_dial(
            freeze_removal(config.r), vit, max_merged, highest=max_merged(vit.num_patches)
        )
        self.degrees = tuple(range(len(self.schedules)))
        self.metrics = nn.ModuleList(nn.Linear(vit.embed_dim, config.dim) for _ in range(vit.depth))

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Whether the schedule merges tokens in `layer`."""
        return self.schedules[degree][layer - 1] > 0

    def group(
        self, layer: int, degree: int, tokens: Tokens, attended: ByProducts
    ) -> Grouping | None:
        """Match the tokens by the learnt similarity; in training, merge them softly."""
        assert attended.attention_input is not None
        metric_BNC = self.metrics[layer - 1](attended.attention_input.detach())
        schedule = self.schedules[degree]
        if not self.training:
            return bipartite_matching(
                metric_BNC, schedule[layer - 1], num_prefix_tokens=tokens.prefix
            )
        # All tokens are still there. Those that earlier layers absorbed stand last.
        num_patches = tokens.x.shape[1] - tokens.prefix
        left = patches_after_layers(num_patches, schedule[: layer - 1], max_merged)
        size_BN = tokens.size
        if size_BN is None:
            size_BN = torch.ones(tokens.x.shape[:2], device=tokens.x.device)
        return soft_matching(
            metric_BNC,
            size_BN,
            schedule[layer - 1],
            num_prefix_tokens=tokens.prefix,
            num_active=left[-1] if left else num_patches,
            targets=self.config.targets,
            temperatures=self.config.temperatures,
        )


@dataclass(slots=True)
class SoftGrouping(Grouping):
    """A reduction in training that removes no token: shares of some tokens move to others.

    `keep` is the new order of all tokens.
    """

    moved: Tensor = None  # type: ignore[assignment]  # a field after fields with defaults needs one
    """[B, A, E] share of each source that moves to each target."""
    first: int = 0
    """Position of the first source; sources and targets alternate from there on."""
    new_size: Tensor = None  # type: ignore[assignment]
    """[B, N] effective sizes after the reduction, in the new order."""

    def merge_each(
        self, features: Sequence[Tensor], weight_BN: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Targets become the weighted mean of themselves and what moves to them.

        Returns:
            The features [B, N, *] in the new order, and None.
        """
        if weight_BN is None:
            weight_BN = features[0].new_ones(features[0].shape[:2])
        source, target = self._split()
        to_targets = self.moved.transpose(-1, -2)
        weight_BN1 = weight_BN.unsqueeze(-1)
        total_BE1 = weight_BN1[:, target] + to_targets @ weight_BN1[:, source]
        merged = []
        for x_BND in features:
            weighted = x_BND.float() * weight_BN1
            sums = weighted[:, target] + to_targets @ weighted[:, source]
            changed = x_BND.clone()
            changed[:, target] = (sums / total_BE1).to(x_BND.dtype)
            merged.append(take(changed, self.keep))
        return merged, None

    def sizes(self, size_BN: Tensor) -> Tensor:
        """The effective sizes; those of the old tokens went into them already."""
        return self.new_size

    def _split(self) -> tuple[slice, slice]:
        """Positions of the sources, and of the targets."""
        num_sources, num_targets = self.moved.shape[1:]
        last_source = self.first + 2 * num_sources - 1
        last_target = self.first + 2 * num_targets
        return slice(self.first, last_source, 2), slice(self.first + 1, last_target, 2)


@in_float32
def soft_matching(
    metric_BNC: Tensor,
    size_BN: Tensor,
    r: int,
    *,
    num_prefix_tokens: int,
    num_active: int,
    targets: int,
    temperatures: tuple[float, float],
) -> Grouping | None:
    """Move `r` tokens softly into those that are like them.

    Args:
        metric_BNC: Features whose cosine is the similarity. Gradients flow into them.
        size_BN: Effective sizes of the tokens.
        r: Tokens to move, at most half of the active ones.
        num_prefix_tokens: Leading tokens that are left alone.
        num_active: Number of tokens after them that take part.
        targets: Number of tokens that each may move to.
        temperatures: See `LearntMetric.temperatures`.

    Returns:
        The grouping, or None if nothing moves. New order: prefix tokens; active tokens from the
        largest to the smallest effective size; the others.

    Source:
        DTEM, section 3.2, and the authors' code.
    """
    r = min(r, max_merged(num_active))
    if r <= 0:
        return None
    first, last = num_prefix_tokens, num_prefix_tokens + num_active
    unit_BNC = metric_BNC.float()[:, first:last]
    unit_BNC = unit_BNC / torch.linalg.vector_norm(unit_BNC, dim=-1, keepdim=True)
    similarity_BAE = unit_BNC[:, 0::2] @ unit_BNC[:, 1::2].transpose(-1, -2)
    moved_BAE = relaxed_pairs(similarity_BAE, r, targets, temperatures)
    source_BA, target_BE = size_BN[:, first:last:2], size_BN[:, first + 1 : last : 2]
    source_BA_new = source_BA * (1.0 - moved_BAE.sum(dim=-1))
    # The gradient is that of the share, also where the size would fall below the least one.
    source_BA_new = source_BA_new + (source_BA_new.clamp(min=_LEAST_SIZE) - source_BA_new).detach()
    target_BE_new = target_BE + (moved_BAE.transpose(-1, -2) @ source_BA.unsqueeze(-1)).squeeze(-1)
    new_BN = size_BN.clone()
    new_BN[:, first:last:2], new_BN[:, first + 1 : last : 2] = source_BA_new, target_BE_new
    by_size = new_BN[:, first:last].argsort(dim=1, descending=True, stable=True)
    others = torch.arange(size_BN.shape[1], device=size_BN.device).expand(len(size_BN), -1)
    keep_BN = torch.cat([others[:, :first], first + by_size, others[:, last:]], dim=1)
    return SoftGrouping(
        keep_BN,
        keep_BN[:, :0],
        keep_BN[:, :0],
        size_BN.shape[1],
        moved=moved_BAE,
        first=first,
        new_size=new_BN.gather(1, keep_BN),
    )


def relaxed_pairs(
    similarity_BAE: Tensor, r: int, targets: int, temperatures: tuple[float, float]
) -> Tensor:
    """Choose about `r` pairs so that gradients flow: shares of each source for each target.

    A softmax over all pairs is taken `r` times. Each time, the logits of a source fall by what it
    has given away, so that the next softmax prefers others.

    Args:
        similarity_BAE: Similarity of each source and each target.
        r: Number of pairs.
        targets: Most similar targets of a source that are considered.
        temperatures: See `LearntMetric.temperatures`.

    Returns:
        [B, A, E], with rows that sum to at most 1.

    Source:
        Xie & Ermon, "Reparameterizable Subset Sampling via Continuous Relaxations", IJCAI 2019, in
        the form of DTEM's code.
    """
    best_BAK, index_BAK = similarity_BAE.topk(min(targets, similarity_BAE.shape[2]), dim=-1)
    logits_BAK = best_BAK / temperatures[0]
    chosen_BAK = torch.zeros_like(logits_BAK)
    for _ in range(r):
        share_BAK = (logits_BAK / temperatures[1]).flatten(1).softmax(dim=-1).view_as(logits_BAK)
        chosen_BAK = chosen_BAK + share_BAK
        left_BA1 = 1.0 - share_BAK.sum(dim=-1, keepdim=True)
        logits_BAK = logits_BAK + left_BA1.clamp(min=torch.finfo(torch.float32).eps).log()
    chosen_BAK = chosen_BAK / chosen_BAK.detach().sum(dim=-1, keepdim=True).clamp(min=1.0)
    return torch.zeros_like(similarity_BAE).scatter(-1, index_BAK, chosen_BAK)
