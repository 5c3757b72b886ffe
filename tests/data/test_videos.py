"""Lists and folders of videos, and everything that can be wrong with them."""

import pytest
from clips import encode, numbered, numbers
from PIL import Image

from tokendial.data import K400, FrameFolder, SSv2, VideoFolder, VideoLists


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(16), bf="2")


@pytest.fixture
def root(tmp_path, clip):
    """Lists of five and two videos; one is named by its absolute path."""
    (tmp_path / "videos").mkdir()
    lines = {"train": [], "val": [], "test": []}
    for number in range(9):
        split = "train" if number < 5 else "val" if number < 7 else "test"
        name = f"videos/number {number}.mp4"
        (tmp_path / name).symlink_to(clip)
        shown = tmp_path / name if number == 1 else name
        lines[split].append(f"{shown} {number % 3}")
    for split, some in lines.items():
        (tmp_path / f"{split}.csv").write_text("\n".join(some) + "\n")
    return tmp_path


@pytest.fixture
def framed(tmp_path):
    """Lists of folders of frames."""
    for number in range(3):
        folder = tmp_path / "frames" / str(number)
        folder.mkdir(parents=True)
        for index, pixels in enumerate(numbered(4 + number), start=1):
            Image.fromarray(pixels).save(folder / f"img_{index:05}.jpg")
    (tmp_path / "train.csv").write_text("frames/0 4 17\nframes/1 5 173\n")
    (tmp_path / "val.csv").write_text("frames/2 6 0\n")
    return tmp_path


def add(root, line, split="train"):
    with (root / f"{split}.csv").open("a") as file:
        file.write(line + "\n")


def test_lists_give_videos_and_labels(root):
    splits = VideoLists(root=str(root), classes=["a", "b", "c"]).build(0)
    assert (splits.video, splits.dense, splits.classes) == (True, False, ("a", "b", "c"))
    assert (splits.train.labels, splits.val.labels) == ([0, 1, 2, 0, 1], [2, 0])
    video, label = splits.train[1]
    assert (len(video), label) == (16, 1)
    assert numbers(video.frames([15, 3])) == [15, 3]


def test_published_sets_read_their_lists(root, tmp_path):
    for kind, classes in ((K400, 400), (SSv2, 174)):
        splits = kind(root=str(root), check=False).build(0)
        assert (len(splits.classes), splits.classes[2]) == (classes, "class 2")
        assert (len(splits.train), splits.val.labels) == (5, [2, 0])
        assert kind(root=str(root), check=False, val="test").build(0).val.labels == [1, 2]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"does {number}" for number in range(174)))
    splits = SSv2(root=str(root), check=False, classes=str(names)).build(0)
    assert splits.classes[173] == "does 173"
    with pytest.raises(ValueError, match=r"names.txt must name 400 classes, got 174\."):
        K400(root=str(root), check=False, classes=str(names)).build(0)


def test_folders_of_frames_with_their_number(framed):
    splits = SSv2(root=str(framed), frames="img_{:05}.jpg", check=False).build(0)
    assert splits.train.labels == [17, 173]
    video, _ = splits.val[0]
    assert isinstance(video, FrameFolder)
    assert numbers(video.frames([5, 0])) == [5, 0]


def test_a_folder_for_each_class(tmp_path, clip):
    for name in (
        "train/push/a.mp4",
        "train/pull/b.webm",
        "train/pull/more/c.mp4",
        "val/pull/d.mp4",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(clip)
    splits = VideoFolder(root=str(tmp_path)).build(0)
    assert (splits.classes, splits.video) == (("pull", "push"), True)
    assert (splits.train.labels, splits.val.labels) == ([0, 0, 1], [0])
    (tmp_path / "val" / "lift").mkdir()
    with pytest.raises(ValueError, match="class 'lift' of .*/val is not in .*/train"):
        VideoFolder(root=str(tmp_path)).build(0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (K400, r"number of classes in .*train.csv must be 400, got 3; data.check=false accepts"),
        (SSv2, r"number of classes in .*train.csv must be 174, got 3; data.check=false accepts"),
    ],
)
def test_whole_sets_have_all_their_classes(root, kind, message):
    with pytest.raises(ValueError, match=message):
        kind(root=str(root)).build(0)


