"""Read videos: count the frames, and decode only the requested ones."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tokendial.data.readers.files import find_files, list_files
from tokendial.data.readers.images import ImageError, read_image

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
)
# The allowed FFmpeg demuxers. Others read pictures and text files as videos, or follow playlists to
# other files and to the network.
_FORMATS = "mov,matroska,avi,flv,asf,mpeg,mpegts"
_MIN_LENGTH = 0.9
"""Fraction of the stated duration that must be present in files that state no number of frames."""


class VideoError(ValueError):
    """A video cannot be used; the message is one line that names the file."""


class Video(Protocol):
    """A video whose frames are read on demand."""

    def __len__(self) -> int:
        """Return the number of frames."""

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Return frames [T, 3, H, W] uint8 in the order of `indices`, which may repeat.

        Raises:
            VideoError: If a frame cannot be read.
        """


class _Packet(NamedTuple):
    """One encoded frame of a video stream."""

    time: int | None
    """Presentation time of the frame, in the time base of the stream."""
    is_key: bool
    """Whether decoding can start at this packet."""
    is_hidden: bool
    """Whether the frame is a reference for other frames and is never shown."""


class VideoFile:
    """A video file. Frame i is the i-th frame shown, also where the frame rate varies.

    Opening the file lists its packets and decodes nothing. A frame is decoded from the key frame
    before it. The rotation that a camera stored is applied.
    """

    def __init__(self, path: str | Path) -> None:
        """List the packets of the first video stream.

        Args:
            path: The video file.

        Raises:
            VideoError: If the file is missing, empty, cut short, not a video, or has no video
                stream or no frames.
            ValueError: If PyAV is not installed.
        """
        self.path = Path(path)
        check_video_file(self.path)
        packets = self._list_packets()
        times = [packet.time for packet in packets]
        self._has_times = None not in times and len(set(times)) == len(times)
        if self._has_times:
            # Packets lie in decoding order. Sorted by time they are in the order of the frames.
            self._decode_from = _decoding_starts(packets)
            shown = [n for n in self._decode_from if not packets[n].is_hidden]
            self._packet_at = {int(times[n] or 0): n for n in shown}
            self._times: Sequence[int] = sorted(self._packet_at)
        else:
            # Without times, only decoding all frames tells their number; a time is a frame index.
            self._times = range(sum(1 for _ in self._decode(())))
        if not self._times:
            raise VideoError(f"{self.path} has no frames.")

    def __len__(self) -> int:
        return len(self._times)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Return frames [T, 3, H, W] uint8, in the size of the earliest requested frame.

        Args:
            indices: Frame indices in [0, len(self)), in any order; they may repeat.

        Raises:
            VideoError: If one of the frames cannot be decoded.
        """
        wanted = {self._times[index] for index in indices}
        found: dict[int, np.ndarray] = {}
        height = width = 0
        for time, frame in self._decode(wanted):
            if time in wanted:
                # The frame size may change within a stream.
                height, width = height or frame.height, width or frame.width
                pixels = frame.to_ndarray(format="rgb24", height=height, width=width)
                found[time] = np.rot90(pixels, round(frame.rotation / 90))
        if missing := wanted - found.keys():
            index = self._times.index(min(missing))
            raise VideoError(f"{self.path}: frame {index} of {len(self)} cannot be decoded.")
        chosen = np.stack([found[self._times[index]] for index in indices])
        return torch.from_numpy(chosen).permute(0, 3, 1, 2)

    def _list_packets(self) -> list[_Packet]:
        """Return the packets of the video stream in decoding order."""
        with _open_video(self.path) as (container, stream):
            packets, is_whole, end_s = [], True, 0.0
            # AVI stores no presentation times; FFmpeg guesses them.
            has_times = container.format.name != "avi"
            for packet in filter(_holds_data, container.demux()):
                if packet.pts is not None and packet.time_base:
                    packet_end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    end_s = max(end_s, float(packet_end))
                if packet.stream is stream:
                    time = packet.pts if has_times else None
                    packets.append(_Packet(time, packet.is_keyframe, packet.is_discard))
                    is_whole = not packet.is_corrupt
            # Matroska states its duration but no number of frames.
            is_matroska = "matroska" in container.format.name
            stated_s = (container.duration or 0) / 1e6 if is_matroska else 0
            if not is_whole or len(packets) < stream.frames or end_s < _MIN_LENGTH * stated_s:
                raise VideoError(f"{self.path} is cut short.")
        return packets

    def _decode(self, times: Iterable[int]) -> "Iterator[tuple[int, VideoFrame]]":
        """Yield (time, frame) for the frames at `times` and those decoded on the way to them.

        If the stream has no times, yield (index, frame) for every frame.
        """
        with _open_video(self.path) as (container, stream):
            if not self._has_times:
                yield from enumerate(container.decode(stream))
                return
            # Packets between two spans are skipped. A span starts at a key frame, with an empty
            # decoder, and ends with a flush, which gives the frames that the decoder still holds.
            context, span_ends = stream.codec_context, self._decoding_spans(times)
            requested, last, end = set(times), max(span_ends.values()), -1
            for position, packet in enumerate(filter(_holds_data, container.demux(stream))):
                if position in span_ends:
                    end = span_ends[position]
                    context.flush_buffers()
                if position > end:
                    continue
                # Frames that are neither requested nor a reference for others are not decoded. In
                # H.264 the stream says which these are. In HEVC it does not: frames of a higher
                # layer may refer to them.
                if context.name == "h264":
                    context.skip_frame = "DEFAULT" if packet.pts in requested else "NONREF"
                frames = context.decode(packet)
                if position == end:
                    frames += context.decode(None)
                yield from ((frame.pts, frame) for frame in frames if frame.pts is not None)
                if position == last:
                    return

    def _decoding_spans(self, times: Iterable[int]) -> dict[int, int]:
        """Return {first packet: last packet} of the spans that must be decoded; none overlap."""
        spans: list[tuple[int, int]] = []
        positions = [self._packet_at[time] for time in times]
        for start, end in sorted((self._decode_from[n], n) for n in positions):
            if spans and start <= spans[-1][1]:
                spans[-1] = spans[-1][0], max(spans[-1][1], end)
            else:
                spans.append((start, end))
        return dict(spans)


class FrameFolder:
    """A video stored as a folder of numbered images."""

    def __init__(self, folder: str | Path, template: str, count: int) -> None:
        """Check that the last frame exists; nothing is decoded.

        Args:
            folder: Folder of the images.
            template: File name of a frame, formatted with its number from 1, such as
                "img_{:05}.jpg".
            count: Number of frames.

        Raises:
            VideoError: If the image of the last frame is missing.
        """
        self.folder, self.template, self.count = Path(folder), template, count
        if not self._path(count - 1).is_file():
            raise VideoError(
                f"{folder} must hold {count} frames, but {self._path(count - 1)} is missing."
            )

    def __len__(self) -> int:
        return self.count

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Return frames [T, 3, H, W] uint8 in the order of `indices`, which may repeat.

        Raises:
            VideoError: If a frame cannot be read, or frames differ in size.
        """
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
    """Raise a ValueError if PyAV, which decodes video files, is not installed."""
    if find_spec("av") is None:
        raise ValueError("reading videos needs PyAV: pip install 'tokendial[video]'.")


