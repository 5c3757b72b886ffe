"""Read the text lists that data sets are published with; errors name the file and the line."""

from collections.abc import Iterator
from pathlib import Path

from tokendial.data.readers.files import format_path


def require_file(path: Path, source: str) -> Path:
    """Return `path` after checking that the file exists.

    Raises:
        ValueError: If it does not exist; the message ends with `source`, which says where to get
            the file.
    """
    if not path.is_file():
        raise ValueError(f"data: no such file: {format_path(path)}. {source}")
    return path


def require_folder(path: Path, source: str) -> Path:
    """Return `path` after checking that the folder exists.

    Raises:
        ValueError: If it does not exist; the message ends with `source`, which says where to get
            the folder.
    """
    if not path.is_dir():
        raise ValueError(f"data.root: no such folder: {format_path(path)}. {source}")
    return path


def require_image(path: Path, place: str) -> Path:
    """Return the path of an image that a list names, after checking that the file exists.

    Raises:
        ValueError: If there is no such file; the message starts with `place`, the line of the list.
    """
    if not path.is_file():
        raise ValueError(f"data: {place}: no such image: {path}.")
    return path


def read_lines(path: Path, source: str) -> Iterator[tuple[str, str]]:
    """Yield (place, line) for each line that is not blank; a place is "train.txt, line 3".

    Raises:
        ValueError: If the file does not exist (the message ends with `source`) or is not text.
    """
    try:
        text = require_file(path, source).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"data: {path} is not a text file.") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def read_two_columns(path: Path, example: str, source: str) -> Iterator[tuple[str, str, str]]:
    """Yield (place, text before the last word, last word) for each line that is not blank.

    Raises:
        ValueError: If a line is a single word; the message shows `example`, a correct line.
    """
    for place, line in read_lines(path, source):
        words = line.rsplit(maxsplit=1)
        if len(words) != 2:
            raise ValueError(f"data: {place}: must look like {example!r}, got {line!r}.")
        yield place, words[0], words[1]


def parse_number(text: str, name: str, first: int, last: int, place: str) -> int:
    """Return the whole number in [first, last] that `text` holds.

    Raises:
        ValueError: If `text` is not a number or the number is outside the range; the message names
            `name`, the meaning of the number, and `place`, where it is written.
    """
    number = int(text) if text.isascii() and text.isdigit() else None
    if number is None or not first <= number <= last:
        raise ValueError(
            f"data: {place}: {name} must be a whole number in [{first}, {last}], got {text!r}."
        )
    return number
