"""Clips: which frames of a video a model sees, and which crops of them.

Sources: Wang et al., "Temporal Segment Networks", https://arxiv.org/abs/1608.00859 (uniform
sampling), and VideoMAE's code, https://github.com/MCG-NJU/VideoMAE (dense sampling, and the views
of a test). Departures from that code: the parts of uniform sampling cover the whole video, without
a remainder at its end; frames of dense sampling are exactly `sampling_rate` apart, not up to 1/15
more; RandAugment acts after the crop.
"""

# Shape legend: V views, T frames, H and W pixels.

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from tokendial.checks import check_choice
from tokendial.data.readers.video import Video
from tokendial.data.transforms.image import Transform, to_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Which frames of a video form a clip, and how many views of a video a test averages."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    sampling: Literal["uniform", "dense"] = "uniform"
    """How the T frames of a clip are chosen. uniform: one frame from each of T equal parts of the
    video, a random one in training and the middle one in tests, as for Something-Something; dense:
    T frames at a fixed distance, from a random start in training, as for Kinetics."""
    sampling_rate: int = 4
    """Distance between two frames of a clip with `sampling: dense`, in frames of the video."""
    test_clips: int = 1
    """Number of clips of each video whose probabilities a test averages, spread over its length."""
    test_crops: int = 1
    """Number of crops of each clip whose probabilities a test averages, spread along the longer
    side; 1 is the centre crop."""

    def __post_init__(self) -> None:
        check_choice("sampling", self.sampling, ("uniform", "dense"))
        for name in ("sampling_rate", "test_clips", "test_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def views(self) -> int:
        """Number of views (clips times crops) of each video in a test."""
        return self.test_clips * self.test_crops

    def train_indices(self, count: int, length: int) -> list[int]:
        """Draw the frame indices of a training clip; short videos repeat frames.

        Args:
            count: Number of frames of the video.
            length: Number of frames of the clip.
        """
        if self.sampling == "dense":
            start = int(torch.randint(self._last_start(count, length) + 1, ()))
            return self._frames_from(start, count, length)
        shares = torch.rand(length).tolist()
        # (k + s) * count / length may be rounded up to `count` for a fraction s just below 1.
        return [min(count - 1, int((k + s) * count / length)) for k, s in enumerate(shares)]

    def test_indices(self, count: int, length: int) -> list[list[int]]:
        """Return the frame indices of each clip of a test; they are not random.

        With uniform sampling, several clips take frames at even distances within each part, as in
        VideoMAE's code. With dense sampling, several clips start at even distances between the
        start of the video and the last possible start.

        Args:
            count: Number of frames of the video.
            length: Number of frames of a clip.
        """
        clips = range(self.test_clips)
        if self.sampling == "dense":
            starts = _spread(self._last_start(count, length), self.test_clips)
            return [self._frames_from(start, count, length) for start in starts]
        shares = [0.5] if self.test_clips == 1 else [clip / self.test_clips for clip in clips]
        return [[int((k + share) * count / length) for k in range(length)] for share in shares]

    def _last_start(self, count: int, length: int) -> int:
        """Return the last frame at which a clip with dense sampling can start."""
        return max(0, count - 1 - (length - 1) * self.sampling_rate)

    def _frames_from(self, start: int, count: int, length: int) -> list[int]:
        return [min(count - 1, start + k * self.sampling_rate) for k in range(length)]


def _spread(last: int, count: int) -> list[int]:
    """Return `count` integers evenly spaced from 0 to `last`; the middle one if `count` is 1."""
    return [last // 2] if count == 1 else [n * last // (count - 1) for n in range(count)]


@dataclass(frozen=True, slots=True)
class ClipTrainTransform:
    """Turns a video into one augmented, normalised clip [T, 3, H, W] float32."""

    clip: Clip
    """Which frames form the clip."""
    num_frames: int
    """Number of frames of the clip (T)."""
    augment: Transform
    """Augments frames [T, 3, H, W] uint8, all frames in the same way, and normalises them."""

    def __call__(self, video: Video) -> Tensor:
        """Draw a clip of `video` and augment it."""
        return self.augment(video.frames(self.clip.train_indices(len(video), self.num_frames)))


@dataclass(frozen=True, slots=True)
class ClipTestTransform:
    """Turns a video into its normalised views [V, T, 3, H, W] float32: the crops of each clip."""

    clip: Clip
    """Which frames form the clips, and how many crops are taken."""
    num_frames: int
    """Number of frames of a clip (T)."""
    size: tuple[int, int]
    """Height and width of the model's input in pixels."""
    mean: tuple[float, ...]
    """Mean of each channel that normalisation subtracts."""
    std: tuple[float, ...]
    """Standard deviation of each channel by which normalisation divides."""

    def __call__(self, video: Video) -> Tensor:
        """Resize the frames, keeping their proportions, so that they cover `size`; then crop."""
        indices = self.clip.test_indices(len(video), self.num_frames)
        frames = video.frames([index for clip in indices for index in clip])
        (height, width), (old_height, old_width) = self.size, frames.shape[-2:]
        factor = max(height / old_height, width / old_width)
        size = [max(height, round(factor * old_height)), max(width, round(factor * old_width))]
        frames = tvf.resize(frames, size, v2.InterpolationMode.BICUBIC)
        crops = self.clip.test_crops
        tops, lefts = _spread(size[0] - height, crops), _spread(size[1] - width, crops)
        corners = zip(tops, lefts, strict=True)
        views = [frames[..., y : y + height, x : x + width] for y, x in corners]
        crops_by_clip = [torch.unflatten(view, 0, (len(indices), -1)) for view in views]
        stacked = torch.stack(crops_by_clip, dim=1).flatten(0, 1)
        normalised: Any = v2.Compose(to_tensor(self.mean, self.std))(stacked)
        return normalised.as_subclass(Tensor)  # type: ignore[no-any-return]
