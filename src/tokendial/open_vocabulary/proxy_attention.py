"""Attention whose weights come from the features of another model.

Source: Lan et al., "ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation",
ECCV 2024, https://arxiv.org/abs/2408.04883, and the authors' code.

Departures: the mean similarity is that of one image (the authors' code takes it over the batch and
runs images one by one). A patch whose similarities all lie below the mean attends to all patches;
the authors' code gives NaN there, for instance on an image of one colour.
"""

# Shape legend: B batch, D width of the values, R rows and S columns of the values, C width of the
# proxy's features, H rows and W columns of the proxy's features, L = H * W.

import torch
import torch.nn.functional as F
from torch import Tensor


def proxy_attention(
    values_BDRS: Tensor, features_BCHW: Tensor, *, beta: float = 1.2, gamma: float = 3.0
) -> Tensor:
    """Attention with one map for all heads, which the features of another model give.

    The similarity of two patches is the cosine of their features. `beta` times the mean similarity
    of the image is subtracted, the rest is multiplied by `gamma`. Entries below 0 get no weight;
    the others get the softmax.

    Args:
        values_BDRS: Values of all heads at each patch.
        features_BCHW: Feature map of the other model, to whose size the values are resized.
        beta: Factor on the mean similarity.
        gamma: Factor on the similarities.

    Returns:
        Weighted values [B, L, D].
    """
    grid = features_BCHW.shape[-2:]
    values_BDL = F.interpolate(values_BDRS, tuple(grid), mode="bilinear").flatten(2)
    features_BCL = F.normalize(features_BCHW.flatten(2).float(), dim=1)
    similarity_BLL = features_BCL.transpose(1, 2) @ features_BCL
    mean = similarity_BLL.mean(dim=(1, 2), keepdim=True)
    logits = (similarity_BLL - beta * mean) * gamma
    keep = logits >= 0
    keep = keep | ~keep.any(dim=-1, keepdim=True)
    weights = logits.masked_fill(~keep, -torch.inf).softmax(dim=-1).to(values_BDL.dtype)
    return weights @ values_BDL.transpose(1, 2)
