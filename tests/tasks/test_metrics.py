"""Means over classes, where some classes are absent."""

import pytest
import torch

from tokendial.tasks import metrics
from tokendial.tasks.metrics import PixelMetrics, class_metrics


@pytest.fixture(autouse=True)
def no_line_was_logged():
    metrics._log_once.cache_clear()


def test_the_mean_average_precision_leaves_out_classes_that_no_image_has(caplog):
    found = class_metrics(3, multi_label=True)
    for logits, target in (([2.0, -1.0, 0.5], [1, 0, 0]), ([1.0, 3.0, 0.0], [1, 1, 0])):
        found.update(torch.tensor([logits]), torch.tensor([target]))
    for _ in range(2):
        assert float(found.compute()["mean_average_precision"]) == 1.0
    assert caplog.messages == [
        "mean_average_precision is the mean over 2 of 3 classes: no image has the other classes"
    ]


def test_the_mean_iou_says_over_how_many_classes_it_is(caplog):
    found = PixelMetrics(4)
    # Rows of pixels: class 0 predicted as 0, class 0 as 1, class 2 as 2; class 3 is absent.
    logits = torch.eye(4)[torch.tensor([[0, 1, 2]])].movedim(-1, 1).unsqueeze(2) * 9
    found.update(logits, [torch.tensor([[0, 0, 2]])])
    assert float(found.compute()["mean_iou"]) == pytest.approx((0.5 + 0 + 1) / 3)
    assert caplog.messages == [
        "mean_iou is the mean over 3 of 4 classes: the other classes are neither in the masks nor "
        "predicted"
    ]
