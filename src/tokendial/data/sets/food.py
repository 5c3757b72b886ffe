"""Food-101: 101,000 photographs of 101 dishes.

Bossard et al., "Food-101 - Mining Discriminative Components with Random Forests", ECCV 2014.
"""

from dataclasses import dataclass
from pathlib import Path

from tokendial.data.sets.labelled import Files, OfficialSet, existing, read_lines
from tokendial.data.splits import Splits
from tokendial.methods import register

_SOURCE = (
    "Food-101, https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101, is a folder that "
    "holds images/ and meta/."
)


@register("data", "food101")
@dataclass(frozen=True, kw_only=True, slots=True)
class Food101(OfficialSet):
    """The official folder: `root/images/CLASS/ID.jpg`, `root/meta/{classes,train,test}.txt`."""

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list or an image is missing, a line is not CLASS/ID, or there are more
                or fewer images or classes than published.
        """
        meta = Path(self.root) / "meta"
        classes = [name for _, name in read_lines(meta / "classes.txt", _SOURCE)]
        self.check_count(f"number of classes in {meta / 'classes.txt'}", len(classes), 101)
        numbers = {name: number for number, name in enumerate(classes)}
        train = self._read(meta / "train.txt", numbers, 75_750)
        test = self._read(meta / "test.txt", numbers, 25_250)
        return self.splits(train, test, classes, seed)

    def _read(self, path: Path, numbers: dict[str, int], size: int) -> Files:
        files = []
        for place, line in read_lines(path, _SOURCE):
            name, slash, _ = line.partition("/")
            if not slash or name not in numbers:
                raise ValueError(
                    f"data: {place}: must be CLASS/ID with a class of classes.txt, got {line!r}."
                )
            image = Path(self.root) / "images" / f"{line}.jpg"
            files.append((existing(image, place), numbers[name]))
        self.check_count(f"number of images in {path}", len(files), size)
        return Files(files)
