import pytest
import torch
from scipy.stats import entropy

from tokendial.cascade.answers import SCORES, answers, are_same, how_sure


@pytest.mark.parametrize("score", SCORES)
def test_how_sure_of_classes(score):
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1).sort(1).values
    expected = {
        "margin": p[:, -1] - p[:, -2],
        "probability": p[:, -1],
        "entropy": torch.from_numpy(-entropy(p.numpy(), axis=1)),
    }[score]
    torch.testing.assert_close(how_sure(logits, score), expected)


@pytest.mark.parametrize("score", SCORES)
def test_the_least_sure_label_counts(score):
    logits = torch.tensor([[5.0, -5.0, 0.1], [5.0, -5.0, 3.0], [0.2, 4.0, 4.0]])
    found = how_sure(logits, score, multi_label=True)
    alone = [how_sure(logits[:, [k]], score, multi_label=True) for k in range(3)]
    torch.testing.assert_close(found, torch.stack(alone).amin(0))
    assert found.argsort().tolist() == [0, 2, 1]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("classes", [1, 3])
def test_the_boundary_of_a_mask_counts(score, classes):
    # Sure inside and outside; on the columns of the boundary sure (first) or not (second image).
    columns = torch.tensor([[-6.0, -6, -6, 6, 6, 6], [-6.0, -6, -0.1, 0.1, 6, 6]])
    maps = columns[:, None, None, :].expand(2, 1, 4, 6)
    if classes == 3:
        maps = torch.cat([torch.zeros_like(maps), maps, torch.full_like(maps, -9.0)], dim=1)
    sure, unsure = how_sure(maps, score)
    left, right = (how_sure(maps[:, :, 0, column], score) for column in (2, 3))
    torch.testing.assert_close(torch.stack([sure, unsure]), (left + right) / 2)


def test_a_mask_without_boundary_counts_as_a_whole():
    maps = torch.tensor([3.0, 0.3])[:, None, None, None].expand(2, 1, 4, 4)
    torch.testing.assert_close(how_sure(maps, "margin"), how_sure(maps[:, :, 0, 0], "margin"))


def test_same_classes_and_labels():
    first = answers(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))
    assert are_same(first, torch.tensor([0, 0])).tolist() == [True, False]
    labels = answers(torch.tensor([[2.0, -1.0], [1.0, 1.0]]), multi_label=True)
    assert are_same(labels, torch.tensor([[1, 0], [1, 0]])).tolist() == [True, False]


def test_same_masks_overlap():
    mask = torch.zeros(3, 10, 10, dtype=torch.long)
    mask[:, :5] = 1  # 50 pixels
    other = mask.clone()
    other[0, 5, :5] = 1  # 50 of 55
    other[1, 5, :6] = 1  # 50 of 56
    assert are_same(mask, other).tolist() == [True, False, True]
    empty = torch.zeros(1, 4, 4, dtype=torch.long)
    assert are_same(empty, empty).tolist() == [True]
    assert are_same(empty, empty + 1).tolist() == [False]
    assert are_same(answers(torch.full((1, 1, 4, 4), -1.0)), empty).tolist() == [True]
