"""Semantic segmentation: what is ignored, whole images and windows."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from examples import images, perturbed, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.data import MaskAugment
from tokendial.model.windows import predict_windows, window_starts
from tokendial.tasks import Segmentation
from tokendial.tasks.dense_prediction import best_class


def model(num_classes=3):
    wrapped = td.wrap(tiny_vit(num_classes=0), decode=td.LinearDecoder(num_classes=num_classes))
    perturbed(wrapped.decoder, std=0.5)
    return wrapped.eval()


def test_the_loss_leaves_out_ignored_pixels():
    task, logits = Segmentation(3, MaskAugment()), torch.randn(2, 3, 8, 8)
    targets = torch.randint(3, (2, 8, 8))
    targets[0] = 255
    expected = F.cross_entropy(logits[1:], targets[1:])
    torch.testing.assert_close(task.loss(logits, targets), expected)
    assert task.loss(logits, torch.full((2, 8, 8), 255)) == 0
    right = F.one_hot(targets.clamp(max=2), 3).movedim(-1, 1).float()
    assert task.batch_score(right, targets) == 1.0


@pytest.mark.parametrize("num_classes", [2, 150])
@pytest.mark.parametrize("size", [(1, 40), (33, 77), (64, 64)])
def test_metrics_follow_their_definitions(num_classes, size):
    torch.manual_seed(0)
    task, logits = Segmentation(num_classes, MaskAugment()), torch.randn(1, num_classes, 8, 8)
    target = torch.randint(min(num_classes, 5), size)
    target[torch.rand(size) < 0.2] = 255
    metrics = task.metrics()
    metrics.update(logits, [target])
    found = {name: float(value) for name, value in metrics.compute().items()}
    guess = F.interpolate(logits, size, mode="bilinear").argmax(1)[0]
    counts = target != 255
    ious = []
    for number in range(num_classes):
        both = ((guess == number) & (target == number) & counts).sum()
        either = (((guess == number) | (target == number)) & counts).sum()
        if either:
            ious.append(float(both / either))
            assert found[f"iou_{number}"] == pytest.approx(ious[-1])
    assert found["mean_iou"] == pytest.approx(sum(ious) / len(ious))
    assert found["pixel_accuracy"] == pytest.approx(float((guess == target)[counts].float().mean()))
    assert next(iter(found)) == "mean_iou"


@torch.no_grad()
def test_a_window_on_an_image_of_its_size_is_the_whole_image():
    wrapped = model()
    expected = F.interpolate(wrapped(images()), (32, 32), mode="bilinear")
    torch.testing.assert_close(predict_windows(wrapped, images(), (32, 32), 0.5), expected)


@torch.no_grad()
def test_windows_are_averaged_where_they_overlap():
    wrapped, large = model(), images(1, 32, 48)
    parts = [
        F.interpolate(wrapped(large[..., x : x + 32]), (32, 32), mode="bilinear") for x in (0, 16)
    ]
    found = predict_windows(wrapped, large, (32, 32), 0.5, windows_per_pass=1)
    torch.testing.assert_close(found[..., :16], parts[0][..., :16])
    torch.testing.assert_close(found[..., 16:32], (parts[0][..., 16:] + parts[1][..., :16]) / 2)
    torch.testing.assert_close(found[..., 32:], parts[1][..., 16:])


def test_an_image_smaller_than_a_window_is_refused():
    with pytest.raises(ValueError, match=r"images must be at least \(32, 32\), got \(16, 32\)"):
        predict_windows(model(), images(1, 16, 32), (32, 32), 0.5)


@given(st.integers(1, 300), st.integers(1, 100), st.floats(0.01, 1.0))
def test_windows_cover_every_pixel_and_end_at_the_border(extra, window, stride):
    length = window + extra
    starts = window_starts(length, window, stride)
    assert starts[0] == 0
    assert starts[-1] == length - window
    assert all(after - before <= window for before, after in pairwise(starts))


def test_the_best_class_is_that_of_all_maps_enlarged():
    logits = torch.randn(7, 5, 6)
    expected = F.interpolate(logits[None], (17, 31), mode="bilinear").argmax(1)[0]
    assert torch.equal(best_class(logits, (17, 31)), expected)
