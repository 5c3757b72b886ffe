"""The task of videos: mixing, and the mean over views."""

import pytest
import torch
from torch import nn

from tokendial.data import Augment, Clip
from tokendial.runs.loaders import temporary_seed
from tokendial.tasks import VideoClassification


class Means(nn.Module):
    """Logits of three classes: the mean of each colour of a clip [B, T, 3, H, W]."""

    def forward(self, clips):
        return clips.mean(dim=(1, 3, 4))


def test_the_views_of_a_video_are_averaged_as_probabilities():
    task = VideoClassification(3, augment=Augment(), clip=Clip(test_clips=2, test_crops=2))
    views = torch.randn(5, 4, 2, 3, 6, 6) * 8
    logits = task.predict(Means(), views)
    each = views.mean(dim=(2, 4, 5)).softmax(-1)
    torch.testing.assert_close(logits.softmax(-1), each.mean(dim=1))
    torch.testing.assert_close(logits.exp(), each.mean(dim=1))
    assert [task.eval_batch_size(size) for size in (64, 9, 1)] == [16, 2, 1]


def test_mixed_clips_are_mixed_frame_by_frame_alike():
    first, second = torch.zeros(1, 4, 3, 16, 16), torch.ones(1, 4, 3, 16, 16)
    for augment in (Augment(cutmix=1.0), Augment(mixup=1.0)):
        task = VideoClassification(2, augment=augment, clip=Clip())
        with temporary_seed(1):
            mixed, targets = task.mix_batch(torch.cat([first, second]), torch.tensor([0, 1]))
        assert (mixed.shape, targets.shape) == ((2, 4, 3, 16, 16), (2, 2))
        assert all(torch.equal(mixed[:, 0], mixed[:, frame]) for frame in range(4))
        # So much of each as the targets say.
        assert float(mixed[0].mean()) == pytest.approx(float(targets[0, 1]), abs=1e-3)
        assert 0 < float(mixed[0].mean()) < 1


def test_without_mixing_targets_stay_indices():
    task = VideoClassification(2, augment=Augment(smoothing=0.1), clip=Clip())
    clips, targets = torch.rand(3, 2, 3, 8, 8), torch.tensor([0, 1, 1])
    mixed, same = task.mix_batch(clips, targets)
    assert torch.equal(mixed, clips)
    assert torch.equal(same, targets)


def test_crops_of_test_images_are_refused():
    with pytest.raises(ValueError, match=r"augment.test_crop_ratio is for images: .* got 0.9"):
        VideoClassification(2, augment=Augment(test_crop_ratio=0.9), clip=Clip())
