"""Sets of videos: folders of one's own, and lists as VideoMAE writes them.

VideoMAE (https://github.com/MCG-NJU/VideoMAE) has lines of a path and a label, or of a folder of
frames, their number and a label; later work shares this form.
"""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from tokendial.data.readers.files import PATH
from tokendial.data.readers.video import (
    FrameFolder,
    Video,
    VideoError,
    VideoFile,
    check_pyav,
    check_there,
    videos_in,
)
from tokendial.data.sets.folder import ClassFolders
from tokendial.data.sets.labelled import (
    Broken,
    check_broken,
    read_lines,
    read_number,
    required_folder,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

LISTS_SOURCE = (
    "VideoMAE tells how {train,val,test}.csv are made: "
    "https://github.com/MCG-NJU/VideoMAE/blob/main/DATASET.md."
)
_MOST_FRAMES = 1_000_000
_LOG = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One video of a set."""

    path: Path
    """The file, or the folder of frames."""
    label: int
    """Index of its class."""
    frames: int | None = None
    """Number of frames of a folder; None: a file."""


class Videos(Dataset[tuple[Video, int]]):
    """Opens video `i` when it is asked for."""

    def __init__(self, entries: Iterable[Entry], template: str | None = None) -> None:
        """Hold `entries`; `template` names the images of those that are folders."""
        self.entries, self.template = list(entries), template

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Video, int]:
        entry = self.entries[index]
        return self._open(entry), entry.label

    @property
    def labels(self) -> list[int]:
        """Of all videos, in order."""
        return [entry.label for entry in self.entries]

    def kept(self, broken: Broken) -> "Videos":
        """Those that are not broken.

        Raises:
            ValueError: If a video is missing or empty and `broken` is "error", none is left, or
                PyAV is not installed.
        """
        if any(entry.frames is None for entry in self.entries):
            check_pyav()
        with ThreadPoolExecutor() as pool:
            find = self._absence if broken == "error" else self._damage
            problems = list(pool.map(find, self.entries))
        told = [problem for problem in problems if problem]
        if told and (broken == "error" or len(told) == len(self)):
            more = f" (and {len(told) - 1} more problems)" if len(told) > 1 else ""
            end = "data.broken=skip leaves such videos out" if broken == "error" else "none is left"
            raise ValueError(f"data: {told[0]}{more}; {end}.")
        for problem in told:
            _LOG.warning("left out: %s", problem)
        pairs = zip(self.entries, problems, strict=True)
        return Videos([entry for entry, problem in pairs if not problem], self.template)

    def _open(self, entry: Entry) -> Video:
        if entry.frames is None:
            return VideoFile(entry.path)
        return FrameFolder(entry.path, self.template or "", entry.frames)

    def _absence(self, entry: Entry) -> str | None:
        """One line if there is nothing to open; reads nothing."""
        try:
            if entry.frames is None:
                check_there(entry.path)
            else:
                self._open(entry)
        except VideoError as error:
            return str(error).rstrip(".")
        return None

    def _damage(self, entry: Entry) -> str | None:
        """One line if a video cannot be opened, or its last frame cannot be decoded."""
        try:
            video = self._open(entry)
            video.frames([len(video) - 1])
        except VideoError as error:
            return str(error).rstrip(".")
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSet:
    """Fields of all sets of videos."""

    root: str = field(metadata=PATH)
    """Folder of the set; relative paths in lists start from it."""
    broken: Broken = "error"
    """What to do about broken videos. error: stop, before the run if one is missing or empty, else
    when it is read; skip: open every one before the run and decode its last frame, report those
    that cannot be read and leave them out."""

    def __post_init__(self) -> None:
        check_broken(self.broken)


@register("data", "video_folder")
@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFolder(ClassFolders):
    """Videos in `root/train/CLASS/` and `root/val/CLASS/`, or with `holdout` in `root/CLASS/`."""

    broken: Broken = "error"
    """What to do about broken videos, as in `video_lists`."""

    def __post_init__(self) -> None:
        ClassFolders.__post_init__(self)
        check_broken(self.broken)

    def build(self, seed: int) -> Splits:
        """List the files.

        Raises:
            ValueError: If a folder is missing or empty, the validation set has a class that the
                training set has not, or a video is broken and `broken` does not say to skip it.
        """
        *files, classes = self.listed(videos_in, "videos", seed)
        train, val = (Videos(Entry(*pair) for pair in some).kept(self.broken) for some in files)
        return Splits(train=train, val=val, classes=classes, video=True)


@register("data", "video_lists")
@dataclass(frozen=True, kw_only=True, slots=True)
class VideoLists(VideoSet):
    """Lists in `root`: lines of a path and a label, or of a folder, its frames and a label."""

    classes: int | list[str]
    """Number or names of the classes."""
    train: str = "train.csv"
    """List of the training videos."""
    val: str = "val.csv"
    """List of the validation videos."""
    frames: str | None = None
    """Name of a frame by its number from 1, such as "img_{:05}.jpg", where the lists name folders
    of frames; null: they name video files."""

    def __post_init__(self) -> None:
        VideoSet.__post_init__(self)
        if len(self.names()) < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes!r}.")
        check_template(self.frames)

    def names(self) -> tuple[str, ...]:
        """Names of the classes."""
        if isinstance(self.classes, int):
            return tuple(f"class {number}" for number in range(self.classes))
        return tuple(self.classes)

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list is missing or empty, a line is not what it should be, a label is
                no class, or a video is broken and `broken` does not say to skip it.
        """
        names = self.names()
        root = required_folder(Path(self.root), LISTS_SOURCE)
        train, val = (
            read_list(root / name, len(names), self.frames).kept(self.broken)
            for name in (self.train, self.val)
        )
        return Splits(train=train, val=val, classes=names, video=True)


def check_template(template: str | None) -> None:
    """Raise a ValueError if `template` names no frames by their numbers."""
    if template is None:
        return
    try:
        names = {template.format(number) for number in (1, 2)}
    except (IndexError, KeyError, ValueError):
        names = set()
    if len(names) < 2:
        raise ValueError(f"frames must look like img_{{:05}}.jpg, got {template!r}.")


def read_list(path: Path, classes: int, template: str | None) -> Videos:
    """The videos of a list.

    Raises:
        ValueError: If it is missing or empty, a line is not what it should be, or a label is no
            class.
    """
    form = ("videos/1.mp4", "0") if template is None else ("frames/1", "48", "0")
    entries = []
    for place, line in read_lines(path, LISTS_SOURCE):
        # A path may hold blanks, numbers do not.
        name, *numbers = line.rsplit(maxsplit=len(form) - 1)
        if len(numbers) != len(form) - 1:
            raise ValueError(f"data: {place}: must look like {' '.join(form)!r}, got {line!r}.")
        label = read_number(numbers[-1], "label", 0, classes - 1, place)
        frames = None
        if template is not None:
            frames = read_number(numbers[0], "number of frames", 1, _MOST_FRAMES, place)
        entries.append(Entry(path.parent / name, label, frames))
    if not entries:
        raise ValueError(f"data: {path} names no videos.")
    return Videos(entries, template)
