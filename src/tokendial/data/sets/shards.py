"""WebDataset's shards: tar files of images and labels, read in random order.

https://github.com/webdataset/webdataset describes the format: the files of a sample follow each
other and share their name up to the first dot. Shards are made for streaming. Here an index of each
shard stores where its images are, so samples can be drawn at random as from any other data set, and
a run that was killed continues with the same samples. This needs uncompressed tar files on a local
or mounted disk; shards on a web server must be copied first.
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
from tokendial.data.readers.files import (
    PATH,
    format_suffixes,
    list_files,
    warn_of_other_files,
)
from tokendial.data.readers.images import (
    IMAGE_SUFFIXES,
    ImageError,
    decode_image,
    find_images,
    list_images,
)
from tokendial.data.readers.lists import parse_number
from tokendial.data.readers.pixels import (
    ValueRange,
    check_range,
    sample_evenly,
    warn_of_unused_range,
)
from tokendial.data.splits import Splits
from tokendial.methods import register

_LOG = logging.getLogger(__name__)
_MAX_LABEL = 2**31 - 1
_BLOCK = tarfile.BLOCKSIZE


@register("data", "webdataset")
@dataclass(frozen=True, kw_only=True, slots=True)
class WebDataset:
    """WebDataset shards; each sample is an image (.jpg, .png, ...) and a label as text (.cls)."""

    train: str = field(metadata=PATH)
    """Pattern of the training shards, such as "/data/train-{0000..0146}.tar" or "/data/tr*.tar"."""
    val: str = field(metadata=PATH)
    """Pattern of the validation shards, such as "/data/val-{000..009}.tar"."""
    classes: int | list[str]
    """Number of classes, or their names."""
    label: str = "cls"
    """Ending of the label files in a shard, without the dot."""
    index: bool = True
    """Whether the index of each shard is saved beside it, as SHARD.index.npz, so that the next run
    need not read the whole shard. In a folder without write permission no index is saved."""
    range: ValueRange = None
    """Values that become black and white in grey images of more than 8 bits, such as [0, 4095].
    image: the smallest and largest value of each image; null: the limits of the file's number
    type."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes!r}.")
        check_range(self.range)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    def build(self, seed: int) -> Splits:
        """Index the shards, or load the saved indices.

        Raises:
            ValueError: If a shard is missing, compressed or cut off, a sample lacks its image or
                its label, a label is not a class, or images need `range` and it is null.
        """
        names = self.classes
        if isinstance(names, int):
            names = [f"class {number}" for number in range(names)]
        train, val = (self._open(field) for field in ("train", "val"))
        sources = (
            (train.name(i), BytesIO(train.data(i))) for i in sample_evenly(range(len(train)))
        )
        warn_of_unused_range(sources, self.range, self.train)
        return Splits(train=train, val=val, classes=tuple(names))

    def _open(self, field: str) -> "ShardSet":
        shards = find_shards(getattr(self, field), f"data.{field}")
        samples = ShardSet(shards, [self._load_or_index(shard) for shard in shards], self.range)
        bad = np.flatnonzero(samples.labels >= self.num_classes)
        if bad.size:
            raise ValueError(
                f"data: {samples.name(bad[0])}: label must lie in [0, {self.num_classes - 1}], "
                f"got {samples.labels[bad[0]]}."
            )
        return samples

    def _load_or_index(self, shard: Path) -> "_ShardIndex":
        path = shard.with_name(f"{shard.name}.index.npz")
        status = shard.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns} {self.label}"
        if self.index and (saved := _load_index(path, stamp)) is not None:
            return saved
        index = index_shard(shard, self.label)
        if self.index:
            arrays: dict[str, Any] = index | {"stamp": np.array(stamp)}
            try:
                with atomic_write(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **arrays)
            except OSError as error:
                _LOG.info("the index of %s is not saved: %s", shard, error)
        return index


_ShardIndex = dict[str, np.ndarray]
"""Arrays with one entry per sample: `key`, `label`, `offset` and `size` of the image in bytes."""


class ShardSet(Dataset[tuple[Image.Image, int]]):
    """Samples of several shards, each read when it is requested."""

    def __init__(
        self, shards: Sequence[Path], indices: Sequence[_ShardIndex], value_range: ValueRange = None
    ) -> None:
        """Join the indices that `index_shard` made of each shard."""
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
        """Return the encoded image of a sample."""
        with self.shards[self.shard[index]].open("rb") as file:
            file.seek(self.offsets[index])
            content: bytes = file.read(self.sizes[index])
        return content

    def name(self, index: int) -> str:
        """Return the shard and the key of a sample, as errors name it."""
        return f"{self.shards[self.shard[index]]}, sample {self.keys[index].decode()}"


