"""Reading videos: how many frames there are, and of these just the ones that are asked for."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tokendial.data.readers.files import files_in, find_files
from tokendial.data.readers.images import ImageError, read_image

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
# Of FFmpeg's readers. Others take pictures and texts for videos, or follow playlists to other
# files and to the network.
_FORMATS = "mov,matroska,avi,flv,asf,mpeg,mpegts"
_WHOLE = 0.9
"""Share of the stated length that has to be there, where the number of frames is not stated."""


class VideoError(ValueError):
    """A video that cannot be used; the message is one line that names the file."""


class Video(Protocol):
    """A video whose frames are read when they are asked for."""

    def __len__(self) -> int:
        """Number of frames."""

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Frames [T, 3, H, W] uint8 in the order of `indices`, which may repeat; a VideoError."""


class _Packet(NamedTuple):
    time: int | None
    """When its frame is shown, in units of the stream."""
    key: bool
    """Whether decoding can start here."""
    hidden: bool
    """Whether its frame serves as a reference only."""


class VideoFile:
    """A video in a file. Frame i is the i-th that is shown, at any frame rate, also a varying one.

    Packets are listed when the file is opened, which decodes nothing. Frames are decoded from the
    key frame before each. Rotation that a camera noted is applied.
    """

    def __init__(self, path: str | Path) -> None:
        """List the packets of the first video stream.

        Raises:
            VideoError: If the file is missing, empty, cut short, no video, or has no such stream.
            ValueError: If PyAV is not installed.
        """
        self.path = Path(path)
        check_there(self.path)
        packets = self._packets()
        times = [packet.time for packet in packets]
        self._timed = None not in times and len(set(times)) == len(times)
        if self._timed:
            self._starts = _starts(packets)
            shown = [n for n, start in self._starts.items() if not packets[n].hidden]
            self._positions = {int(times[n] or 0): n for n in shown}
            self._times: Sequence[int] = sorted(self._positions)
        else:
            # Only decoding all of them tells which frame is the i-th.
            self._times = range(sum(1 for _ in self._decoded(())))
        if not self._times:
            raise VideoError(f"{self.path} has no frames.")

    def __len__(self) -> int:
        return len(self._times)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Frames [T, 3, H, W] uint8, as large as the first of them that is shown.

        Args:
            indices: Numbers of frames, in [0, len(self)), in any order; they may repeat.

        Raises:
            VideoError: If one of them cannot be decoded.
        """
        wanted = {self._times[index] for index in indices}
        found: dict[int, np.ndarray] = {}
        height = width = 0
        for time, frame in self._decoded(wanted):
            if time in wanted:
                # A stream may change its size on the way.
                height, width = height or frame.height, width or frame.width
                pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
                found[time] = np.rot90(pixels, round(frame.rotation / 90))
        if missing := wanted - found.keys():
            number = self._times.index(min(missing))
            raise VideoError(f"{self.path}: frame {number} of {len(self)} cannot be decoded.")
        chosen = np.stack([found[self._times[index]] for index in indices])
        return torch.from_numpy(chosen).permute(0, 3, 1, 2)

    def _packets(self) -> list[_Packet]:
        """Packets of the stream in the order of decoding."""
        with _opened(self.path) as (container, stream):
            packets, whole, end = [], True, 0.0
            # AVI does not say when frames are shown; FFmpeg guesses.
            timed = container.format.name != "avi"
            for packet in filter(_holds_data, container.demux()):
                if packet.pts is not None and packet.time_base:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is stream:
                    time = packet.pts if timed else None
                    packets.append(_Packet(time, packet.is_keyframe, packet.is_discard))
                    whole = not packet.is_corrupt
            # Matroska states the length in seconds alone.
            stated = (container.duration or 0) / 1e6 if "matroska" in container.format.name else 0
            if not whole or len(packets) < stream.frames or end < _WHOLE * stated:
                raise VideoError(f"{self.path} is cut short.")
        return packets

    def _decoded(self, times: Iterable[int]) -> "Iterator[tuple[int, VideoFrame]]":
        """Frames and when they are shown: those of `times` and what has to be decoded for them.

        Without times in the stream: every frame and its number.
        """
        with _opened(self.path) as (container, stream):
            if not self._timed:
                yield from enumerate(container.decode(stream))
                return
            context, ends = stream.codec_context, self._spans(times)
            asked, last, end = set(times), max(ends.values()), -1
            for position, packet in enumerate(filter(_holds_data, container.demux(stream))):
                if position in ends:
                    end = ends[position]
                    context.flush_buffers()
                if position > end:
                    continue
                # Frames that nothing refers to need no decoding, unless they are asked for. H.264
                # says which these are; in HEVC others of a higher layer may still refer to them.
                if context.name == "h264":
                    context.skip_frame = "DEFAULT" if packet.pts in asked else "NONREF"
                frames = context.decode(packet)
                if position == end:
                    frames += context.decode(None)
                yield from ((frame.pts, frame) for frame in frames if frame.pts is not None)
                if position == last:
                    return

    def _spans(self, times: Iterable[int]) -> dict[int, int]:
        """First and last packet of each stretch that has to be decoded."""
        spans: list[tuple[int, int]] = []
        positions = [self._positions[time] for time in times]
        for start, end in sorted((self._starts[position], position) for position in positions):
            if spans and start <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(spans[-1][1], end)
            else:
                spans.append((start, end))
        return dict(spans)


class FrameFolder:
    """A video whose frames lie in a folder as numbered images."""

    def __init__(self, folder: str | Path, template: str, count: int) -> None:
        """Take the first frames of a folder.

        Args:
            folder: It.
            template: Name of a frame by its number from 1, such as "img_{:05}.jpg".
            count: How many there are.

        Raises:
            VideoError: If the last of them is missing.
        """
        self.folder, self.template, self.count = Path(folder), template, count
        if not self._path(count - 1).is_file():
            raise VideoError(
                f"{folder} must hold {count} frames, but {self._path(count - 1)} is missing."
            )

    def __len__(self) -> int:
        return self.count

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Frames [T, 3, H, W] uint8; a VideoError if one cannot be read or differs in size."""
        found: dict[int, np.ndarray] = {}
        for index in sorted(set(indices)):
            try:
                found[index] = np.asarray(read_image(self._path(index)))
            except ImageError as error:
                raise VideoError(str(error)) from None
        if len({pixels.shape for pixels in found.values()}) > 1:
            raise VideoError(f"{self.folder} holds frames of different sizes.")
        chosen = np.stack([found[index] for index in indices])
        return torch.from_numpy(chosen).permute(0, 3, 1, 2)

    def _path(self, index: int) -> Path:
        return self.folder / self.template.format(index + 1)


