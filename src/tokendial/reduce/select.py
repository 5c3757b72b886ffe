"""What DyT and DAR share: each layer selects the tokens that its FFN processes.

A dispatcher gives one logit per patch token. In training, Gumbel noise turns the logits into a hard
mask on the FFN's output. At inference, the selected tokens of the whole batch are packed into one
matrix and the FFN runs on that matrix only; the other tokens skip the FFN.

Sources: see `dyt` and `dar`. Departure from both: selection by top-k, and thresholds for degrees
that were not trained, see `tokendial.calibrate`.
"""

# Shape legend: B batch, N tokens (prefix + patch), L patch tokens, D embed_dim, K selected tokens
# of all images.

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokendial.attention import ByProducts
from tokendial.checks import check_choice, check_fraction, check_not_negative
from tokendial.passes import ForwardPass
from tokendial.reduce.base import (
    Reducer,
    ReducerConfig,
    best_tokens,
    make_rate_dial,
    num_kept_tokens,
)
from tokendial.shape import ViTShape
from tokendial.tokens import Grouping, Tokens


@dataclass(frozen=True, kw_only=True)
class SelectConfig(ReducerConfig):
    """Settings that DyT and DAR share."""

    target_ratio: float = 0.5
    """Fraction of the patch tokens that each FFN processes on average after training, in (0, 1]."""
    ratio_weight: float = 2.0
    """Weight of the training loss that pulls the fraction of processed tokens to `target_ratio`; at
    least 0."""
    selection: Literal["threshold", "topk"] = "threshold"
    """How tokens are selected at inference. "threshold" (as published) takes the tokens whose logit
    is above a threshold, which is 0 at `target_ratio`; their number depends on the image. "topk"
    takes the tokens with the highest logits, exactly the fraction of the degree in each image."""

    def __post_init__(self) -> None:
        check_fraction("target_ratio", self.target_ratio)
        check_choice("selection", self.selection, ("threshold", "topk"))
        check_not_negative("ratio_weight", self.ratio_weight)


