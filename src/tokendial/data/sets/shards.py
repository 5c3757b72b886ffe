"""WebDataset's shards: tar files of images and labels, read in any order.

https://github.com/webdataset/webdataset describes the format: files of one sample follow each other
and share their name up to its first dot. Shards are made to be streamed; here the place of each
file in its shard is noted once, so that samples can be drawn at random like those of every other
set, and a run that was killed goes on with the same bits. That takes shards on a local disk or a
mounted one, and tar files that are not compressed; shards on web servers have to be copied first.
"""

import itertools
import logging
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from tokendial.atomic import atomic_write
from tokendial.data.readers.files import PATH, endings, files_in, warn_of_others
from tokendial.data.readers.images import (
    IMAGE_SUFFIXES,
    ImageError,
    decode_image,
    find_images,
    images_in,
)
from tokendial.data.readers.pixels import ValueRange, check_range, spread, warn_of_unused_range
from tokendial.data.sets.labelled import read_number
from tokendial.data.splits import Splits
from tokendial.methods import register

_LOG = logging.getLogger(__name__)
_MANY = 2**31 - 1
_BLOCK = tarfile.BLOCKSIZE


@register("data", "webdataset")
@dataclass(frozen=True, kw_only=True, slots=True)
class WebDataset:
    """Shards whose samples are an image (.jpg, .png and others) and a label as text (.cls)."""

    train: str = field(metadata=PATH)
    """Pattern of the training shards, such as "/data/train-{0000..0146}.tar" or "/data/tr*.tar"."""
    val: str = field(metadata=PATH)
    """Pattern of the shards to validate on."""
    classes: int | list[str]
    """Number or names of the classes."""
    label: str = "cls"
    """What the names of the labels end in."""
    index: bool = True
    """Whether the places of the samples are kept beside each shard, as SHARD.index.npz, to be
    found at once by the next run; a folder that cannot be written to does no harm."""
    range: ValueRange = None
    """What is black and white in files of more than 8 bits, such as [0, 4095]; image: each image's
    own smallest and largest value; null: as the type of the file says."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes!r}.")
        check_range(self.range)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    def build(self, seed: int) -> Splits:
        """Find the samples of all shards.

        Raises:
            ValueError: If a shard is missing, compressed or cut off, or a sample lacks its image,
                its label, or has a label that is no class, or nothing says what is black and
                white.
        """
        names = self.classes
        if isinstance(names, int):
            names = [f"class {number}" for number in range(names)]
        train, val = (self._read(field) for field in ("train", "val"))
        sources = ((train.name(i), BytesIO(train.data(i))) for i in spread(range(len(train))))
        warn_of_unused_range(sources, self.range, self.train)
        return Splits(train=train, val=val, classes=tuple(names))

    def _read(self, field: str) -> "ShardSet":
        shards = find_shards(getattr(self, field), f"data.{field}")
        found = ShardSet(shards, [self._indexed(shard) for shard in shards], self.range)
        bad = np.flatnonzero(found.labels >= self.num_classes)
        if bad.size:
            raise ValueError(
                f"data: {found.name(bad[0])}: label must lie in [0, {self.num_classes - 1}], "
                f"got {found.labels[bad[0]]}."
            )
        return found

    def _indexed(self, shard: Path) -> "_Index":
        path = shard.with_name(f"{shard.name}.index.npz")
        status = shard.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns} {self.label}"
        if self.index and (kept := _load_index(path, stamp)) is not None:
            return kept
        found = read_shard(shard, self.label)
        if self.index:
            arrays: dict[str, Any] = found | {"stamp": np.array(stamp)}
            try:
                with atomic_write(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)
            except OSError as error:
                _LOG.info("the index of %s is not kept: %s", shard, error)
        return found


_Index = dict[str, np.ndarray]


class ShardSet(Dataset[tuple[Image.Image, int]]):
    """Reads sample `i` from its shard when it is asked for."""

    def __init__(
        self, shards: Sequence[Path], indices: Sequence[_Index], value_range: ValueRange = None
    ) -> None:
        """Join what `read_shard` has found in each shard."""
        self.shards, self.value_range = list(shards), value_range
        self.shard = np.repeat(np.arange(len(shards)), [len(index["label"]) for index in indices])
        self.keys, self.offsets, self.sizes, self.labels = (
            np.concatenate([index[name] for index in indices])
            for name in ("key", "offset", "size", "label")
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = decode_image(self.data(index), self.name(index), value_range=self.value_range)
        return image, int(self.labels[index])

    def data(self, index: int) -> bytes:
        """The image file of a sample."""
        with self.shards[self.shard[index]].open("rb") as file:
            file.seek(self.offsets[index])
            content: bytes = file.read(self.sizes[index])
        return content

    def name(self, index: int) -> str:
        """The shard and the key of a sample."""
        return f"{self.shards[self.shard[index]]}, sample {self.keys[index].decode()}"


def find_shards(pattern: str, field: str) -> list[Path]:
    """Files that a pattern names: {0000..0146} counts, {a,b} lists, and * ? [] match.

    Raises:
        ValueError: If there is none, or one that is counted or listed is missing.
    """
    found: list[Path] = []
    for name in _braces(pattern):
        matches = sorted(map(Path, glob(name, recursive=True)))
        if not matches:
            raise ValueError(f"{field}: no such shard: {name}.")
        found += matches
    return found


def _braces(pattern: str) -> Iterator[str]:
    """Every name that the braces of a pattern stand for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    options = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    yield from map("".join, itertools.product(*options))


