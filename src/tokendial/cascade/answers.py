"""How sure a model is of an answer, and whether two answers are the same."""

# Shape legend: B images, K classes or labels, S positions of a map (none for classification).

from typing import Literal, get_args

import torch
from torch import Tensor

ScoreName = Literal["margin", "probability", "entropy"]
SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
"""margin: difference of the two largest probabilities; probability: the largest one; entropy: minus
the entropy. In a choice between two all of them order images alike."""
SAME_IOU = 0.9
"""Overlap (IoU) from which two masks are the same answer."""


def how_sure(logits_BKS: Tensor, score: ScoreName, *, multi_label: bool = False) -> Tensor:
    """How sure a model is of its answer for each image; higher is surer. [B], float32.

    Of several labels the least sure one counts. Of a mask, the mean over its boundary counts,
    because every mask is sure of most pixels; a mask without boundary counts as a whole.

    Args:
        logits_BKS: Logits [B, K] or maps of logits [B, K, h, w].
        score: The measure.
        multi_label: Whether each logit is a label of its own (a sigmoid), not one of K classes.
    """
    logits = logits_BKS.float()
    binary = multi_label or logits.shape[1] == 1
    # [B, labels, 2, *S] or [B, 1, K, *S]: independent choices, and the options of each.
    odds = torch.stack([logits, -logits], dim=2) / 2 if binary else logits.unsqueeze(1)
    logs = odds.log_softmax(dim=2)
    if score == "margin":
        first, second = logs.exp().topk(2, dim=2).values.unbind(2)
        sure = first - second
    elif score == "probability":
        sure = logs.exp().amax(dim=2)
    else:
        sure = (logs.exp() * logs).sum(dim=2)
    sure = sure.amin(dim=1)
    if sure.dim() == 1:
        return sure
    edge = _boundary(answers(logits_BKS, multi_label=multi_label))
    edge |= ~edge.flatten(1).any(dim=1)[:, None, None]
    return (sure * edge).flatten(1).sum(dim=1) / edge.flatten(1).sum(dim=1)


def answers(logits_BKS: Tensor, *, multi_label: bool = False) -> Tensor:
    """The answer: the class [B, *S] of each image or position, or each of several labels [B, K].

    Args:
        logits_BKS: Logits [B, K] or maps of logits [B, K, h, w].
        multi_label: Whether each logit is a label of its own.
    """
    if logits_BKS.shape[1] == 1:
        return (logits_BKS.squeeze(1) > 0).long()
    return (logits_BKS > 0).long() if multi_label else logits_BKS.argmax(dim=1)


def are_same(first: Tensor, second: Tensor) -> Tensor:
    """Whether each image has the same answer twice. [B], bool.

    Masks are the same if they overlap by at least `SAME_IOU`, see `overlap`.

    Args:
        first: Answers as `answers` returns them: [B], [B, K] or [B, h, w].
        second: The other answers.
    """
    if first.dim() < 3:
        return (first == second).reshape(len(first), -1).all(dim=1)
    return torch.tensor([overlap(*pair) >= SAME_IOU for pair in zip(first, second, strict=True)])


def overlap(first: Tensor, second: Tensor) -> float:
    """Overlap (IoU) of two masks of class numbers, of any equal shape.

    It is the mean over the classes that either of them has, without class 0, the background, if
    there is another.
    """
    present = set(torch.cat([first, second]).flatten().tolist())
    inside = present - {0} or present
    shares = []
    for number in inside:
        one, other = first == number, second == number
        shares.append(float((one & other).sum() / (one | other).sum()))
    return sum(shares) / len(shares)


def _boundary(mask_BHW: Tensor) -> Tensor:
    """Pixels whose right, left, upper or lower neighbour has another class. [B, h, w], bool."""
    edge = torch.zeros_like(mask_BHW, dtype=torch.bool)
    down, right = mask_BHW.diff(dim=1) != 0, mask_BHW.diff(dim=2) != 0
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    edge[:, :, 1:] |= right
    edge[:, :, :-1] |= right
    return edge
