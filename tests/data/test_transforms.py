import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tokendial.data import Augment, eval_transform, train_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


def picture(width=40, height=30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(crop=False),
        Augment(randaugment="rand-m9-mstd0.5-inc1", color_jitter=0.3, erasing=1.0),
    ],
)
def test_both_transforms_give_tensors_of_the_given_size(augment, size):
    for make in (train_transform, eval_transform):
        tensor = make(augment, size, MEAN, STD)(picture())
        assert tensor.shape == (3, *size)
        assert tensor.dtype == torch.float32


def test_pixels_are_normalised():
    grey = Image.new("RGB", (8, 8), (51, 102, 255))
    tensor = eval_transform(Augment(), (8, 8), MEAN, STD)(grey)
    expected = (torch.tensor([0.2, 0.4, 1.0]) - torch.tensor(MEAN)) / 0.2
    torch.testing.assert_close(tensor[:, 4, 4], expected, atol=1e-5, rtol=0)


def test_the_centre_is_cropped_in_tests():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = 255
    transform = eval_transform(Augment(test_crop_ratio=0.5), (32, 32), (0, 0, 0), (1, 1, 1))
    assert transform(Image.fromarray(pixels)).min() > 0.9


NARROW = [(30, 400), (401, 33), (7, 900), (900, 7), (2000, 150)]


@pytest.mark.parametrize("sides", NARROW)
@pytest.mark.parametrize(("ratio", "size"), [(0.875, (32, 32)), (1.0, (32, 32)), (0.5, (16, 48))])
def test_long_images_are_cropped_as_by_torchvision(sides, ratio, size):
    bicubic = v2.InterpolationMode.BICUBIC
    if ratio == 1.0 or size[0] != size[1]:
        steps = [v2.Resize(size, bicubic)]
    else:
        steps = [v2.Resize(round(size[0] / ratio), bicubic), v2.CenterCrop(size)]
    image = picture(*sides)
    expected = np.asarray(v2.Compose(steps)(image)).astype(int)
    augment = Augment(test_crop_ratio=ratio)
    found = eval_transform(augment, size, (0, 0, 0), (1, 1, 1))(image)
    pixels = (255 * found).round().int().permute(1, 2, 0).numpy()
    assert abs(pixels - expected).max() <= 1
    assert (pixels != expected).mean() < 0.01


def test_long_images_take_no_more_memory_than_they_have_pixels():
    # The whole image, resized, would have gigabytes; the process may have a few hundred megabytes.
    code = """
import resource
from pathlib import Path
from PIL import Image
from tokendial.data import Augment, eval_transform
for ratio in (0.875, 1.0):
    transform = eval_transform(Augment(test_crop_ratio=ratio), (224, 224), (0,) * 3, (1,) * 3)
    transform(Image.new("RGB", (300, 200)))
    for sides in ((4, 400_000), (400_000, 4), (1, 2_000_000)):
        image = Image.new("RGB", sides)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        assert transform(image).shape == (3, 224, 224), (ratio, sides)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("field", ["flip", "vertical_flip"])
def test_flips_mirror_one_axis(field):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    augment = Augment(crop=False, **{"flip": 0.0, field: 1.0})
    found = train_transform(augment, (16, 16), (0, 0, 0), (1, 1, 1))(Image.fromarray(pixels))
    expected = pixels[:, ::-1] if field == "flip" else pixels[::-1]
    assert np.array_equal((255 * found).round().byte().permute(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"vertical_flip": 1.5}, r"vertical_flip must lie in \[0, 1\], got 1.5"),
        ({"mixup": -1.0}, "mixup must be at least 0, got -1.0"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"test_crop_ratio": 0.0}, r"test_crop_ratio must lie in \(0, 1\], got 0.0"),
        ({"color_jitter": float("nan")}, "color_jitter must be at least 0, got nan"),
        ({"scale": (0.0, 1.0)}, r"scale must be two rising numbers in \(0, 1\]"),
        ({"scale": (0.5,)}, r"scale must be two rising numbers in \(0, 1\]"),
        ({"randaugment": "rand-m9-q5"}, "randaugment must look like rand-m9-mstd0.5-inc1"),
        ({"randaugment": "m9"}, "randaugment must look like rand-m9-mstd0.5-inc1, got 'm9'"),
    ],
)
def test_impossible_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Augment(**settings)
