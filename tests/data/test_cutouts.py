import json
from pathlib import Path

import build_cutouts
import numpy as np
import pytest
from build_cutouts import CATEGORIES, PARTS, TASKS, compose, item_paths, item_rng, label_of
from layouts import garments, write_stamp
from PIL import Image, ImageFilter
from recolour import from_lab, recoloured, to_lab

from tokendial.data.readers.stamps import deal, load_backgrounds, load_cutouts
from tokendial.data.sets.stamp_scenes import crop_photograph

ASSETS = Path(__file__).parents[2] / "src" / "tokendial" / "assets"
SIZE = 64
COUNTS = {"training": 2, "validation": 1, "test": 1}


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """Five garments for each category, and two files to be left out: a drawing and a copy."""
    folder = tmp_path_factory.mktemp("stamps")
    for kind, folders in enumerate(CATEGORIES.values()):
        for number, item in enumerate(garments(kind)[:5]):
            write_stamp(folder / folders[0] / f"{number}.png", item)
    write_stamp(folder / "animals/birds/cartoon/drawn.png", garments(0)[0])
    write_stamp(folder / "people/copy.png", garments(0)[0])
    return folder


@pytest.fixture(scope="module")
def cutouts(stamps):
    return build_cutouts.deal_cutouts(load_cutouts(stamps, SIZE, setting="--stamps"))


@pytest.fixture(scope="module")
def backgrounds():
    found = load_backgrounds([ASSETS / "backgrounds"], SIZE, setting="--backgrounds")
    return deal(found, "photographs")


def composed(task, cutouts, backgrounds, index, *, seed=0, split="training"):
    rng = item_rng(seed, task, split, index)
    image, annotation = compose(task, rng, cutouts[split], backgrounds[split], SIZE)
    return np.asarray(image), annotation


def bare(task, backgrounds, index):
    """The background of a picture before objects are placed on it."""
    rng = item_rng(0, task, "training", index)
    return np.asarray(crop_photograph(backgrounds["training"], SIZE, rng))


def grown(mask, pixels):
    return np.asarray(Image.fromarray(mask).filter(ImageFilter.MaxFilter(2 * pixels + 1)))


def test_photographs_are_taken_once_and_drawings_left_out(stamps):
    assert len(load_cutouts(stamps, SIZE, setting="--stamps")) == 5 * len(CATEGORIES)


def test_each_object_and_each_photograph_is_in_one_split(stamps, cutouts, backgrounds):
    for parts in (cutouts, backgrounds):
        digests = [item.digest for split in PARTS for item in parts[split]]
        assert len(digests) == len(set(digests))
    assert sum(map(len, cutouts.values())) == 5 * len(CATEGORIES)
    assert {split: len(part) for split, part in backgrounds.items()} == {
        "training": 6,
        "validation": 1,
        "test": 1,
    }


def test_each_category_is_in_each_split(cutouts):
    for split, number in (("training", 3), ("validation", 1), ("test", 1)):
        labels = np.bincount([label_of(cutout.name) for cutout in cutouts[split]], minlength=11)
        assert labels.tolist() == [0] + [number] * len(CATEGORIES)


@pytest.mark.parametrize("task", TASKS)
def test_pixels_change_where_the_mask_is_and_nowhere_else(task, cutouts, backgrounds):
    for index in range(10):
        image, annotation = composed(task, cutouts, backgrounds, index)
        changed = (image != bare(task, backgrounds, index)).any(axis=-1)
        assert annotation.any()
        # The rim of an object is softened over a few pixels.
        assert not changed[grown(annotation, 3) == 0].any()
        assert changed[annotation > 0].mean() > 0.95


def test_binary_tasks_hold_0_and_255_and_semantic_the_labels(cutouts, backgrounds):
    for task in TASKS:
        found = {
            int(value)
            for index in range(20)
            for value in np.unique(composed(task, cutouts, backgrounds, index)[1])
        }
        assert found == (set(range(11)) if task == "semantic" else {0, 255})


@pytest.mark.parametrize("task", TASKS)
def test_an_item_depends_on_seed_task_split_and_index_alone(task, cutouts, backgrounds):
    first = composed(task, cutouts, backgrounds, 3)
    again = composed(task, cutouts, backgrounds, 3)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    for other in ({"index": 4}, {"seed": 1}, {"split": "test"}):
        image, _ = composed(task, cutouts, backgrounds, **{"index": 3} | other)
        assert (image != first[0]).any()


