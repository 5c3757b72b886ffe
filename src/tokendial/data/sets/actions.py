"""Kinetics-400 and Something-Something V2, in the lists of VideoMAE.

Kay et al., "The Kinetics Human Action Video Dataset", https://arxiv.org/abs/1705.06950; Goyal et
al., "The something something video database", ICCV 2017.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokendial.data.readers.files import PATH
from tokendial.data.sets.labelled import check_count, read_lines, required_folder
from tokendial.data.sets.video_sets import LISTS_SOURCE, VideoSet, check_template, read_list
from tokendial.data.splits import Splits
from tokendial.methods import register


@dataclass(frozen=True, kw_only=True, slots=True)
class _PublishedSet(VideoSet):
    """`root/{train,val,test}.csv` as VideoMAE keeps them."""

    val: Literal["val", "test"] = "val"
    """What is validated on: val.csv or test.csv."""
    classes: str | None = field(default=None, metadata=PATH)
    """File with the names of the classes, one a line, in the order of the labels; null: numbers."""
    check: bool = True
    """Whether the lists must have the classes, and where they are fixed the videos, of the whole
    set; false: parts of it will do."""

    def __post_init__(self) -> None:
        VideoSet.__post_init__(self)
        if self.val not in ("val", "test"):
            raise ValueError(f"val must be one of val, test, got {self.val!r}.")

    def _splits(
        self, classes: int, sizes: tuple[int, int] | None = None, template: str | None = None
    ) -> Splits:
        root = required_folder(Path(self.root), LISTS_SOURCE)
        found = []
        for number, name in enumerate(("train.csv", f"{self.val}.csv")):
            videos = read_list(root / name, classes, template)
            got = len(set(videos.labels))
            check_count(f"number of classes in {root / name}", got, classes, strict=self.check)
            if sizes is not None:
                what = f"number of videos in {root / name}"
                check_count(what, len(videos), sizes[number], strict=self.check)
            found.append(videos.kept(self.broken))
        train, val = found
        return Splits(train=train, val=val, classes=self._names(classes), video=True)

    def _names(self, count: int) -> tuple[str, ...]:
        if self.classes is None:
            return tuple(f"class {number}" for number in range(count))
        path = Path(self.classes)
        names = tuple(line for _, line in read_lines(path, "data.classes may also be null."))
        if len(names) != count:
            raise ValueError(f"data.classes: {path} must name {count} classes, got {len(names)}.")
        return names


@register("data", "k400")
@dataclass(frozen=True, kw_only=True, slots=True)
class K400(_PublishedSet):
    """Kinetics-400: `root/{train,val,test}.csv`, lines `path label`.

    Videos vanish from where they are published, so copies differ in length: with `check`, every
    class has to occur.
    """

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list is missing, a line is not a path and a label, a label is no class,
                a class does not occur, or a video is broken and `broken` does not say to skip it.
        """
        return self._splits(400)


@register("data", "ssv2")
@dataclass(frozen=True, kw_only=True, slots=True)
class SSv2(_PublishedSet):
    """Something-Something V2: `root/{train,val,test}.csv`, of videos or of folders of frames."""

    frames: str | None = None
    """Name of a frame by its number from 1, such as "img_{:05}.jpg", where lines are
    `folder total_frames label`; null: lines are `path label`."""

    def __post_init__(self) -> None:
        _PublishedSet.__post_init__(self)
        check_template(self.frames)

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list is missing, has another length than the published one, a line is
                not what it should be, a label is no class, or a video is broken and `broken` does
                not say to skip it.
        """
        return self._splits(174, (168_913, 24_777), self.frames)
