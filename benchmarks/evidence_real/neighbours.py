"""Weighted nearest-neighbour classification of features, as DINO evaluates frozen models.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021,
https://arxiv.org/abs/2104.14294, and the authors' eval_knn.py: cosine similarity, 20 neighbours,
and a vote of exp(similarity / 0.07) for the class of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
_TEMPERATURE = 0.07
_CHUNK = 1000


def predict_classes(
    train: Tensor, labels: Tensor, test: Tensor, *, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Class of each test image, [test images].

    Args:
        train: Features [train images, D].
        labels: Classes [train images], from 0.
        test: Features [test images, D].
        neighbours: Number of neighbours that vote; all of `train` if there are fewer.
    """
    known = F.normalize(train.float(), dim=1)
    classes = F.one_hot(labels).float()
    found = []
    for chunk in F.normalize(test.float(), dim=1).split(_CHUNK):
        nearest = (chunk @ known.T).topk(min(neighbours, len(known)), dim=1)
        votes = (nearest.values / _TEMPERATURE).exp().unsqueeze(-1) * classes[nearest.indices]
        found.append(votes.sum(dim=1).argmax(dim=1))
    return torch.cat(found)
