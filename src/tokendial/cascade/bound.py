"""How large a share may be, given how often it was counted in a sample (Clopper and Pearson)."""

import math
from functools import cache

import torch

_BISECTIONS = 60


@cache
def largest_share(count: int, total: int, confidence: float) -> float:
    """Upper bound of a share: it holds with probability `confidence` over the draw of the sample.

    Args:
        count: How many of the sample have the property.
        total: Size of the sample, at least 1.
        confidence: Probability in (0, 1).

    Source:
        Clopper and Pearson, Biometrika 26, 1934 (one-sided).

    Example:
        >>> round(largest_share(0, 299, 0.95), 4)
        0.01
    """
    if count >= total:
        return 1.0
    hits = torch.arange(count + 1, dtype=torch.float64)
    whole = torch.tensor(total, dtype=torch.float64)
    log_choices = (whole + 1).lgamma() - (hits + 1).lgamma() - (whole - hits + 1).lgamma()
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        logs = log_choices + hits * math.log(share) + (whole - hits) * math.log1p(-share)
        at_most_count = float(logs.exp().sum())
        low, high = (share, high) if at_most_count > 1 - confidence else (low, share)
    return high


def smallest_share(count: int, total: int, confidence: float) -> float:
    """Lower bound of a share; see `largest_share`."""
    return 1.0 - largest_share(total - count, total, confidence)


def smallest_sample(most: float, confidence: float) -> int:
    """Size from which a sample can show that a share is at most `most`: if it has none of it."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - most))