class Selector(Reducer):
    """Runs the FFN of every layer on the selected tokens.

    The degree is the position in the list of fractions of `make_rate_dial`. By top-k the fraction
    is exact, and all shapes are known. By threshold the number of selected tokens depends on the
    images, and torch.compile traces it as an unknown size. `tokendial.calibrate` finds thresholds
    that select about these fractions, and measures the selected fractions. Costs are computed from
    the measured fractions, or from those of the dial if nothing was measured.
    """

    keeps_grid = True
    learns_one_share = True
    protects_in_place = True
    temperature = 5.0
    """Temperature of the sigmoid in training."""
    dispatchers: nn.ModuleList
    """One module per layer. It gives the logits of the patch tokens, in any shape [B, ...]."""

    def __init__(self, config: SelectConfig, vit: ViTShape) -> None:
        super().__init__()
        self.config = config
        self.rates, self.degree = make_rate_dial(config.target_ratio)
        self.degrees = tuple(range(len(self.rates)))

    @property
    def calibratable(self) -> bool:
        """Whether `tokendial.calibrate` applies: not by top-k, and not if the target is 1."""
        return self.config.selection == "threshold" and self.degree > 0

    def threshold(self, degree: int) -> float:
        """Threshold of the logits at `degree` (from 1 up); 0 at the target.

        Without calibration it is estimated: in training the noise selects a token with logit x with
        a probability of sigmoid(x), so a fraction s corresponds to the threshold log(1 / s - 1).
        """
        if self.calibration:
            return self.calibration.thresholds[degree - 1]
        target = self.rates[self.degree]
        # Estimates count from that of the target, whose threshold is 0. A target of 1 has none.
        at_target = _threshold_of_share(target) if target < 1 else 0.0
        return _threshold_of_share(self.rates[degree]) - at_target

    def share(self, degree: int) -> float:
        """Fraction of the patch tokens that FFNs process at `degree`: measured, or nominal."""
        if self.calibration and degree:
            return self.calibration.shares[degree - 1]
        return self.rates[degree]

    @contextmanager
    def record_logits(self, record: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `record` with the logits [B, L] of each layer in each forward pass of the block."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
            record(logits.detach().flatten(1).float())

        handles = [dispatcher.register_forward_hook(hook) for dispatcher in self.dispatchers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @abstractmethod
    def logits(self, layer: int, tokens: Tokens) -> Tensor:
        """Return the logit of each patch token, [B, L]; high logits are selected."""

    def reduces_in(self, layer: int, degree: int) -> bool:
        """Return True: every layer selects tokens."""
        return True

    def around_ffn(
        self,
        layer: int,
        degree: int,
        tokens: Tokens,
        attended: ByProducts,
        ffn: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Run the FFN on the selected patch tokens and on all prefix tokens."""
        logits_BL = self.logits(layer, tokens)
        if tokens.protected is not None:
            logits_BL = logits_BL.masked_fill(tokens.protected, torch.inf)
        # The meta device counts costs and has no values to compare with a threshold: there, the
        # fraction of the degree decides.
        if not self.training and (self.config.selection == "topk" or logits_BL.is_meta):
            count = num_kept_tokens(logits_BL.shape[1], self.share(degree))
            count = max(count, tokens.num_protected)
            return _run_ffn_on_best(ffn, tokens, logits_BL, count)
        logits_BL = logits_BL - self.threshold(degree)
        always = logits_BL.new_ones(logits_BL.shape[0], tokens.prefix)
        if self.training:
            chosen = gumbel_sigmoid(logits_BL, self.temperature)
            mask_BN = torch.cat([always, chosen], dim=1)
            out_BND = mask_BN.to(tokens.x.dtype).unsqueeze(-1) * ffn(tokens.x)
            return tokens.x + out_BND, mask_BN
        mask_BN = torch.cat([always, (logits_BL > 0).to(always.dtype)], dim=1)
        return run_ffn_on_selected(ffn, tokens.x, mask_BN > 0), mask_BN


def _threshold_of_share(share: float) -> float:
    return math.log(1 / share - 1)


def gumbel_sigmoid(logits: Tensor, temperature: float) -> Tensor:
    """Draw hard 0/1 decisions with Gumbel noise; gradients are those of the soft decisions.

    Source:
        Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017,
        https://arxiv.org/abs/1611.01144, for two categories.
    """
    soft = ((logits + logistic_noise(logits)) / temperature).sigmoid()
    return (soft > 0.5).to(soft.dtype) - soft.detach() + soft


def logistic_noise(like: Tensor) -> Tensor:
    """Draw differences of two Gumbel variables, in the shape of `like`."""
    first, second = (torch.empty_like(like).exponential_().log() for _ in range(2))
    return second - first


def run_ffn_on_selected(
    ffn: Callable[[Tensor], Tensor], x_BND: Tensor, selected_BN: Tensor
) -> Tensor:
    """Pack the selected tokens of all images into [K, D], run `ffn`, and add its output to them."""
    flat = x_BND.flatten(0, 1)
    index = selected_BN.flatten().nonzero().squeeze(1)
    if torch.compiler.is_exporting():
        # ONNX Runtime and others run index_add slowly, wrongly, or not at all.
        rows = flat.index_select(0, index)
        return flat.index_copy(0, index, rows + ffn(rows)).view(x_BND.shape)
    out = ffn(flat.index_select(0, index)).to(flat.dtype)
    return flat.index_add(0, index, out).view(x_BND.shape)


def _run_ffn_on_best(
    ffn: Callable[[Tensor], Tensor], tokens: Tokens, logits_BL: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Run `ffn` on the prefix tokens and the `count` best patch tokens of each image."""
    num_tokens = tokens.x.shape[1]
    grouping = Grouping.keep_only(best_tokens(logits_BL, count, tokens.prefix), num_tokens)
    out_BND = grouping.unmerge(ffn(grouping.merge(tokens.x)))
    return tokens.x + out_BND, (grouping.index >= 0).to(tokens.x.dtype)


def selected_patches(outcome: ForwardPass) -> Tensor:
    """Return the decisions on the patch tokens of all layers, [B, depth * L]: 1 selected, 0 not.

    In a `Stack`, later layers may have fewer tokens.

    Raises:
        ValueError: If the pass selected no tokens, because it ran at degree 0.
    """
    if any(tokens.selected is None for tokens in outcome.tokens):
        raise ValueError(
            "degree must be at least 1 in training, so that tokens are selected; got 0."
        )
    masks = [t.selected[:, t.prefix :] for t in outcome.tokens if t.selected is not None]
    return torch.cat(masks, dim=1)