def check_video_file(path: Path) -> None:
    """Raise a VideoError if the file is missing or empty."""
    if not path.is_file():
        raise VideoError(f"no such video: {path}.")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty.")


def find_videos(paths: Iterable[str | Path]) -> list[Path]:
    """Return the video files in `paths` and, sorted by path, those in the folders in `paths`.

    Raises:
        VideoError: If a path does not exist or no video is found.
    """
    return find_files(paths, VIDEO_SUFFIXES, "video", VideoError)


def list_videos(folder: Path, other_suffixes: Counter[str] | None = None) -> list[Path]:
    """Return the video files below `folder`, sorted by path.

    Args:
        folder: Folder to search recursively.
        other_suffixes: Counter to which the endings of all other files are added.
    """
    return list_files(folder, VIDEO_SUFFIXES, other_suffixes)


@contextmanager
def _open_video(path: Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """Open a file and its first video stream; errors of FFmpeg become a VideoError of one line."""
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
        # One thread: several loading processes decode in parallel already.
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise VideoError(f"{path} cannot be decoded ({error.strerror}).") from None


def _holds_data(packet: "Packet[Any]") -> bool:
    """Return whether a packet has data; FFmpeg ends a stream with an empty packet."""
    return packet.size > 0


def _decoding_starts(packets: Sequence[_Packet]) -> dict[int, int]:
    """Return, by packet, the key packet at which decoding must start to get its frame.

    That is the last key frame before the packet that is not shown after it. In an "open GOP" a
    frame follows a key frame in the stream but is shown before it; such a frame needs the key frame
    before that one. Packets before the first key frame cannot be decoded and are left out.
    """
    keys: list[int] = []
    starts = {}
    for position, packet in enumerate(packets):
        if packet.is_key:
            keys.append(position)
        earlier = (k for k in reversed(keys) if (packets[k].time or 0) <= (packet.time or 0))
        if (start := next(earlier, None)) is not None:
            starts[position] = start
    return starts