def check_pyav() -> None:
    """Raise a ValueError if PyAV, which reads video files, is not installed."""
    if find_spec("av") is None:
        raise ValueError("videos are read by PyAV: pip install 'tokendial[video]'.")


def check_there(path: Path) -> None:
    """Raise a VideoError if a file is missing or empty."""
    if not path.is_file():
        raise VideoError(f"no such video: {path}.")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty.")


def find_videos(paths: Iterable[str | Path]) -> list[Path]:
    """Video files among `paths`; folders are searched through, sorted by name.

    Raises:
        VideoError: If a path does not exist, or nothing is found.
    """
    return find_files(paths, VIDEO_SUFFIXES, "video", VideoError)


def videos_in(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """Video files anywhere below `folder`, sorted; `others` counts the endings of other files."""
    return files_in(folder, VIDEO_SUFFIXES, others)


@contextmanager
def _opened(path: Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """A file and its first video stream; whatever FFmpeg says against it becomes one line."""
    check_pyav()
    import av

    try:
        container = av.open(str(path), options={"format_whitelist": _FORMATS})
    except av.FFmpegError:
        raise VideoError(f"{path} is not a video, or its end is missing.") from None
    with container:
        if not container.streams.video:
            raise VideoError(f"{path} has no video stream.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError(f"{path} is encoded in a way that cannot be decoded.")
        # Processes load side by side already.
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise VideoError(f"{path} cannot be decoded ({error.strerror}).") from None


def _holds_data(packet: "Packet[Any]") -> bool:
    """Whether a packet is more than FFmpeg's request to decoders to empty themselves."""
    return packet.size > 0


def _starts(packets: Sequence[_Packet]) -> dict[int, int]:
    """For each packet the one where decoding has to begin; those before any key frame are left out.

    Frames that are shown before the key frame which precedes them in the stream ("open GOP") need
    the key frame before that.
    """
    keys: list[int] = []
    starts = {}
    for position, packet in enumerate(packets):
        if packet.key:
            keys.append(position)
        fitting = (k for k in reversed(keys) if (packets[k].time or 0) <= (packet.time or 0))
        if (start := next(fitting, None)) is not None:
            starts[position] = start
    return starts
