"""Objects with outlines in folders, and the pictures that are composed of them."""

from shutil import copytree

import numpy as np
import pytest
from layouts import BACKGROUNDS, STAMP_FOLDERS
from PIL import Image, ImageFilter

from tokendial.data import Stamps
from tokendial.data.readers.stamps import (
    PARTS,
    Background,
    Cutout,
    classes_by_folder,
    deal,
    has_outline,
)
from tokendial.data.sets.stamp_scenes import crop_photograph, paste_sprite
from tokendial.data.sets.stamps import StampPart, StampPictures

SIZE = 64
CLASSES = ("animals/birds", "animals/fish", "food")


@pytest.fixture(scope="module")
def stamps(stamp_folder):
    """Function that makes the data set of small pictures with some fields changed."""

    def make(**fields) -> Stamps:
        sizes = {"train_size": 60, "val_size": 20, "img_size": SIZE}
        places = {"stamps": str(stamp_folder), "backgrounds": [str(BACKGROUNDS)]}
        return Stamps(**sizes | places | fields)

    return make


def part_of(dataset) -> StampPart:
    return dataset.pictures.part


def digests(part: StampPart) -> set[str]:
    cutouts = [cutout for of_class in part.by_class for cutout in of_class] + part.others
    return {item.digest for item in (*cutouts, *part.backgrounds)}


def test_classes_are_the_nearest_folders_with_enough_objects(stamps):
    splits = stamps().build(0)
    assert splits.classes == CLASSES
    assert not splits.dense
    for name, of_class in zip(CLASSES, part_of(splits.train).by_class, strict=True):
        assert len(of_class) >= 3
        assert all(cutout.name.startswith(f"{name}/") for cutout in of_class)


def test_deeper_folders_come_first_and_pass_on_what_is_too_little():
    names = ["a/b/c/1", "a/b/c/2", "a/b/1", "a/d/1", "a/d/2", "a/e/1", "f/1", "top"]
    assert classes_by_folder(names, 2) == {
        "a/b/c/1": "a/b/c",
        "a/b/c/2": "a/b/c",
        "a/d/1": "a/d",
        "a/d/2": "a/d",
        # One each is left of a/b and a/e.
        "a/b/1": "a",
        "a/e/1": "a",
    }


@pytest.mark.parametrize("split_seed", [0, 1])
def test_no_object_and_no_photograph_is_in_two_parts(stamps, split_seed):
    data = stamps(split_seed=split_seed, clutter=1).build(0)
    val = stamps(split_seed=split_seed, clutter=1, val="val").build(0)
    parts = [part_of(dataset) for dataset in (data.train, data.val, val.val)]
    found = [digests(part) for part in parts]
    assert sum(map(len, found)) == len(set().union(*found)) == sum(STAMP_FOLDERS.values()) + 8
    assert digests(part_of(val.train)) == found[0]
    assert all(all(part.by_class) and part.others and part.backgrounds for part in parts)


def test_the_split_seed_deals_and_the_seed_of_the_run_does_not(stamps):
    dealt = [
        digests(part_of(stamps(split_seed=split_seed).build(seed).train))
        for split_seed, seed in ((0, 0), (0, 1), (1, 0))
    ]
    assert dealt[0] == dealt[1] != dealt[2]


