"""Kinetics-400 and Something-Something V2, listed in VideoMAE's format.

Kay et al., "The Kinetics Human Action Video Dataset", https://arxiv.org/abs/1705.06950; Goyal et
al., "The something something video database", ICCV 2017.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokendial.checks import check_choice
from tokendial.data.readers.files import PATH
from tokendial.data.readers.lists import read_lines, require_folder
from tokendial.data.sets.official import check_count
from tokendial.data.sets.videos import LISTS_SOURCE, VideoSet, check_template, read_list
from tokendial.data.splits import Splits
from tokendial.methods import register


@dataclass(frozen=True, kw_only=True, slots=True)
class _PublishedVideos(VideoSet):
    """Fields of published video sets with the lists `root/{train,val,test}.csv` of VideoMAE."""

    val: Literal["val", "test"] = "val"
    """List to validate on: val for val.csv, test for test.csv."""
    classes: str | None = field(default=None, metadata=PATH)
    """Text file with the name of one class per line, in the order of the labels. null: the classes
    are named by their numbers."""
    check: bool = True
    """Whether the lists must have all classes of the published data set (for Something-Something
    also as many videos). Set to false to use a part of it."""

    def __post_init__(self) -> None:
        VideoSet.__post_init__(self)
        check_choice("val", self.val, ("val", "test"))

    def _read_splits(
        self, num_classes: int, sizes: tuple[int, int] | None = None, template: str | None = None
    ) -> Splits:
        """Read both lists.

        Args:
            num_classes: Number of classes.
            sizes: Number of videos in the published training and validation list, if it is fixed.
            template: File name of a frame, for lists of folders of frames.
        """
        root = require_folder(Path(self.root), LISTS_SOURCE)
        parts = []
        for number, name in enumerate(("train.csv", f"{self.val}.csv")):
            videos = read_list(root / name, num_classes, template)
            got, where = len(set(videos.labels)), root / name
            check_count(f"number of classes in {where}", got, num_classes, strict=self.check)
            if sizes is not None:
                what = f"number of videos in {where}"
                check_count(what, len(videos), sizes[number], strict=self.check)
            parts.append(videos.without_broken(self.broken))
        train, val = parts
        return Splits(train=train, val=val, classes=self._class_names(num_classes), video=True)

    def _class_names(self, num_classes: int) -> tuple[str, ...]:
        if self.classes is None:
            return tuple(f"class {number}" for number in range(num_classes))
        path = Path(self.classes)
        names = tuple(line for _, line in read_lines(path, "data.classes may also be null."))
        if len(names) != num_classes:
            raise ValueError(
                f"data.classes: {path} must name {num_classes} classes, got {len(names)}."
            )
        return names


@register("data", "k400")
@dataclass(frozen=True, kw_only=True, slots=True)
class K400(_PublishedVideos):
    """Kinetics-400: `root/{train,val,test}.csv`, lines `path label`.

    Videos disappear from the site where they are published, so copies differ in length: `check`
    compares the number of classes only.
    """

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list is missing, a line is not a path and a label, a label is not a
                class, a class is missing and `check` is set, or a video is broken and `broken` is
                "error".
        """
        return self._read_splits(400)


@register("data", "ssv2")
@dataclass(frozen=True, kw_only=True, slots=True)
class SSv2(_PublishedVideos):
    """Something-Something V2: `root/{train,val,test}.csv`, of videos or of folders of frames."""

    frames: str | None = None
    """File name of a frame, formatted with its number from 1, such as "img_{:05}.jpg", if the lists
    name folders of frames (lines `folder num_frames label`). null: they name video files (lines
    `path label`)."""

    def __post_init__(self) -> None:
        _PublishedVideos.__post_init__(self)
        check_template(self.frames)

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list is missing or does not have the published length, a line has the
                wrong form, a label is not a class, or a video is broken and `broken` is "error".
        """
        return self._read_splits(174, (168_913, 24_777), self.frames)