def _choices(braced: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", braced)
    if counted is None:
        return braced.split(",")
    first, last = counted.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def read_shard(shard: Path, label: str) -> _Index:
    """Where the image of each sample of a shard lies, and its label.

    Returns:
        Arrays of one entry for each sample: its `key`, the `offset` and `size` of its image in
        bytes, and its `label`.

    Raises:
        ValueError: If the shard is compressed or cut off, or a sample lacks image or label.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    for key, suffix, member, tar in _members(shard):
        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
            if key in images:
                raise ValueError(f"data: {shard}, sample {key} has two images.")
            images[key] = (member.offset_data, member.size)
        elif suffix == label:
            content = tar.extractfile(member)
            text = content.read().decode("ascii", "replace").strip() if content else ""
            labels[key] = read_number(text, "label", 0, _MANY, f"{shard}, {member.name}")
    for some, others, lacking in ((images, labels, f".{label} file"), (labels, images, "image")):
        if odd := [key for key in some if key not in others]:
            raise ValueError(f"data: {shard}, sample {odd[0]} has no {lacking}.")
    if not images:
        raise ValueError(f"data: {shard} holds no images.")
    places = np.array(list(images.values()), np.int64)
    return {
        "key": np.array([key.encode() for key in images]),
        "offset": places[:, 0],
        "size": places[:, 1],
        "label": np.array([labels[key] for key in images], np.int64),
    }


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image inside a shard."""

    shard: Path
    """The tar file."""
    key: str
    """Name of the sample, without the ending of the image."""
    offset: int
    """Where the image begins in the shard, in bytes."""
    size: int
    """Its length in bytes."""

    def __str__(self) -> str:
        return f"{self.shard}, sample {self.key}"

    def read(self, value_range: ValueRange = None) -> Image.Image:
        """Read it as 8-bit RGB, as `read_image` does; an ImageError if it cannot be decoded."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return decode_image(file.read(self.size), str(self), value_range=value_range)


def find_sources(paths: Iterable[str | Path]) -> list[Path | ShardImage]:
    """Image files among `paths`, and the images in shards (.tar); folders are searched through.

    Raises:
        ImageError: If a path does not exist, or nothing is found.
        ValueError: If a shard is compressed or cut off.
    """
    searched = list(map(Path, paths))
    found: list[Path | ShardImage] = []
    others: Counter[str] = Counter()
    for path in searched:
        if path.is_dir():
            shards = files_in(path, {".tar"})
            found += images_in(path, others)
        else:
            shards = [path] if path.suffix == ".tar" and path.is_file() else []
            found += [] if shards else find_images([path])
        found += [image for shard in shards for image in shard_images(shard)]
    del others[".tar"]
    where = ", ".join(map(str, searched))
    if not found:
        raise ImageError(f"no images found in {where}{endings(others, ' (only ', ')')}.")
    warn_of_others(others, "image", where)
    return found


def shard_images(shard: Path) -> list[ShardImage]:
    """The images of a shard in their order, with or without labels.

    Raises:
        ValueError: If the shard is compressed or cut off.
    """
    return [
        ShardImage(shard, key, member.offset_data, member.size)
        for key, suffix, member, _ in _members(shard)
        if f".{suffix.lower()}" in IMAGE_SUFFIXES
    ]


def _members(shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Key and ending of each file of a shard, the file, and the open shard."""
    try:
        # "r:" opens tar files that are not compressed, as only these can be read from any place.
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                # WebDataset keeps names with two underscores for itself; nameless files are
                # those that a desktop leaves behind.
                if member.isreg() and stem and not stem.startswith("__"):
                    yield f"{folder}{slash}{stem}", suffix, member, tar
            # A header that is cut or damaged looks like the end to tarfile.
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"data: {shard} is not a whole, uncompressed tar file ({error})."
        ) from None


def _load_index(path: Path, stamp: str) -> _Index | None:
    """A kept index, unless there is none, it is damaged, or the shard is another by now."""
    try:
        with path.open("rb") as file, np.load(file) as kept:
            if str(kept["stamp"]) == stamp:
                return {name: kept[name] for name in ("key", "offset", "size", "label")}
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile):
        pass
    return None
