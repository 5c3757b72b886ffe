"""Food-101: 101,000 photographs of 101 dishes.

Bossard et al., "Food-101 - Mining Discriminative Components with Random Forests", ECCV 2014.
"""

from dataclasses import dataclass
from pathlib import Path

from tokendial.data.readers.lists import read_lines, require_image
from tokendial.data.sets.labelled_images import ImageFiles
from tokendial.data.sets.official import OfficialSet
from tokendial.data.splits import Splits
from tokendial.methods import register

_SOURCE = (
    "Food-101, https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101, is a folder that "
    "holds images/ and meta/."
)


@register("data", "food101")
@dataclass(frozen=True, kw_only=True, slots=True)
class Food101(OfficialSet):
    """Food-101: `root/images/CLASS/ID.jpg` and the lists `root/meta/{classes,train,test}.txt`."""

    def build(self, seed: int) -> Splits:
        """Read the lists.

        Raises:
            ValueError: If a list or an image is missing, a line is not CLASS/ID, or there are more
                or fewer images or classes than published.
        """
        meta = Path(self.root) / "meta"
        classes = [name for _, name in read_lines(meta / "classes.txt", _SOURCE)]
        self.check_count(f"number of classes in {meta / 'classes.txt'}", len(classes), 101)
        label_of = {name: label for label, name in enumerate(classes)}
        train = self._read_list(meta / "train.txt", label_of, 75_750)
        test = self._read_list(meta / "test.txt", label_of, 25_250)
        return self.splits(train, test, classes, seed)

    def _read_list(self, path: Path, label_of: dict[str, int], size: int) -> ImageFiles:
        files = []
        for place, line in read_lines(path, _SOURCE):
            name, slash, _ = line.partition("/")
            if not slash or name not in label_of:
                raise ValueError(
                    f"data: {place}: must be CLASS/ID with a class of classes.txt, got {line!r}."
                )
            image = Path(self.root) / "images" / f"{line}.jpg"
            files.append((require_image(image, place), label_of[name]))
        self.check_count(f"number of images in {path}", len(files), size)
        return ImageFiles(files)
