"""Images and masks of odd sizes, empty and full ones, from the files to the metrics."""

import numpy as np
import pytest
import torch
from examples import tiny_vit
from PIL import Image

import tokendial as td
from tokendial.data.sets.pairs import Pairs
from tokendial.data.transforms.masks import MaskAugment
from tokendial.tasks import BinaryMasks, Segmentation, collate

SMALL, LARGE = ((1, 300), (300, 1), (333, 777)), (4000, 6000)


def pair(tmp_path, size, fill):
    """A pair of files whose mask is drawn by `fill`, and the data set that reads them."""
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    for split in ("training", "validation"):
        for name, file in (("images", "a.jpg"), ("annotations", "a.png")):
            (tmp_path / name / split).mkdir(parents=True)
            drawn = image if name == "images" else Image.fromarray(fill(height, width))
            drawn.save(tmp_path / name / split / file)


def half(value):
    """Fill the right half of a mask with a value; the left half is 0."""

    def fill(height, width):
        mask = np.zeros((height, width), np.uint8)
        mask[:, width // 2 :] = value
        return mask

    return fill


def scored(root, classes, test="whole"):
    """Loss in training, and the metrics of the validation pair."""
    data = Pairs(root=str(root), classes=classes).build(0)
    augment = MaskAugment(test=test)
    task = Segmentation(classes, augment) if classes else BinaryMasks(augment)
    torch.manual_seed(0)
    decode = td.LinearDecoder(num_classes=classes or 1)
    model = td.wrap(tiny_vit(num_classes=0), reduce=td.DAR(), decode=decode).eval()
    images, targets = collate([task.train_transform(model.anatomy)(*data.train[0])])
    assert images.shape == (1, 3, 32, 32)
    loss = task.loss(model(images), targets)
    metrics = task.metrics()
    images, targets = collate([task.eval_transform(model.anatomy)(*data.val[0])])
    with torch.no_grad():
        metrics.update(task.predict(model, images), targets)
    return loss, metrics.compute()


@pytest.mark.parametrize(
    ("classes", "size"),
    [(classes, size) for classes in (None, 150) for size in SMALL] + [(None, LARGE), (2, LARGE)],
    ids=str,
)
def test_any_size_is_learnt_from_and_scored(tmp_path, size, classes):
    pair(tmp_path, size, half(classes - 1 if classes else 255))
    loss, scores = scored(tmp_path, classes)
    assert loss.isfinite()
    judged = ["mae", "max_f", "mean_e"] if classes is None else ["mean_iou", "pixel_accuracy"]
    if classes is None and size[0] > 1:
        judged.append("s_measure")  # its quadrants need two rows
    assert all(0 <= scores[name] <= 1 for name in judged)


@pytest.mark.parametrize("test", ["crop", "slide"])
@pytest.mark.parametrize("size", [(1, 300), (333, 777)], ids=str)
def test_other_ways_to_see_test_images_take_odd_sizes(tmp_path, size, test):
    pair(tmp_path, size, half(255))
    loss, scores = scored(tmp_path, None, test)
    assert loss.isfinite()
    assert 0 <= scores["mae"] <= 1


def test_an_image_counts_only_for_measures_that_are_defined_on_it():
    metrics, alone = BinaryMasks(MaskAugment()).metrics(), BinaryMasks(MaskAugment()).metrics()
    logits, mask = torch.randn(1, 1, 8, 8), torch.zeros(1, 20, 30, dtype=torch.int64)
    mask[..., 10:] = 1
    for some in (metrics, alone):
        some.update(logits, mask)
    metrics.update(logits, mask[:, :1])
    metrics.update(logits, mask[:, :1, :1])
    found, expected = metrics.compute(), alone.compute()
    assert found["s_measure"] == expected["s_measure"]
    assert found["mae"] != expected["mae"]
    assert all(0 <= score <= 1 for score in found.values())


@pytest.mark.parametrize("value", [0, 255], ids=["empty", "full"])
def test_empty_and_full_masks_are_scored(tmp_path, value):
    pair(tmp_path, (40, 50), lambda h, w: np.full((h, w), value, np.uint8))
    loss, scores = scored(tmp_path, None)
    assert loss.isfinite()
    assert all(np.isfinite(float(score)) for score in scores.values())


def test_a_mask_that_is_ignored_completely_gives_no_gradient(tmp_path):
    pair(tmp_path, (40, 50), lambda h, w: np.full((h, w), 255, np.uint8))
    loss, scores = scored(tmp_path, 150)
    assert loss == 0
    assert np.isnan(float(scores["pixel_accuracy"]))
