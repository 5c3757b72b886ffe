"""Data sets of videos: class folders, and lists in VideoMAE's format.

A line of a list in VideoMAE's format (https://github.com/MCG-NJU/VideoMAE) is a path and a label,
or a folder of frames, the number of frames and a label. Later work uses the same format.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from tokendial.data.readers.files import PATH, format_more
from tokendial.data.readers.lists import parse_number, read_lines, require_folder
from tokendial.data.readers.video import (
    FrameFolder,
    Video,
    VideoError,
    VideoFile,
    check_pyav,
    check_video_file,
    list_videos,
)
from tokendial.data.sets.folder import ClassFolders
from tokendial.data.sets.labelled_images import Broken, check_broken
from tokendial.data.splits import Splits
from tokendial.methods import register

LISTS_SOURCE = (
    "VideoMAE describes how to make {train,val,test}.csv: "
    "https://github.com/MCG-NJU/VideoMAE/blob/main/DATASET.md."
)
_MAX_FRAMES = 1_000_000
_LOG = logging.getLogger(__name__)


class VideoEntry(NamedTuple):
    """One labelled video of a data set."""

    path: Path
    """Video file, or folder of frames."""
    label: int
    """Index of the class."""
    num_frames: int | None = None
    """Number of frames in the folder; None for a video file."""


class Videos(Dataset[tuple[Video, int]]):
    """Labelled videos, each opened when it is requested."""

    def __init__(self, entries: Iterable[VideoEntry], template: str | None = None) -> None:
        """Hold the entries.

        Args:
            entries: The videos.
            template: File name of a frame in folders of frames, such as "img_{:05}.jpg".
        """
        self.entries, self.template = list(entries), template

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Video, int]:
        entry = self.entries[index]
        return self._open(entry), entry.label

    @property
    def labels(self) -> list[int]:
        """Class indices in the order of the videos."""
        return [entry.label for entry in self.entries]

    def without_broken(self, broken: Broken) -> "Videos":
        """Return the videos that are not broken.

        With "error" only missing and empty files are found; with "skip" every video is opened and
        its last frame decoded.

        Raises:
            ValueError: If a video is broken and `broken` is "error", all videos are broken, or PyAV
                is not installed.
        """
        if any(entry.num_frames is None for entry in self.entries):
            check_pyav()
        with ThreadPoolExecutor() as pool:
            check = self._missing_problem if broken == "error" else self._decoding_problem
            by_entry = list(pool.map(check, self.entries))
        problems = [problem for problem in by_entry if problem]
        if problems and (broken == "error" or len(problems) == len(self)):
            more = format_more(len(problems) - 1, "problem")
            skip = "data.broken=skip leaves such videos out"
            end = skip if broken == "error" else "no video is left"
            raise ValueError(f"data: {problems[0]}{more}; {end}.")
        for problem in problems:
            _LOG.warning("left out: %s", problem)
        pairs = zip(self.entries, by_entry, strict=True)
        return Videos([entry for entry, problem in pairs if not problem], self.template)

    def _open(self, entry: VideoEntry) -> Video:
        if entry.num_frames is None:
            return VideoFile(entry.path)
        return FrameFolder(entry.path, self.template or "", entry.num_frames)

    def _missing_problem(self, entry: VideoEntry) -> str | None:
        """Return one line if the file or the last frame is missing or empty; reads no content."""
        try:
            if entry.num_frames is None:
                check_video_file(entry.path)
            else:
                self._open(entry)
        except VideoError as error:
            return str(error).rstrip(".")
        return None

    def _decoding_problem(self, entry: VideoEntry) -> str | None:
        """Return one line if a video cannot be opened or its last frame cannot be decoded."""
        try:
            video = self._open(entry)
            video.frames([len(video) - 1])
        except VideoError as error:
            return str(error).rstrip(".")
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSet:
    """Fields of all data sets that are lists of videos."""

    root: str = field(metadata=PATH)
    """Folder of the lists; relative paths in them start from it."""
    broken: Broken = "error"
    """What to do with broken videos. error: stop before the run if a video is missing or empty, and
    during the run when a damaged one is read. skip: before the run, open every video and decode its
    last frame, log each broken video and leave it out."""

    def __post_init__(self) -> None:
        check_broken(self.broken)


@register("data", "video_folder")
@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFolder(ClassFolders):
    """Videos in `root/train/CLASS/` and `root/val/CLASS/`, or with `holdout` in `root/CLASS/`."""

    broken: Broken = "error"
    """What to do with broken videos. error: stop before the run if a video is missing or empty, and
    during the run when a damaged one is read. skip: before the run, open every video and decode its
    last frame, log each broken video and leave it out."""

    def __post_init__(self) -> None:
        ClassFolders.__post_init__(self)
        check_broken(self.broken)

    def build(self, seed: int) -> Splits:
        """List the files.

        Raises:
            ValueError: If a folder is missing or empty, the validation set has a class that the
                training set lacks, or a video is broken and `broken` is "error".
        """
        *parts, classes = self.list_splits(list_videos, "videos", seed)
        train, val = (
            Videos(VideoEntry(*file) for file in files).without_broken(self.broken)
            for files in parts
        )
        return Splits(train=train, val=val, classes=classes, video=True)


@register("data", "video_lists")
@dataclass(frozen=True, kw_only=True, slots=True)
class VideoLists(VideoSet):
    """Videos in lists: lines `path label`, or `folder num_frames label` for folders of frames."""

    classes: int | list[str]
    """Number of classes, or their names."""
    train: str = "train.csv"
    """File name of the list of training videos, below `root`."""
    val: str = "val.csv"
    """File name of the list of validation videos, below `root`."""
    frames: str | None = None
    """File name of a frame, formatted with its number from 1, such as "img_{:05}.jpg", if the lists
    name folders of frames. null: they name video files."""

    def __post_init__(self) -> None:
        VideoSet.__post_init__(self)
        if len(self.class_names()) < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes!r}.")
        check_template(self.frames)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes; without names they are "class 0", "class 1", ..."""
        if isinstance(self.classes, int):
            return tuple(f"class {number}" for number in range(self.classes))
        return tuple(self.classes)

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list is missing or empty, a line has the wrong form, a label is not a
                class, or a video is broken and `broken` is "error".
        """
        names = self.class_names()
        root = require_folder(Path(self.root), LISTS_SOURCE)
        train, val = (
            read_list(root / name, len(names), self.frames).without_broken(self.broken)
            for name in (self.train, self.val)
        )
        return Splits(train=train, val=val, classes=names, video=True)


def check_template(template: str | None) -> None:
    """Raise a ValueError unless `template` is None or gives each frame number its own file name."""
    if template is None:
        return
    try:
        names = {template.format(number) for number in (1, 2)}
    except (IndexError, KeyError, ValueError):
        names = set()
    if len(names) < 2:
        raise ValueError(f"frames must look like img_{{:05}}.jpg, got {template!r}.")


def read_list(path: Path, num_classes: int, template: str | None) -> Videos:
    """Read the videos of a list.

    Args:
        path: The list; relative paths in it start from its folder.
        num_classes: Number of classes.
        template: File name of a frame if the list names folders of frames; None for video files.

    Raises:
        ValueError: If the list is missing or empty, a line has the wrong form, or a label is not a
            class.
    """
    example = ("videos/1.mp4", "0") if template is None else ("frames/1", "48", "0")
    entries = []
    for place, line in read_lines(path, LISTS_SOURCE):
        # Split from the right, because a path may hold blanks.
        name, *numbers = line.rsplit(maxsplit=len(example) - 1)
        if len(numbers) != len(example) - 1:
            raise ValueError(f"data: {place}: must look like {' '.join(example)!r}, got {line!r}.")
        label = parse_number(numbers[-1], "label", 0, num_classes - 1, place)
        num_frames = None
        if template is not None:
            num_frames = parse_number(numbers[0], "number of frames", 1, _MAX_FRAMES, place)
        entries.append(VideoEntry(path.parent / name, label, num_frames))
    if not entries:
        raise ValueError(f"data: {path} names no videos.")
    return Videos(entries, template)
