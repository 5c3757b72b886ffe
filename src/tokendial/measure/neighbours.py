"""Nearest neighbours among embeddings: how many stay the same, and classes by their vote.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021,
https://arxiv.org/abs/2104.14294, and the authors' eval_knn.py: cosine similarity, 20 neighbours,
and a vote of exp(similarity / 0.07) for the class of each.
"""

# Shape legend: N images, D width of the embeddings, K neighbours.

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendial.checks import check_count

NEIGHBOURS = 20
"""Number of neighbours that vote."""
MIN_IMAGES = 3
"""Smallest number of images that `embedding_scores` compares."""
_COMPARED = 10
_TEMPERATURE = 0.07
_CHUNK = 1000


def nearest_neighbours(embeddings_ND: Tensor, neighbours: int) -> Tensor:
    """Indices of the nearest other images of each image by cosine similarity, [N, K].

    Args:
        embeddings_ND: Embeddings of the images.
        neighbours: Number of neighbours K, less than N.

    Raises:
        ValueError: If `neighbours` is not in [1, N - 1].
    """
    return torch.cat([indices for _, indices in _nearest_others(embeddings_ND, neighbours)])


def _nearest_others(embeddings_ND: Tensor, neighbours: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield similarities and indices [images of a chunk, K] of the nearest other images."""
    check_count("neighbours", neighbours)
    if neighbours >= len(embeddings_ND):
        raise ValueError(
            f"neighbours must be less than the number of images, {len(embeddings_ND)}, got "
            f"{neighbours}."
        )
    known = F.normalize(embeddings_ND.float(), dim=1)
    for number, chunk in enumerate(torch.split(known, _CHUNK)):
        similarity = chunk @ known.T
        rows = torch.arange(len(chunk), device=known.device)
        similarity[rows, rows + number * _CHUNK] = -torch.inf
        nearest = similarity.topk(neighbours, dim=1)
        yield nearest.values, nearest.indices


def neighbour_overlap(first_ND: Tensor, second_ND: Tensor, *, neighbours: int = 10) -> Tensor:
    """Fraction of the nearest neighbours of each image that two models agree on, [N].

    Args:
        first_ND: Embeddings of some images by one model.
        second_ND: Embeddings of the same images by the other model, of any width.
        neighbours: Number of nearest other images of each image, less than N.

    Raises:
        ValueError: If the numbers of images differ, or `neighbours` is not in [1, N - 1].

    Example:
        >>> corners = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> neighbour_overlap(corners, 2 * corners, neighbours=1).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    if len(first_ND) != len(second_ND):
        raise ValueError(
            f"embeddings must be of the same images, got {len(first_ND)} and {len(second_ND)}."
        )
    first, second = (nearest_neighbours(some, neighbours) for some in (first_ND, second_ND))
    return (first.unsqueeze(2) == second.unsqueeze(1)).any(dim=2).float().mean(dim=1)


def predict_classes(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, *, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Class of each test image by the vote of its nearest training images, [test images].

    Args:
        train_ND: Embeddings of the training images.
        labels_N: Classes of the training images, from 0.
        test_MD: Embeddings of the test images.
        neighbours: Number of neighbours that vote; all training images if there are fewer.
    """
    known = F.normalize(train_ND.float(), dim=1)
    classes = F.one_hot(labels_N).float()
    found = []
    for chunk in torch.split(F.normalize(test_MD.float(), dim=1), _CHUNK):
        nearest = (chunk @ known.T).topk(min(neighbours, len(known)), dim=1)
        found.append(_vote(nearest.values, classes[nearest.indices]))
    return torch.cat(found)


def predict_left_out(
    embeddings_ND: Tensor, labels_N: Tensor, *, neighbours: int = NEIGHBOURS
) -> Tensor:
    """Class of each image by the vote of its nearest other images, [N].

    Args:
        embeddings_ND: Embeddings of the images.
        labels_N: Classes of the images, from 0.
        neighbours: Number of neighbours that vote, less than N.

    Raises:
        ValueError: If `neighbours` is not in [1, N - 1].
    """
    classes = F.one_hot(labels_N).float()
    nearest = _nearest_others(embeddings_ND, neighbours)
    return torch.cat([_vote(values, classes[indices]) for values, indices in nearest])


def embedding_scores(
    embeddings_ND: Tensor, unreduced_ND: Tensor, labels_N: Tensor | None = None
) -> dict[str, float]:
    """Compare embeddings with those that the same images have without reduction.

    Args:
        embeddings_ND: Embeddings of at least `MIN_IMAGES` images.
        unreduced_ND: Their embeddings without reduction.
        labels_N: Classes of the images, from 0. None: they have none.

    Returns:
        same_neighbours: the fraction of the 10 nearest other images of an image (of few images,
        half of the others) that are the same, mean over images. cosine: the mean cosine similarity.
        With classes also neighbour_accuracy: the fraction of images whose class the vote of the 20
        nearest other images gives.

    Raises:
        ValueError: If there are fewer images.
    """
    if len(embeddings_ND) < MIN_IMAGES:
        raise ValueError(
            f"images must be at least {MIN_IMAGES}, because nearest neighbours of embeddings are "
            f"compared, got {len(embeddings_ND)}."
        )
    others = len(embeddings_ND) - 1
    overlap = neighbour_overlap(
        embeddings_ND, unreduced_ND, neighbours=min(_COMPARED, max(1, others // 2))
    )
    cosine = F.cosine_similarity(embeddings_ND, unreduced_ND, dim=1)
    scores = {"same_neighbours": float(overlap.mean()), "cosine": float(cosine.mean())}
    if labels_N is not None:
        voted = predict_left_out(embeddings_ND, labels_N, neighbours=min(NEIGHBOURS, others))
        scores["neighbour_accuracy"] = float((voted == labels_N).float().mean())
    return scores


def _vote(similarity_MK: Tensor, classes_MKC: Tensor) -> Tensor:
    """The class with the most votes, [M]."""
    votes = (similarity_MK / _TEMPERATURE).exp().unsqueeze(-1) * classes_MKC
    return votes.sum(dim=1).argmax(dim=1)
