"""Names of classes: shipped lists, files; and the 80 prompts that CLIP was tested with.

In a file, each line is a class. A class may have several names, separated by "|".
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

ClassNames = Sequence[str | Sequence[str]]
"""One entry for each class: its name, or several names of it."""
CLASS_LISTS = (
    "voc20",
    "voc21",
    "context59",
    "context60",
    "coco_object",
    "coco_stuff",
    "cityscapes",
    "ade20k",
)
"""Names of the shipped lists. In voc21, context60 and coco_object, class 0 is the background."""
_WITHOUT_BACKGROUND = {"voc20": "voc21", "context59": "context60"}


def class_list(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the names of each class of a data set, in the order of its class values.

    Args:
        name: One of `CLASS_LISTS`.

    Raises:
        ValueError: If there is no such list.
    """
    if name not in CLASS_LISTS:
        raise ValueError(f"classes must be one of {', '.join(CLASS_LISTS)}, got {name!r}.")
    file = _WITHOUT_BACKGROUND.get(name, name)
    classes = _parse_lines(_asset("classes", f"{file}.txt"))
    return classes if file == name else classes[1:]


def parse_classes(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the names of each class that a text describes.

    Args:
        text: The name of a shipped list, the path of a text file (.txt) with one class a line, or
            classes separated by commas, such as "cat, dog, sofa | couch".

    Raises:
        ValueError: If the file does not exist, or there is no name.
    """
    if text in CLASS_LISTS:
        return class_list(text)
    if text.endswith(".txt"):
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"classes: no such file: {path}.")
        try:
            classes = _parse_lines(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"classes: {path} is not a text file in UTF-8.") from None
    else:
        classes = _parse_lines(text.replace(",", "\n"))
    return check_classes(classes)


def check_classes(classes: ClassNames) -> tuple[tuple[str, ...], ...]:
    """Return the names of each class as tuples.

    Raises:
        ValueError: If there is no class, or a class has no name.
    """
    if isinstance(classes, str):
        raise ValueError(f"classes must be a list of names, got the string {classes!r:.60}.")
    checked = tuple((names,) if isinstance(names, str) else tuple(names) for names in classes)
    if not checked:
        raise ValueError("classes must name at least one class, got none.")
    for number, names in enumerate(checked):
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"classes must have a name each, class {number} has {names!r:.60}.")
    return checked


@cache
def imagenet_prompts() -> tuple[str, ...]:
    """Return the 80 prompts of CLIP's authors for ImageNet, with {} in place of the class."""
    return tuple(_asset("prompts", "imagenet.txt").splitlines())


def _parse_lines(text: str) -> tuple[tuple[str, ...], ...]:
    lines = [line.strip() for line in text.splitlines()]
    return tuple(
        tuple(stripped for name in line.split("|") if (stripped := name.strip()))
        for line in lines
        if line
    )


def _asset(folder: str, name: str) -> str:
    return (files("tokendial") / "assets" / folder / name).read_text(encoding="utf-8")
