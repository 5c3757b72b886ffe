"""Images and masks move together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokendial.data import MaskAugment
from tokendial.data.transforms.masks import (
    InputFormat,
    MaskEvalTransform,
    MaskImageTransform,
    MaskTrainTransform,
)

FRAME = InputFormat((32, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def pair(height, width):
    """An image that is white in a rectangle, and the mask of the rectangle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2 + 1, width // 3 : width // 2 + 1] = 1
    return Image.fromarray(mask * 255).convert("RGB"), mask


@pytest.mark.parametrize("keep_aspect", [False, True])
@given(height=st.integers(1, 120), width=st.integers(1, 120), seed=st.integers(0, 2**16))
def test_training_pairs_stay_together(keep_aspect, height, width, seed):
    torch.manual_seed(seed)
    augment = MaskAugment(keep_aspect=keep_aspect, scale=(0.5, 2.0))
    image, target = MaskTrainTransform(augment, FRAME, 255)(*pair(height, width))
    assert image.shape == (3, 32, 32)
    assert target.shape == (32, 32)
    assert set(target.unique().tolist()) <= {0, 1, 255}
    # Away from borders, where interpolation mixes both, white is inside and black outside.
    assert ((image[0] > 0.99) & (target == 0)).float().mean() < 0.05
    assert ((image[0] < 0.01) & (target == 1)).float().mean() < 0.05


def test_chance_is_that_of_the_global_generator():
    transform = MaskTrainTransform(MaskAugment(color_jitter=0.4), FRAME, 0)
    torch.manual_seed(3)
    first = transform(*pair(50, 60))
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, transform(*pair(50, 60)), strict=True))


@pytest.mark.parametrize("size", [(1, 40), (33, 77), (400, 60)])
@pytest.mark.parametrize("test", ["whole", "slide"])
def test_masks_keep_their_size_in_tests(test, size):
    augment = MaskAugment(test=test)
    image, target = MaskEvalTransform(augment, FRAME, 255)(*pair(*size))
    assert target.shape == size
    assert torch.equal(image, MaskImageTransform(augment, FRAME)(pair(*size)[0]))
    if test == "whole":
        assert image.shape == (3, 32, 32)
    else:
        assert min(image.shape[1:]) >= 32


@pytest.mark.parametrize("size", [(20, 90), (90, 20), (64, 64)])
def test_the_middle_of_test_images_as_in_the_authors_code(size):
    image, target = MaskEvalTransform(MaskAugment(test="crop"), FRAME, 0)(*pair(*size))
    assert image.shape == (3, 32, 32)
    assert target.shape == (32, 32)
    assert ((image[0] > 0.99) & (target == 0)).float().mean() < 0.05


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_test_image_is_padded_right_and_below_as_in_dars_code(turned):
    """40 x 80 becomes 341 x 682 for a model of 518 x 518: rows are padded below."""
    wide = np.zeros((40, 80), np.uint8)
    wide[:, 20:60] = 1
    mask = wide.T if turned else wide
    image = Image.fromarray(mask * 200 + 50).convert("RGB")
    frame = InputFormat((518, 518), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    seen, target = MaskEvalTransform(MaskAugment(test="crop"), frame, 7)(image, mask)
    if turned:
        seen, target = seen.mT, target.mT
    # 682 columns are cropped to 518, 82 from each side: 20 of 80 columns end at 170.5 - 82.
    assert (seen[:, :341].min(), seen[:, 341:].max()) == (pytest.approx(50 / 255), 0)
    assert (target[:341, 89:429] == 1).all()
    assert (target[:341, :88] == 0).all()
    assert (target[:341, 431:] == 0).all()
    assert (target[341:] == 7).all()
    assert (seen[0, :341, 100:420] > 0.97).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale must be two rising numbers above 0, got \(0.0, 1.0\)"),
        ({"flip": 2.0}, r"flip must lie in \[0, 1\], got 2.0"),
        ({"color_jitter": -1.0}, "color_jitter must be at least 0"),
        ({"test": "half"}, "test must be one of whole, crop, slide, got 'half'"),
        ({"stride": 0.0}, r"stride must lie in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskAugment(**settings)