def find_shards(pattern: str, field: str) -> list[Path]:
    """Return the files that a pattern names: {000..146} counts, {a,b} lists, * ? [] match.

    Args:
        pattern: Pattern of file names.
        field: Name of the setting in errors, such as "data.train".

    Raises:
        ValueError: If one of the counted or listed names matches no file.
    """
    found: list[Path] = []
    for name in _expand_braces(pattern):
        matches = sorted(map(Path, glob(name, recursive=True)))
        if not matches:
            raise ValueError(f"{field}: no such shard: {name}.")
        found += matches
    return found


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yield every name that a pattern with braces stands for."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    options = [_brace_options(part) if number % 2 else [part] for number, part in enumerate(parts)]
    yield from map("".join, itertools.product(*options))


def _brace_options(braced: str) -> list[str]:
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", braced)
    if counted is None:
        return braced.split(",")
    first, last = counted.groups()
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def index_shard(shard: Path, label: str) -> _ShardIndex:
    """Return the index of a shard: where the image of each sample is, and its label.

    Args:
        shard: The tar file.
        label: Ending of the label files, without the dot.

    Raises:
        ValueError: If the shard is compressed or cut off, or a sample lacks its image or its label.
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
            labels[key] = parse_number(text, "label", 0, _MAX_LABEL, f"{shard}, {member.name}")
    for keys, other, missing in ((images, labels, f".{label} file"), (labels, images, "image")):
        if single := [key for key in keys if key not in other]:
            raise ValueError(f"data: {shard}, sample {single[0]} has no {missing}.")
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
    """Position of the image file in the shard, in bytes."""
    size: int
    """Length of the image file in bytes."""

    def __str__(self) -> str:
        return f"{self.shard}, sample {self.key}"

    def read(self, value_range: ValueRange = None) -> Image.Image:
        """Read the image as 8-bit RGB, turned upright, as `read_image` does for files.

        Raises:
            ImageError: If it cannot be decoded, or needs a value range and none is given.
        """
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return decode_image(file.read(self.size), str(self), value_range=value_range)


def find_sources(paths: Iterable[str | Path]) -> list[Path | ShardImage]:
    """Return the image files and the images of shards (.tar) in `paths` and in the folders there.

    Raises:
        ImageError: If a path does not exist or no image is found.
        ValueError: If a shard is compressed or cut off.
    """
    searched = list(map(Path, paths))
    found: list[Path | ShardImage] = []
    other_suffixes: Counter[str] = Counter()
    for path in searched:
        if path.is_dir():
            shards = list_files(path, {".tar"})
            found += list_images(path, other_suffixes)
        else:
            shards = [path] if path.suffix == ".tar" and path.is_file() else []
            found += [] if shards else find_images([path])
        found += [image for shard in shards for image in list_shard_images(shard)]
    del other_suffixes[".tar"]
    where = ", ".join(map(str, searched))
    if not found:
        only = f" (only {format_suffixes(other_suffixes)})" if other_suffixes else ""
        raise ImageError(f"no images found in {where}{only}.")
    warn_of_other_files(other_suffixes, "image", where)
    return found


def list_shard_images(shard: Path) -> list[ShardImage]:
    """Return the images of a shard in their order, with or without labels.

    Raises:
        ValueError: If the shard is compressed or cut off.
    """
    return [
        ShardImage(shard, key, member.offset_data, member.size)
        for key, suffix, member, _ in _members(shard)
        if f".{suffix.lower()}" in IMAGE_SUFFIXES
    ]


def _members(shard: Path) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Yield (sample key, file ending, tar entry, open tar file) for each file of a shard."""
    try:
        # "r:" opens uncompressed tar files only; others cannot be read from any position.
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = 0
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                # WebDataset reserves names that start with two underscores. A stem is empty for
                # hidden files, which desktops leave behind.
                if member.isreg() and stem and not stem.startswith("__"):
                    yield f"{folder}{slash}{stem}", suffix, member, tar
            # tarfile takes a header that is cut off or damaged for the end of the file. A complete
            # file ends with a block of zeros.
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"data: {shard} is not a whole, uncompressed tar file ({error})."
        ) from None


def _load_index(path: Path, stamp: str) -> _ShardIndex | None:
    """Return a saved index; None if it is missing or damaged, or if the shard has changed since."""
    try:
        with path.open("rb") as file, np.load(file) as saved:
            if str(saved["stamp"]) == stamp:
                return {name: saved[name] for name in ("key", "offset", "size", "label")}
    except (EOFError, KeyError, OSError, RuntimeError, ValueError, zipfile.BadZipFile):
        pass
    return None
