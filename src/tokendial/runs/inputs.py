"""Images of files and shards as inputs of a model, or the errors of those that cannot be read."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tokendial.data.readers.images import (
    ImageError,
    count_pictures,
    read_image,
    warn_of_multi_picture_files,
)
from tokendial.data.readers.pixels import ValueRange
from tokendial.data.sets.shards import ShardImage
from tokendial.data.transforms.image import Transform


@dataclass(frozen=True, slots=True)
class ImageReader:
    """Reads images and prepares them for a model."""

    transform: Transform
    """Turns a PIL image into the input [3, H, W] of the model."""
    value_range: ValueRange
    """Pixel values that are black and white in images of more than 8 bits."""

    def __call__(self, source: Path | ShardImage) -> Tensor | ImageError:
        """The model's input for an image, or the error if it cannot be read."""
        try:
            if isinstance(source, ShardImage):
                return self.transform(source.read(self.value_range))
            image = read_image(source, self.value_range)
            warn_of_multi_picture_files([(source, count_pictures(source))])
            return self.transform(image)
        except ImageError as error:
            return error
