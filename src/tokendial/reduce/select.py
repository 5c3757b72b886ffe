"""Choosing, in each layer, which tokens the FFN processes; the others pass by.

What DyT and DAR have in common: one logit per patch token, a hard mask drawn with Gumbel noise in
training, and at inference an FFN that runs on the selected tokens of the whole batch, packed.
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, D embed_dim, K selected tokens.

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokendial.attention import ByProducts
from tokendial.checks import check_choice, check_share
from tokendial.passes import ForwardPass
from tokendial.reduce.base import Reducer, ReducerConfig, best_tokens, dial_of, num_kept_tokens
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


@dataclass(frozen=True, kw_only=True)
class SelectConfig(ReducerConfig):
    """Settings that DyT and DAR share."""

    target_ratio: float = 0.5
    """Share of the patch tokens that the FFN shall process, in (0, 1]."""
    ratio_weight: float = 2.0
    """Weight of the loss that keeps the share at its target."""
    selection: Literal["threshold", "topk"] = "threshold"
    """At inference: the tokens with a logit above a threshold (their number depends on the image),
    0 at the target as published; or the best of each image, exactly the share of the dial."""

    def __post_init__(self) -> None:
        check_share("target_ratio", self.target_ratio)
        check_choice("selection", self.selection, ("threshold", "topk"))
        if not self.ratio_weight >= 0:
            raise ValueError(f"ratio_weight must be at least 0, got {self.ratio_weight}.")


class Selector(Reducer):
    """Runs the FFN of every layer on the selected tokens.

    A degree is a position in the list of shares 1, 0.9, ... 0.1, into which the target is sorted.
    By top-k the share is exact and every size known. By threshold it depends on the images, and
    torch.compile traces it as an unknown size; `tokendial.calibrate` finds the thresholds that give
    about these shares, and measures them. Costs are those of the shares measured, or without
    calibration of the nominal ones.
    """

    keeps_grid = True
    temperature = 5.0
    """Of the sigmoid in training."""
    dispatchers: nn.ModuleList
    """One for each layer; they give the logits, of any shape [B, ...]."""

    def __init__(self, config: SelectConfig, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.rates, self.degree = dial_of(config.target_ratio)
        self.degrees = tuple(range(len(self.rates)))

    @property
    def calibratable(self) -> bool:
        """Whether there are thresholds, and one of a trained share to measure others from."""
        return self.config.selection == "threshold" and self.degree > 0

    def threshold(self, degree: int) -> float:
        """Logit that a token has to exceed at `degree`, from 1 up; 0 at the target.

        Before calibration that of the nominal share, as if logits were those of shares drawn in
        training: the noise makes a logit x a probability of sigmoid(x).
        """
        if self.calibration:
            return self.calibration.thresholds[degree - 1]
        target = self.rates[self.degree]
        # A target of 1 is degree 0, which has no threshold that others could be measured from.
        return _threshold(self.rates[degree]) - (_threshold(target) if target < 1 else 0.0)

    def share(self, degree: int) -> float:
        """Share of the patch tokens that are processed at `degree`: nominal, or as measured."""
        if self.calibration and degree:
            return self.calibration.shares[degree - 1]
        return self.rates[degree]

    @contextmanager
    def logits_heard(self, hear: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `hear` with the logits [B, L] of every layer of every pass inside."""

        def tell(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
            hear(logits.detach().flatten(1).float())

        hooks = [dispatcher.register_forward_hook(tell) for dispatcher in self.dispatchers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @abstractmethod
    def logits(self, layer: int, tokens: Tokens) -> Tensor:
        """Logit of each patch token, [B, L]; above 0: the FFN processes it."""

    def acts(self, layer: int, degree: int) -> bool:
        """In every layer."""
        return True

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Skip the FFN for tokens that are not selected; prefix tokens always are."""
        logits_BL = self.logits(layer, tokens)
        # Without values, on the meta device, the cost is that of the share.
        if not self.training and (self.config.selection == "topk" or logits_BL.is_meta):
            count = num_kept_tokens(logits_BL.shape[1], self.share(degree))
            return _run_on_best(ffn, tokens, logits_BL, count)
        logits_BL = logits_BL - self.threshold(degree)
        always = logits_BL.new_ones(logits_BL.shape[0], tokens.prefix)
        if self.training:
            chosen = gumbel_sigmoid(logits_BL, self.temperature)
            mask_BN = torch.cat([always, chosen], dim=1)
            out_BND = mask_BN.to(tokens.x.dtype).unsqueeze(-1) * ffn(tokens.x)
            return tokens.x + out_BND, mask_BN
        mask_BN = torch.cat([always, (logits_BL > 0).to(always.dtype)], dim=1)
        return run_on_selected(ffn, tokens.x, mask_BN > 0), mask_BN


def _threshold(share: float) -> float:
    return math.log(1 / share - 1)


def gumbel_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    """Hard 0/1 decisions drawn with Gumbel noise; the gradient is that of the soft ones.

    Source:
        Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017,
        https://arxiv.org/abs/1611.01144, for two categories.
    """
    soft = ((logits + logistic_noise(logits)) / temperature).sigmoid()
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def logistic_noise(like: Tensor) -> Tensor:
    """Difference of two Gumbel draws, in the shape of `like`."""
    first, second = (torch.empty_like(like).exponential_().log() for _ in range(2))
    return second - first


def run_on_selected(ffn: Callable[[Tensor], Tensor], x_BND: Tensor, selected_BN: Tensor) -> Tensor:
    """Add `ffn` to the selected tokens of all images, for which they are packed into [K, D]."""
    flat = x_BND.flatten(0, 1)
    index = selected_BN.flatten().nonzero().squeeze(1)
    if torch.compiler.is_exporting():
        # Other runtimes add at indices slowly, wrongly, or not at all.
        rows = flat.index_select(0, index)
        return flat.index_copy(0, index, rows + ffn(rows)).view(x_BND.shape)
    out = ffn(flat.index_select(0, index)).to(flat.dtype)
    return flat.index_add(0, index, out).view(x_BND.shape)


def _run_on_best(
    ffn: Callable[[Tensor], Tensor], tokens: Tokens, logits_BL: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Add `ffn` to the prefix and the `count` best patch tokens of each image."""
    num_tokens = tokens.x.shape[1]
    grouping = Grouping.keeping(best_tokens(logits_BL, count, tokens.prefix), num_tokens)
    out_BND = grouping.unmerge(ffn(grouping.merge(tokens.x)))
    return tokens.x + out_BND, (grouping.index >= 0).to(tokens.x.dtype)


def selected_patches(outcome: ForwardPass) -> Tensor:
    """Decisions on the patch tokens of every layer, [B, depth, L].

    Raises:
        ValueError: If the pass made none: it ran at degree 0.
    """
    if any(tokens.selected is None for tokens in outcome.tokens):
        raise ValueError("no tokens were selected: degree must be at least 1 in training, got 0.")
    masks = [t.selected[:, t.prefix :] for t in outcome.tokens if t.selected is not None]
    return torch.stack(masks, dim=1)