def test_camouflage_brings_the_mean_colour_to_the_grounds(cutouts, backgrounds):
    ground = np.asarray(backgrounds["training"][0].picture)
    for cutout in cutouts["training"][:10]:
        sprite = cutout.picture
        under = ground[: sprite.height, : sprite.width]
        solid = np.asarray(sprite)[..., 3] >= 128
        target = to_lab(under)[solid].mean(axis=0)

        hidden = recoloured(sprite, under, 0.9)

        before, after = (
            np.linalg.norm(to_lab(np.asarray(it)[..., :3])[solid].mean(axis=0) - target)
            for it in (sprite, hidden)
        )
        assert after < 0.3 * before
        assert (np.asarray(hidden)[..., 3] == np.asarray(sprite)[..., 3]).all()


def test_strength_zero_leaves_the_colours():
    sprite = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 4), np.uint8))
    ground = np.full((9, 9, 3), 120, np.uint8)
    same = np.asarray(recoloured(sprite, ground, 0.0))
    np.testing.assert_allclose(same.astype(int), np.asarray(sprite), atol=1)


def test_lab_of_known_colours():
    """White, black, and sRGB red as CIE's formulas give it for D65."""
    rgb = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8)
    expected = [[100.0, 0.0, 0.0], [0.0, 0.0, 0.0], [53.24, 80.09, 67.20]]
    np.testing.assert_allclose(to_lab(rgb), expected, atol=0.05)
    np.testing.assert_array_equal(from_lab(to_lab(rgb)), rgb)


def run(folder, stamps, *more):
    build_cutouts.main(
        [
            *("--out", str(folder), "--stamps", str(stamps), "--size", str(SIZE)),
            *("--backgrounds", str(ASSETS / "backgrounds")),
            *("--train", "2", "--val", "1", "--test", "1", *more),
        ]
    )


def test_a_run_writes_ade20ks_layout_and_a_second_skips_what_is_there(stamps, tmp_path, capsys):
    run(tmp_path, stamps, "--sheet")
    for task in TASKS:
        root = tmp_path / task
        for split, count in COUNTS.items():
            for index in range(count):
                image_path, annotation_path = item_paths(root, split, index)
                with Image.open(image_path) as image, Image.open(annotation_path) as annotation:
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
                    assert (annotation.format, annotation.mode) == ("PNG", "L")
                    assert annotation.size == (SIZE, SIZE)
        assert (root / "sheet.png").exists()
    classes = json.loads((tmp_path / "semantic" / "classes.json").read_text())
    assert classes["0"] == "background"
    assert classes["10"] == "vehicle"
    lost, _ = item_paths(tmp_path / "saliency", "training", 1)
    content = lost.read_bytes()
    lost.unlink()
    capsys.readouterr()

    run(tmp_path, stamps)

    assert lost.read_bytes() == content
    out = capsys.readouterr().out
    assert "saliency: 1 built, 3 there already" in out
    assert "camouflage: 0 built, 4 there already" in out


def test_a_folder_with_other_settings_is_refused(stamps, tmp_path):
    run(tmp_path, stamps, "--task", "saliency")
    with pytest.raises(SystemExit, match=r"settings.json: seed is 0 there, got 5; a folder"):
        run(tmp_path, stamps, "--task", "saliency", "--seed", "5")


@pytest.mark.parametrize("size", ["31", "1025"])
def test_size_outside_its_range_is_refused(size, stamps, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, stamps, "--size", size)
    assert f"argument --size: must be in [32, 1024], got {size}." in capsys.readouterr().err


def test_missing_packages_are_named(stamps, tmp_path):
    with pytest.raises(SystemExit, match="install the Debian package tuxpaint-stamps-default"):
        run(tmp_path, tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="packages mate-backgrounds and plasma-workspace-wallp"):
        run(tmp_path, stamps, "--backgrounds", str(tmp_path / "nowhere"))


def test_too_few_photographs_are_refused(stamps, tmp_path):
    with pytest.raises(SystemExit, match="photographs: one for each split.* 3 at least, got 1"):
        run(tmp_path, stamps, "--backgrounds", str(ASSETS / "backgrounds" / "grass.jpg"))


def test_a_broken_stamp_is_named(tmp_path):
    (tmp_path / "food").mkdir()
    (tmp_path / "food" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"--stamps: .*broken.png cannot be decoded"):
        load_cutouts(tmp_path, SIZE, setting="--stamps")
