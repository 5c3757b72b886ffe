"""Agreement of outputs with those of degree 0, on cases that are worked out by hand."""

import math

import pytest
import torch

from tokendial.measure.agreement import (
    box_agreement,
    class_agreement,
    depth_agreement,
    feature_agreement,
    heat_map_agreement,
    mask_agreement,
)


def test_features_are_compared_at_each_position():
    first = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 1.0]]])
    found = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[3.0, 4.0], [1.0, -1.0]]])
    assert feature_agreement(found, first)["feature_cosine"].tolist() == pytest.approx([0.5, 0.5])
    real = torch.tensor([[1, 0], [1, 1]])
    scores = feature_agreement(found, first, real)
    assert scores["feature_cosine"].tolist() == pytest.approx([1, 0.5])


def test_classes_by_the_first_one_and_by_the_probabilities():
    first = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()
    found = torch.tensor([[0.4, 0.5, 0.1], [0.3, 0.5, 0.2]]).log()
    scores = class_agreement(found, first)
    assert scores["same_answer"].tolist() == [0, 1]
    assert scores["probability_overlap"].tolist() == pytest.approx([0.8, 0.8])


def test_masks_of_classes_by_pixels_and_by_overlap():
    """Four pixels of three classes: 0 0 1 2 becomes 0 1 1 1 in the first image."""
    first = torch.eye(3)[torch.tensor([[0, 0, 1, 2], [2, 2, 2, 2]])]
    found = torch.eye(3)[torch.tensor([[0, 1, 1, 1], [2, 2, 2, 2]])]
    scores = mask_agreement(*(each.transpose(1, 2).unflatten(2, (2, 2)) for each in (found, first)))
    assert scores["same_pixels"].tolist() == [0.5, 1]
    assert scores["mean_iou"].tolist() == pytest.approx([(1 / 2 + 1 / 3 + 0) / 3, 1])


def test_a_binary_mask_is_compared_inside():
    first = torch.tensor([[1.0, 1, -1, -1], [-1, -1, -1, -1]]).view(2, 1, 2, 2)
    found = torch.tensor([[3.0, -2, -2, -1], [-5, -1, -1, -1]]).view(2, 1, 2, 2)
    scores = mask_agreement(found, first)
    assert scores["same_pixels"].tolist() == [0.75, 1]
    assert scores["mean_iou"].tolist() == pytest.approx([1 / 2, 1])


def test_depth_errors_are_fractions_of_the_mean_depth():
    first = torch.tensor([[[0.0, 2.0], [4.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found = torch.tensor([[[1.0, 2.0], [4.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert depth_agreement(found, first)["relative_error"].tolist() == [0.25, 0]
    beside_nothing = depth_agreement(found[:1], torch.zeros(1, 2, 2))
    assert math.isinf(beside_nothing["relative_error"])


def test_heat_maps_by_overlap_and_by_the_place_of_the_peak():
    """Of four peaks, one moves by a row and a column, one by two columns, one by two rows."""
    first, found = torch.zeros(1, 4, 3, 4), torch.zeros(1, 4, 3, 4)
    for number, (before, after) in enumerate(
        [((0, 1), (1, 2)), ((1, 0), (1, 2)), ((0, 3), (2, 3)), ((1, 1), (1, 1))]
    ):
        first[0, number][before], found[0, number][after] = 4, 3
    found[0, 0, 0, 1], first[0, 1, 2, 2], found[0, 1, 2, 2] = 1, -9, -1
    scores = heat_map_agreement(found, first)
    assert scores["same_peak"].tolist() == [0.5]
    # The first maps share 1 of 4 + 3, the last ones 3 of 4; negative values count as 0.
    assert scores["overlap"].tolist() == pytest.approx([(1 / 7 + 0 + 0 + 3 / 4) / 4])
    empty = torch.zeros(1, 1, 2, 2)
    assert heat_map_agreement(empty, empty)["overlap"].tolist() == [1]


def test_boxes_are_found_again_by_class_and_overlap():
    """Three boxes of confidence 0.6, 0.3 and 0.1; the last class moves, the second shrinks."""
    first = torch.tensor(
        [[[0.5, 0.5, 0.4, 0.2, 0.6, 0.0], [0.2, 0.2, 0.2, 0.2, 0.3, 0.0],
          [0.8, 0.8, 0.1, 0.1, 0.0, 0.1]]]
    )  # fmt: skip
    # The first box moves by a quarter of its width: 0.06 of 0.10 are shared.
    found = torch.tensor(
        [[[0.6, 0.5, 0.4, 0.2, 0.5, 0.2], [0.2, 0.2, 0.2, 0.05, 0.4, 0.0],
          [0.8, 0.8, 0.1, 0.1, 0.2, 0.1]]]
    )  # fmt: skip
    assert box_agreement(found, first)["boxes_found_again"].tolist() == pytest.approx([0.6])
    found[0, 0, 0] = 0.65  # 0.05 of 0.11 are shared
    assert box_agreement(found, first)["boxes_found_again"].tolist() == [0]


def test_only_the_most_confident_boxes_are_compared():
    boxes = torch.rand(1, 12, 6, generator=torch.Generator().manual_seed(0))
    boxes[..., :2] = torch.arange(12.0).view(12, 1)
    boxes[..., 2:4] = 0.5
    boxes[..., 4:] = torch.linspace(0.1, 0.9, 12).view(12, 1) * torch.tensor([1.0, 0.5])
    moved = boxes.clone()
    moved[0, :2, 0] += 5
    assert box_agreement(moved, boxes)["boxes_found_again"].tolist() == [1]
