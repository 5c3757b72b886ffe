"""Frames of real videos, one by one, and everything that can be wrong with a file."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from clips import HEIGHT, WIDTH, encode, numbered, numbers, panned
from PIL import Image

from tokendial.data import FrameFolder, VideoError, VideoFile, find_videos

COUNT = 40
RNG = np.random.default_rng(0)
UNEVEN = np.cumsum(RNG.integers(5, 60, COUNT)).tolist()
# Short groups of pictures, with frames before a key frame that need the group before.
OPEN_GOP = {"x264-params": "open-gop=1:keyint=8:bframes=3:b-pyramid=normal"}
FILES = {
    "b-frames.mp4": {"bf": "3"},
    "short-groups.mp4": {"bf": "2", "g": "7"},
    "open-groups.mp4": OPEN_GOP,
    "uneven.mp4": {"bf": "3", "times": UNEVEN},
    "a.mkv": {"bf": "2", "g": "12"},
    "a.mov": {"bf": "3"},
    "a.ts": {"bf": "2", "g": "12"},
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2", "qmax": "2"},
    "h264.avi": {"bf": "3"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def whole(folder):
    return encode(folder / "whole.mp4", numbered(COUNT), bf="3", muxer={"movflags": "faststart"})


@pytest.mark.parametrize("name", FILES)
def test_frame_i_is_the_one_that_is_shown_as_the_i_th(folder, name):
    video = VideoFile(encode(folder / name, numbered(COUNT), **FILES[name]))
    assert len(video) == COUNT
    assert numbers(video.frames(range(COUNT))) == list(range(COUNT))
    for _ in range(8):
        indices = RNG.integers(0, COUNT, 5).tolist()
        frames = video.frames(indices)
        assert (frames.shape, str(frames.dtype)) == ((5, 3, HEIGHT, WIDTH), "torch.uint8")
        assert numbers(frames) == indices


def test_the_videos_of_these_tests_are_hard_enough(folder):
    def frames_of(name):
        with av.open(encode(folder / name, numbered(COUNT), **FILES[name])) as container:
            return [(p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size]

    times = [time for time, _ in frames_of("b-frames.mp4")]
    assert times != sorted(times)
    leading = frames_of("open-groups.mp4")
    keys = [number for number, (_, key) in enumerate(leading) if key]
    assert any(leading[key + 1][0] < leading[key][0] for key in keys)
    assert len(set(np.diff(UNEVEN))) > 10


def test_pixels_are_those_of_the_picture(tmp_path):
    pictures = panned("coffee", 20, step=5)
    frames = VideoFile(encode(tmp_path / "a.mp4", pictures, crf="12")).frames([3, 17])
    for frame, picture in zip(frames, (pictures[3], pictures[17]), strict=True):
        assert np.abs(frame.permute(1, 2, 0).numpy().astype(int) - picture).mean() < 6


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_a_camera_that_was_turned_gives_upright_frames(tmp_path, rotation, turns):
    pictures = panned("coffee", 16, step=5)
    video = VideoFile(encode(tmp_path / "a.mp4", pictures, crf="12", rotation=rotation))
    found = video.frames([5])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - np.rot90(pictures[5], turns)).mean() < 6


def test_frames_cut_by_an_edit_list_are_not_counted(tmp_path, whole):
    """A file cut within a group of pictures holds the frames before the cut as hidden ones."""
    path = tmp_path / "edited.mp4"
    with av.open(whole) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= 5 * 512  # of 15,360 in a second: five frames
                packet.dts -= 5 * 512
                packet.stream = stream
                target.mux(packet)
    with av.open(path) as container:
        shown = numbers([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert numbers(VideoFile(path).frames(range(len(shown)))) == shown
    assert len(VideoFile(path)) == len(shown)


def cut(source: Path, target: Path, share: float) -> Path:
    content = source.read_bytes()
    target.write_bytes(content[: int(share * len(content))])
    return target


def without_pictures(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def damaged_inside(source: Path, target: Path) -> None:
    content = bytearray(source.read_bytes())
    content[len(content) // 2 :] = b"\xa5" * (len(content) - len(content) // 2)
    target.write_bytes(content)


NO_VIDEO = "is not a video, or its end is missing."
DAMAGES = {
    "missing": (lambda path, whole: None, r"no such video: .*missing.mp4\."),
    "empty": (lambda path, whole: path.write_bytes(b""), "is empty."),
    "text": (lambda path, whole: path.write_text("no video\n" * 99), NO_VIDEO),
    "bytes": (lambda path, whole: path.write_bytes(RNG.bytes(9999)), NO_VIDEO),
    "picture": (
        lambda path, whole: Image.fromarray(numbered(1)[0]).save(path, format="PNG"),
        NO_VIDEO,
    ),
    "playlist": (
        lambda path, whole: path.write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{whole}\n#EXT-X-ENDLIST\n"
        ),
        NO_VIDEO,
    ),
    "sound": (lambda path, whole: without_pictures(path), "has no video stream."),
    "cut": (lambda path, whole: cut(whole, path, 0.8), "is cut short."),
    "codec": (
        lambda path, whole: path.write_bytes(whole.read_bytes().replace(b"avc1", b"zzzz")),
        "is encoded in a way that cannot be decoded.",
    ),
    "index": (lambda path, whole: cut(encode(path, numbered(9)), path, 0.5), NO_VIDEO),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(tmp_path, whole, name):
    make, message = DAMAGES[name]
    path = tmp_path / f"{name}.mp4"
    make(path, whole)
    with pytest.raises(VideoError, match=f"{message}$") as caught:
        VideoFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vp9.webm", "a.mkv", "mpeg4.avi"])
def test_other_containers_are_cut_short_too(folder, tmp_path, name):
    path = encode(folder / name, panned("coffee", COUNT, step=3), **FILES[name])
    with pytest.raises(VideoError, match="is cut short"):
        VideoFile(cut(path, tmp_path / name, 0.7))


def test_a_frame_that_cannot_be_decoded_is_named(tmp_path):
    path = encode(tmp_path / "a.mp4", panned("coffee", COUNT, step=3), g="8", crf="10")
    content = bytearray(path.read_bytes())
    middle = content.index(b"mdat") + len(content) // 2
    content[middle : middle + 3000] = b"\xa5" * 3000
    path.write_bytes(content)
    video = VideoFile(path)
    assert len(video) == COUNT
    with pytest.raises(VideoError, match=r"a.mp4.* cannot be decoded"):
        video.frames(range(COUNT))
    assert video.frames([0]).shape == (1, 3, HEIGHT, WIDTH)


def test_a_missing_extra_is_named(monkeypatch, whole):
    monkeypatch.setattr("tokendial.data.readers.video.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'tokendial\[video\]'"):
        VideoFile(whole)


@pytest.fixture
def frames(tmp_path):
    for number, pixels in enumerate(numbered(12), start=1):
        Image.fromarray(pixels).save(tmp_path / f"img_{number:05}.png")
    return tmp_path


def test_a_folder_of_frames_is_a_video(frames):
    video = FrameFolder(frames, "img_{:05}.png", 12)
    assert len(video) == 12
    assert video.frames([11, 0, 5, 5]).shape == (4, 3, HEIGHT, WIDTH)
    assert numbers(video.frames([11, 0, 5, 5])) == [11, 0, 5, 5]


def test_damaged_frame_folders_are_errors(frames):
    with pytest.raises(VideoError, match=r"must hold 13 frames, but .*img_00013.png is missing"):
        FrameFolder(frames, "img_{:05}.png", 13)
    video = FrameFolder(frames, "img_{:05}.png", 12)
    Image.new("RGB", (9, 9)).save(frames / "img_00003.png")
    with pytest.raises(VideoError, match="holds frames of different sizes"):
        video.frames([1, 2])
    (frames / "img_00003.png").write_bytes(b"")
    with pytest.raises(VideoError, match="img_00003.png is empty"):
        video.frames([1, 2])


def test_videos_are_found_in_folders_and_by_name(tmp_path, whole):
    for name in ("b/two.MP4", "a/one.webm", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(whole, tmp_path / name)
    assert find_videos([tmp_path, whole]) == [
        tmp_path / "a/one.webm", tmp_path / "b/two.MP4", whole,
    ]  # fmt: skip
    with pytest.raises(VideoError, match="no such video or folder: .*/none"):
        find_videos([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="no videos found in .*/empty"):
        find_videos([tmp_path / "empty"])
