"""Which frames are seen, from where, and that all frames of a clip are varied alike."""

import numpy as np
import pytest
import torch
from clips import encode, numbered, numbers, panned

from tokendial.data import Augment, Clip, VideoFile, train_transform
from tokendial.data.transforms.clip import ClipTestTransform, ClipTrainTransform
from tokendial.runs.loaders import TransformedDataset, temporary_seed

PLAIN = ((0.0,) * 3, (1.0,) * 3)
SIZE = (32, 32)


def drawn(clip, count, length, times=200):
    with temporary_seed(0):
        return [clip.train_indices(count, length) for _ in range(times)]


@pytest.mark.parametrize(
    ("clip", "count", "length", "indices"),
    [
        (Clip(), 40, 4, [[5, 15, 25, 35]]),
        (Clip(), 10, 4, [[1, 3, 6, 8]]),
        (Clip(), 3, 6, [[0, 0, 1, 1, 2, 2]]),
        (Clip(), 1, 3, [[0, 0, 0]]),
        (Clip(test_clips=2), 40, 4, [[0, 10, 20, 30], [5, 15, 25, 35]]),
        (Clip(sampling="dense", sampling_rate=4), 40, 4, [[13, 17, 21, 25]]),
        (
            Clip(sampling="dense", sampling_rate=4, test_clips=3),
            40,
            4,
            [[0, 4, 8, 12], [13, 17, 21, 25], [27, 31, 35, 39]],
        ),
        (Clip(sampling="dense", sampling_rate=4, test_clips=2), 6, 4, [[0, 4, 5, 5]] * 2),
    ],
)
def test_the_frames_of_tests_as_worked_out_by_hand(clip, count, length, indices):
    assert clip.test_indices(count, length) == indices


def test_uniform_training_draws_one_frame_of_each_part():
    found = np.array(drawn(Clip(), 10, 4))
    # Parts of two frames and a half: the frame on a border belongs to both.
    for part, frames in zip(found.T, ({0, 1, 2}, {2, 3, 4}, {5, 6, 7}, {7, 8, 9}), strict=True):
        assert set(part.tolist()) == frames
    assert {tuple(indices) for indices in drawn(Clip(), 3, 6, 20)} == {(0, 0, 1, 1, 2, 2)}


def test_dense_training_keeps_the_distance_from_a_random_start():
    clip = Clip(sampling="dense", sampling_rate=3)
    found = np.array(drawn(clip, 15, 4))
    assert (np.diff(found) == 3).all()
    assert set(found[:, 0].tolist()) == {0, 1, 2, 3, 4, 5}
    assert drawn(clip, 5, 4, 1) == [[0, 3, 4, 4]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "sparse"}, "sampling must be one of uniform, dense, got 'sparse'"),
        ({"sampling_rate": 0}, "sampling_rate must be at least 1, got 0"),
        ({"test_clips": 0}, "test_clips must be at least 1, got 0"),
        ({"test_crops": -1}, "test_crops must be at least 1, got -1"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Clip(**settings)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return VideoFile(encode(tmp_path_factory.mktemp("grey") / "a.mp4", numbered(24), bf="2"))


class Still:
    """A video of one picture, 64 x 48, in which everything differs from side to side."""

    def __init__(self):
        self.pixels = torch.from_numpy(panned("coffee", 1, step=0)[0].copy()).permute(2, 0, 1)

    def __len__(self):
        return 20

    def frames(self, indices):
        return self.pixels.expand(len(indices), -1, -1, -1)


def test_the_views_are_those_clips_and_those_crops(grey):
    clip = Clip(sampling="dense", sampling_rate=2, test_clips=2, test_crops=3)
    views = ClipTestTransform(clip, 4, SIZE, *PLAIN)(grey)
    assert (views.shape, views.dtype) == ((6, 4, 3, *SIZE), torch.float32)
    shown = [numbers(view * 255) for view in views]
    assert shown == [[0, 2, 4, 6]] * 3 + [[17, 19, 21, 23]] * 3


@pytest.mark.parametrize("upright", [False, True])
def test_crops_are_spread_along_the_longer_side(upright):
    video = Still()
    if upright:
        video.pixels = video.pixels.transpose(1, 2)
    left, middle, right = ClipTestTransform(Clip(test_crops=3), 1, SIZE, *PLAIN)(video)[:, 0]
    # 64 x 48 becomes 43 x 32, of which the crops begin at 0, 5 and 11.
    along = 1 if upright else 2
    torch.testing.assert_close(left.narrow(along, 5, 27), middle.narrow(along, 0, 27))
    torch.testing.assert_close(left.narrow(along, 11, 21), right.narrow(along, 0, 21))
    (alone,) = ClipTestTransform(Clip(), 1, SIZE, *PLAIN)(video)[:, 0]
    torch.testing.assert_close(alone, middle)
    assert not torch.allclose(left, right, atol=0.05)


def test_views_are_normalised(grey):
    plain = ClipTestTransform(Clip(), 2, SIZE, *PLAIN)(grey)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    views = ClipTestTransform(Clip(), 2, SIZE, mean, std)(grey)
    for channel in range(3):
        expected = (plain[:, :, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(views[:, :, channel], expected)


STRONG = Augment(randaugment="rand-m7-n4-mstd0.5-inc1", color_jitter=0.4)


def test_all_frames_are_varied_alike_and_clips_differently():
    transform = ClipTrainTransform(Clip(), 4, train_transform(STRONG, SIZE, *PLAIN, clips=True))
    found = []
    for draw in range(6):
        with temporary_seed(draw):
            clip = transform(Still())
        assert (clip.shape, clip.dtype) == ((4, 3, *SIZE), torch.float32)
        assert all(torch.equal(clip[0], frame) for frame in clip)
        found.append(clip[0])
    assert all(not torch.allclose(found[0], other, atol=0.02) for other in found[1:])


def test_the_same_part_of_all_frames_is_erased():
    augment = Augment(crop=False, flip=0.0, erasing=1.0)
    plain = train_transform(Augment(crop=False, flip=0.0), SIZE, *PLAIN, clips=True)
    erased = train_transform(augment, SIZE, *PLAIN, clips=True)
    frames = Still().frames(range(3))
    with temporary_seed(3):
        changed = (erased(frames) != plain(frames)).all(dim=1)
    assert 0 < changed[0].sum() < changed[0].numel()
    assert all(torch.equal(changed[0], part) for part in changed)
    rows, columns = (changed[0].any(dim=side).sum() for side in (1, 0))
    assert rows * columns == changed[0].sum()


def test_chance_depends_on_seed_epoch_and_number_alone(grey):
    vary = train_transform(STRONG, SIZE, *PLAIN, clips=True)
    source = [(grey, 0), (grey, 0)]
    made = ClipTrainTransform(Clip(sampling="dense", sampling_rate=2), 4, vary)

    def clip(seed, epoch, index):
        return TransformedDataset(source, lambda video, target: (made(video), target), seed)[
            epoch, index
        ][0]

    assert torch.equal(clip(1, 2, 0), clip(1, 2, 0))
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not torch.equal(clip(1, 2, 0), clip(*other))
