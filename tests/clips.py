"""Encode real videos with PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BACKGROUNDS = Path(__file__).parent.parent / "src" / "tokendial" / "assets" / "backgrounds"
HEIGHT, WIDTH = 48, 64


def encode(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    rotation: int = 0,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write frames [H, W, 3] uint8; `times` in units of 1/600 s set an uneven frame rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(count: int) -> list[np.ndarray]:
    """Return frames whose grey level encodes their index; `numbers` decodes it."""
    return [np.full((HEIGHT, WIDTH, 3), 10 + 5 * number, np.uint8) for number in range(count)]


def numbers(frames: Sequence[np.ndarray]) -> list[int]:
    """Return the indices of frames [3, H, W] made by `numbered`."""
    return [round((float(np.asarray(frame).mean()) - 10) / 5) for frame in frames]


def panned(name: str, count: int, *, step: int, zoom: float = 0.0) -> list[np.ndarray]:
    """Return frames of a camera that moves over one of the shipped photographs."""
    photo = Image.open(BACKGROUNDS / f"{name}.jpg").convert("RGB")
    found = []
    for number in range(count):
        scale = 1 + zoom * number
        left, size = step * number, (round(WIDTH * scale), round(HEIGHT * scale))
        box = (left, 20, left + size[0], 20 + size[1])
        found.append(np.asarray(photo.crop(box).resize((WIDTH, HEIGHT))))
    return found
