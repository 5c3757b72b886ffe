"""Nearest neighbours of embeddings, checked by a loop over pairs of images."""

import pytest
import torch

from tokendial.measure import (
    nearest_neighbours,
    neighbour_overlap,
    predict_classes,
    predict_left_out,
)
from tokendial.measure import neighbours as module


def by_loop(embeddings, count):
    """The nearest other images of each, one pair at a time."""
    found = []
    for i, one in enumerate(embeddings):
        others = [
            (-float(torch.cosine_similarity(one, other, dim=0)), j)
            for j, other in enumerate(embeddings)
            if j != i
        ]
        found.append([j for _, j in sorted(others)[:count]])
    return found


@pytest.mark.parametrize("chunk", [1000, 5])
def test_neighbours_are_the_most_similar_other_images(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    embeddings = torch.randn(13, 4, generator=torch.Generator().manual_seed(0))
    assert nearest_neighbours(embeddings, 3).tolist() == by_loop(embeddings, 3)


def test_overlap_counts_the_neighbours_that_both_models_find():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(9, width, generator=generator) for width in (4, 6))
    pairs = zip(by_loop(first, 4), by_loop(second, 4), strict=True)
    expected = [len(set(one) & set(other)) / 4 for one, other in pairs]
    assert neighbour_overlap(first, second, neighbours=4).tolist() == expected
    assert neighbour_overlap(first, 3 * first, neighbours=8).tolist() == [1.0] * 9


@pytest.mark.parametrize(
    ("sizes", "neighbours", "message"),
    [
        ((4, 4), 4, "neighbours must be less than the number of images, 4, got 4"),
        ((4, 4), 0, "neighbours must be an integer of at least 1, got 0"),
        ((4, 5), 1, "embeddings must be of the same images, got 4 and 5"),
    ],
)
def test_numbers_that_do_not_fit_raise(sizes, neighbours, message):
    first, second = (torch.ones(size, 2) for size in sizes)
    with pytest.raises(ValueError, match=message):
        neighbour_overlap(first, second, neighbours=neighbours)


@pytest.mark.parametrize("chunk", [1000, 5])
def test_an_image_does_not_vote_for_itself(chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(12, 3, generator=generator)
    labels = torch.randint(3, (12,), generator=generator)
    expected = []
    for left_out in range(12):
        others = [number for number in range(12) if number != left_out]
        known = embeddings[others], labels[others]
        expected.append(int(predict_classes(*known, embeddings[[left_out]], neighbours=4)))
    assert predict_left_out(embeddings, labels, neighbours=4).tolist() == expected
    assert expected != labels.tolist()
