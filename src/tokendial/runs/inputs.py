"""Images of files and shards as inputs of a model, or the errors of those that cannot be read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image

from tokendial.data.readers.images import (
    ImageError,
    count_pictures,
    read_image,
    warn_of_multi_picture_files,
)
from tokendial.data.readers.pixels import ValueRange
from tokendial.data.sets.shards import ShardImage

Prepared = TypeVar("Prepared")


@dataclass(frozen=True, slots=True)
class ImageReader(Generic[Prepared]):
    """Reads images and prepares them for a model."""

    transform: Callable[[Image.Image], Prepared]
    """Turns an RGB image into the input of the model."""
    value_range: ValueRange
    """Pixel values that are black and white in images of more than 8 bits."""

    def __call__(self, source: Path | ShardImage) -> Prepared | ImageError:
        """The model's input for an image, or the error if it cannot be read."""
        try:
            if isinstance(source, ShardImage):
                return self.transform(source.read(self.value_range))
            image = read_image(source, self.value_range)
            warn_of_multi_picture_files([(source, count_pictures(source))])
            return self.transform(image)
        except ImageError as error:
            return error