def test_something_something_has_all_its_videos(root):
    lines = "\n".join(f"videos/number 0.mp4 {label}" for label in range(174))
    (root / "train.csv").write_text(lines)
    with pytest.raises(ValueError, match=r"number of videos in .*train.csv must be 168,913, got 1"):
        SSv2(root=str(root)).build(0)


LINES = {
    "videos/number 0.mp4 3": r"csv, line 6: label must be a whole number in \[0, 2\], got '3'",
    "videos/number 0.mp4 -1": r"line 6: label must be a whole number in \[0, 2\], got '-1'",
    "videos/number0.mp4": "line 6: must look like 'videos/1.mp4 0', got 'videos/number0.mp4'",
    "videos/number 0.mp4,2": r"line 6: label must be a whole number in \[0, 2\], got '0.mp4,2'",
    "videos/none.mp4 1": r"data: no such video: .*videos/none.mp4; data.broken=skip leaves",
}


@pytest.mark.parametrize("line", LINES)
def test_errors_in_lines_name_the_line(root, line):
    add(root, line)
    with pytest.raises(ValueError, match=LINES[line]):
        VideoLists(root=str(root), classes=3).build(0)


FRAME_LINES = {
    "frames/0 4": r"line 3: must look like 'frames/1 48 0', got 'frames/0 4'",
    "frames/0 x 4": "line 3: number of frames must be a whole number in .*, got 'x'",
    "frames/0 0 4": "line 3: number of frames must be a whole number in .*, got '0'",
    "frames/0 5 4": r"data: .*frames/0 must hold 5 frames, but .*img_00005.jpg is missing; data.br",
    "frames/9 5 4": r"data: .*frames/9 must hold 5 frames",
    "frames/0 4 174": r"line 3: label must be a whole number in \[0, 173\], got '174'",
}


@pytest.mark.parametrize("line", FRAME_LINES)
def test_errors_in_lines_of_frame_folders_name_the_line(framed, line):
    add(framed, line)
    with pytest.raises(ValueError, match=FRAME_LINES[line]):
        SSv2(root=str(framed), frames="img_{:05}.jpg", check=False).build(0)


def test_a_missing_or_empty_list_is_an_error(root):
    (root / "train.csv").write_text("\n")
    with pytest.raises(ValueError, match=r"data: .*train.csv names no videos"):
        VideoLists(root=str(root), classes=3).build(0)
    (root / "train.csv").unlink()
    with pytest.raises(ValueError, match=r"no such file: .*train.csv\. VideoMAE describes"):
        K400(root=str(root)).build(0)
    with pytest.raises(ValueError, match=r"data.root: no such folder: .*none\. VideoMAE describes"):
        K400(root=str(root / "none")).build(0)


def test_broken_videos_stop_the_run_or_are_skipped(root, clip, caplog):
    content = clip.read_bytes()
    for name, kept in (("empty", 0), ("cut", len(content) // 2)):
        (root / f"{name}.mp4").write_bytes(content[:kept])
        add(root, f"{name}.mp4 1")
    (root / "text.mp4").write_text("no video\n" * 99)
    for name in ("none.mp4", "text.mp4"):
        add(root, f"{name} 1")
    with pytest.raises(ValueError, match=r"empty.mp4 is empty \(and 1 more problem\); data.broken"):
        VideoLists(root=str(root), classes=3).build(0)
    splits = VideoLists(root=str(root), classes=3, broken="skip").build(0)
    assert splits.train.labels == [0, 1, 2, 0, 1]
    told = [message for message in caplog.messages if message.startswith("left out: ")]
    assert len(told) == 4
    for problem in ("empty.mp4 is empty", "cut.mp4 is", "no such video", "text.mp4 is not a video"):
        assert problem in "\n".join(told)


def test_a_set_of_broken_videos_only_is_an_error(root):
    (root / "val.csv").write_text("none.mp4 1\n")
    with pytest.raises(ValueError, match=r"no such video: .*none.mp4; no video is left"):
        VideoLists(root=str(root), classes=3, broken="skip").build(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: K400(root="x", broken="maybe"), "broken must be one of error, skip, got 'maybe'"),
        (lambda: K400(root="x", val="train"), "val must be one of val, test, got 'train'"),
        (lambda: SSv2(root="x", frames="img.jpg"), "frames must look like img_{:05}.jpg, got 'img"),
        (lambda: SSv2(root="x", frames="{name}.jpg"), "frames must look like img_{:05}.jpg, got"),
        (lambda: VideoLists(root="x", classes=1), "classes must be at least 2, got 1"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
