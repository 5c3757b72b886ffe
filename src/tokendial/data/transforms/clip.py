"""Clips: which frames of a video a model sees, and from which places of the picture.

Sources: Wang et al., "Temporal Segment Networks", https://arxiv.org/abs/1608.00859 (uniform), and
VideoMAE's code, https://github.com/MCG-NJU/VideoMAE (dense, and the views of the test). Departures
from that code: uniform parts cover all of the video, not all but a rest; dense frames are exactly
`sampling_rate` apart, not up to a fifteenth more; RandAugment acts after the crop.
"""

# Shape legend: V views, T frames, H and W pixels.

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from tokendial.data.readers.video import Video
from tokendial.data.transforms.image import Transform, to_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Which frames of a video are seen, and in how many views it is tested."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by pydantic, not a field

    sampling: Literal["uniform", "dense"] = "uniform"
    """uniform: one frame of each of T equal parts of the video, in training at random, in tests the
    middle one (Something-Something); dense: T frames at a fixed distance from a random start on
    (Kinetics)."""
    sampling_rate: int = 4
    """Distance of two frames, in frames; with `sampling` dense."""
    test_clips: int = 1
    """Clips of each video that a test averages over, spread over its time."""
    test_crops: int = 1
    """Crops of each clip that a test averages over, spread along the longer side; 1: the middle."""

    def __post_init__(self) -> None:
        if self.sampling not in ("uniform", "dense"):
            raise ValueError(f"sampling must be one of uniform, dense, got {self.sampling!r}.")
        for name in ("sampling_rate", "test_clips", "test_crops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def views(self) -> int:
        """Views of each video in a test."""
        return self.test_clips * self.test_crops

    def train_indices(self, count: int, length: int) -> list[int]:
        """Numbers of `length` frames of a video of `count`, drawn at random.

        Videos that are too short repeat frames.
        """
        if self.sampling == "dense":
            start = int(torch.randint(self._room(count, length) + 1, ()))
            return self._from(start, count, length)
        shares = torch.rand(length).tolist()
        # A share just below 1 may be rounded up to the next frame.
        return [min(count - 1, int((k + s) * count / length)) for k, s in enumerate(shares)]

    def test_indices(self, count: int, length: int) -> list[list[int]]:
        """The same for each clip of a test, without chance.

        Several uniform clips begin at even distances within each part, as in VideoMAE's code;
        several dense ones lie at even distances from the first frame to the last.
        """
        clips = range(self.test_clips)
        if self.sampling == "dense":
            room = self._room(count, length)
            return [self._from(start, count, length) for start in _spread(room, self.test_clips)]
        shares = [0.5] if self.test_clips == 1 else [clip / self.test_clips for clip in clips]
        return [[int((k + share) * count / length) for k in range(length)] for share in shares]

    def _room(self, count: int, length: int) -> int:
        """The last frame that a dense clip can start at."""
        return max(0, count - 1 - (length - 1) * self.sampling_rate)

    def _from(self, start: int, count: int, length: int) -> list[int]:
        return [min(count - 1, start + k * self.sampling_rate) for k in range(length)]


def _spread(room: int, count: int) -> list[int]:
    """`count` places in [0, room], evenly from end to end; one alone in the middle."""
    return [room // 2] if count == 1 else [n * room // (count - 1) for n in range(count)]


@dataclass(frozen=True, slots=True)
class ClipTrainTransform:
    """From a video to one varied, normalised clip [T, 3, H, W] float32."""

    clip: Clip
    length: int
    """Frames of a clip."""
    vary: Transform
    """Varies frames [T, 3, H, W] uint8, all of them alike."""

    def __call__(self, video: Video) -> Tensor:
        """Draw a clip."""
        return self.vary(video.frames(self.clip.train_indices(len(video), self.length)))


@dataclass(frozen=True, slots=True)
class ClipTestTransform:
    """From a video to its normalised views [V, T, 3, H, W] float32: the crops of each clip."""

    clip: Clip
    length: int
    """Frames of a clip."""
    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Of the normalisation."""
    std: tuple[float, ...]
    """Of the normalisation."""

    def __call__(self, video: Video) -> Tensor:
        """Cut the views, each frame in its proportions and just covering the size of the model."""
        indices = self.clip.test_indices(len(video), self.length)
        frames = video.frames([index for clip in indices for index in clip])
        (height, width), (old_height, old_width) = self.size, frames.shape[-2:]
        factor = max(height / old_height, width / old_width)
        size = [max(height, round(factor * old_height)), max(width, round(factor * old_width))]
        frames = tvf.resize(frames, size, v2.InterpolationMode.BICUBIC)
        crops = self.clip.test_crops
        tops, lefts = _spread(size[0] - height, crops), _spread(size[1] - width, crops)
        corners = zip(tops, lefts, strict=True)
        views = [frames[..., y : y + height, x : x + width] for y, x in corners]
        cut = torch.stack([torch.unflatten(view, 0, (len(indices), -1)) for view in views], dim=1)
        finished: Any = v2.Compose(to_tensor(self.mean, self.std))(cut.flatten(0, 1))
        return finished.as_subclass(Tensor)  # type: ignore[no-any-return]