@pytest.mark.parametrize("task", ["category", "mask"])
def test_a_picture_depends_on_seed_part_and_index_alone(stamps, task):
    first, again = stamps(task=task).build(3), stamps(task=task, train_size=9).build(3)
    for number in (7, 0, 7):
        for one, other in zip(first.train[number], again.train[number], strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    val, other = stamps(task=task, val="val").build(3), stamps(task=task).build(4)
    shown = [first.train[0], first.train[1], first.val[0], val.val[0], other.train[0]]
    assert len({np.asarray(image).tobytes() for image, _ in shown}) == 5
    with pytest.raises(IndexError):
        again.train[9]


def test_labels_are_known_without_composing_and_every_class_occurs(stamps):
    train = stamps().build(0).train
    assert train.labels == [train[number][1] for number in range(len(train))]
    assert set(train.labels) == {0, 1, 2}


def test_both_tasks_have_the_same_pictures_and_masks_are_where_they_differ_from_the_ground(stamps):
    category, mask = stamps().build(0), stamps(task="mask").build(0)
    assert mask.dense
    assert mask.classes == ("object",)
    for number in range(20):
        image, inside = mask.train[number]
        assert image == category.train[number][0]
        assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
        assert inside.dtype == np.uint8
        assert set(np.unique(inside)) == {0, 1}
        rng = np.random.default_rng((0, 0, number))
        rng.integers(len(CLASSES))
        bare = crop_photograph(part_of(mask.train).backgrounds, SIZE, rng)
        changed = (np.asarray(image) != np.asarray(bare)).any(axis=-1)
        # The rim of an object is softened over a few pixels.
        grown = np.asarray(Image.fromarray(inside).filter(ImageFilter.MaxFilter(7)))
        assert not changed[grown == 0].any()
        assert changed[inside > 0].mean() > 0.95


def test_objects_cover_the_wanted_share(stamps):
    for low, high in ((0.02, 0.04), (0.1, 0.2)):
        train = stamps(task="mask", min_share=low, max_share=high).build(0).train
        shares = [train[number][1].mean() for number in range(40)]
        assert 0.8 * low < min(shares)
        assert max(shares) < 1.2 * high


def test_clutter_is_of_no_class_and_part_of_the_mask(stamps):
    shares = []
    for clutter in (0, 3):
        train = stamps(task="mask", clutter=clutter).build(0).train
        shares.append(np.mean([train[number][1].mean() for number in range(20)]))
    assert shares[1] > 2 * shares[0]
    names = [cutout.name for cutout in part_of(train).others]
    assert names
    assert all(name.startswith(("people/", "animals/insects/")) for name in names)


def square(colour: tuple[int, int, int]) -> Cutout:
    picture = Image.new("RGBA", (40, 40), (*colour, 255))
    return Cutout(name="square", digest="", area=1600.0, picture=picture)


def test_nothing_covers_the_object_of_the_class():
    grey = Background(digest="", picture=Image.new("RGB", (200, 200), (90, 90, 90)))
    part = StampPart(by_class=[[square((0, 255, 0))]], others=[square((255, 0, 0))],
                     backgrounds=[grey])  # fmt: skip
    pictures = StampPictures(
        part, num_pictures=20, seed=(0,), img_size=SIZE, share=(0.25, 0.25), clutter=6
    )
    for number in range(20):
        pixels = np.asarray(pictures.compose(number)[0])
        green = (pixels[..., 1] > 200) & (pixels[..., 0] < 50)
        assert green.mean() == pytest.approx(0.25, rel=0.1)


def test_a_part_has_at_least_one_of_three_items_and_the_wanted_fractions_of_many():
    assert deal([1, 2, 3], "items") == {"training": [3], "validation": [1], "test": [2]}
    dealt = deal(range(24), "items", val_every=6, test_every=3)
    assert [len(dealt[part]) for part in PARTS] == [12, 4, 8]


def test_only_solid_stamps_have_an_outline():
    solid, line, speck = (np.zeros((300, 300), np.uint8) for _ in range(3))
    solid[100:130, 100:130] = 255
    line[100:103] = 255
    speck[100:128, 100:128] = 255
    flame = np.where(solid > 0, 200, 0)
    outlined = [has_outline(alpha) for alpha in (solid, line, speck, flame)]
    assert outlined == [True, False, False, False]


def test_mask_is_where_at_least_half_is_the_object():
    scene = Image.new("RGB", (7, 3), (10, 20, 30))
    sprite = Image.new("RGBA", (5, 1), (200, 100, 50))
    sprite.putalpha(Image.fromarray(np.array([[0, 1, 127, 128, 255]], np.uint8)))
    annotation = np.zeros((3, 7), np.uint8)

    paste_sprite(scene, annotation, sprite, (1, 1), 255)

    expected = np.zeros((3, 7), np.uint8)
    expected[1, 4:6] = 255
    np.testing.assert_array_equal(annotation, expected)
    pixels = np.asarray(scene).reshape(-1, 3)
    assert pixels[7 + 5].tolist() == [200, 100, 50]
    assert pixels[7 + 3].tolist() == pytest.approx([105, 60, 40], abs=1)
    untouched = np.delete(pixels, [7 + 2, 7 + 3, 7 + 4, 7 + 5], axis=0)
    assert np.unique(untouched, axis=0).tolist() == [[10, 20, 30]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "count"}, "task must be one of category, mask, got 'count'"),
        ({"val": "train"}, "val must be one of val, test, got 'train'"),
        ({"train_size": 0}, "train_size must be an integer of at least 1, got 0"),
        ({"val_size": 0}, "val_size must be an integer of at least 1, got 0"),
        ({"img_size": 31}, r"img_size must lie in \[32, 1024\], got 31"),
        ({"min_share": 0.0}, r"min_share and max_share must lie in \(0, 0.5\].* got 0.0 and 0.3"),
        ({"max_share": 0.6}, "must lie in .* got 0.05 and 0.6"),
        ({"min_share": 0.4}, "the first not above the second, got 0.4 and 0.3"),
        ({"clutter": -1}, "clutter must be an integer of at least 0, got -1"),
        ({"split_seed": -1}, "split_seed must be an integer of at least 0, got -1"),
        ({"backgrounds": []}, r"backgrounds must name at least one file or folder, got \[\]"),
    ],
)
def test_impossible_settings_raise_when_they_are_written(stamps, fields, message):
    with pytest.raises(ValueError, match=message):
        stamps(**fields)


def test_missing_packages_and_poor_folders_are_named(stamps, stamp_folder, tmp_path):
    nowhere = str(tmp_path / "nowhere")
    for fields, message in (
        ({"stamps": nowhere}, "^data.stamps: .*install the Debian package tuxpaint-stamps-default"),
        (
            {"backgrounds": [nowhere]},
            "^data.backgrounds: .*/nowhere is missing; install the Debian packages mate-backgr",
        ),
        (
            {"stamps": str(stamp_folder / "animals" / "birds")},
            "at least 2 folders of 5 or more photographed objects, got 0",
        ),
        ({"backgrounds": [str(BACKGROUNDS / "grass.jpg")]}, "3 at least, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            stamps(**fields).build(0)


def test_clutter_needs_objects_of_no_class(stamps, stamp_folder, tmp_path):
    for name in ("animals/birds", "food"):
        copytree(stamp_folder / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"data\.clutter, objects of no class: .* got 0"):
        stamps(stamps=str(tmp_path), clutter=1).build(0)
