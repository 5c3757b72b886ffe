"""Images and masks in two folders, and everything that can be wrong with them."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tokendial.cli import app
from tokendial.data import ImageError, Pairs
from tokendial.data.check import check_pairs
from tokendial.data.readers.binary_masks import read_binary_mask
from tokendial.data.readers.class_masks import read_class_mask

RNG = np.random.default_rng(0)


def write(root, split, stem, mask, *, size=None, image_suffix=".jpg", mask_suffix=".png"):
    height, width = size or np.asarray(mask).shape[:2]
    for folder in ("images", "annotations"):
        (root / folder / split / stem).parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 255, (height, width, 3), dtype=np.uint8)
    image = root / "images" / split / f"{stem}{image_suffix}"
    Image.fromarray(pixels).save(image)
    path = root / "annotations" / split / f"{stem}{mask_suffix}"
    (mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, np.uint8))).save(
        path
    )
    return image, path


def disc(height=20, width=30, *, inside=255):
    y, x = np.ogrid[:height, :width]
    return np.where((y - height / 2) ** 2 + (x - width / 2) ** 2 < 60, inside, 0).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    for split in ("training", "validation"):
        for stem in ("a", "b", "deep/c"):
            write(tmp_path, split, stem, disc())
    return tmp_path


def test_pairs_are_found_by_their_stems_in_all_roots(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for split in ("training", "validation"):
        write(other, split, "x", disc(), image_suffix=".png", mask_suffix=".tif")
    splits = Pairs(root=[str(root), str(other)]).build(0)
    assert (len(splits.train), len(splits.val)) == (4, 4)
    assert (splits.classes, splits.dense) == (("mask",), True)
    image, mask = splits.train[3]
    assert image.size == (30, 20)
    np.testing.assert_array_equal(mask, disc(inside=1))


@pytest.mark.parametrize(
    ("mask", "suffix"),
    [
        (Image.fromarray(disc()), ".png"),
        (Image.fromarray(disc(inside=1)), ".png"),
        (Image.fromarray(disc() > 0), ".png"),
        (Image.fromarray(disc()).convert("RGB"), ".png"),
        (Image.fromarray(disc().astype(np.uint16) * 257), ".png"),
        (Image.fromarray(disc(200, 300)), ".jpg"),
    ],
    ids=["255", "1", "bit", "rgb", "16 bits", "jpeg"],
)
def test_binary_masks_of_every_kind_are_read(tmp_path, mask, suffix):
    mask.save(tmp_path / f"mask{suffix}", quality=60) if suffix == ".jpg" else mask.save(
        tmp_path / f"mask{suffix}"
    )
    expected = disc(200, 300, inside=1) if suffix == ".jpg" else disc(inside=1)
    np.testing.assert_array_equal(read_binary_mask(tmp_path / f"mask{suffix}"), expected)


def test_an_empty_mask_stays_empty_despite_jpeg_noise(tmp_path):
    """The file is read together with other masks: alone it could be a mask of small values."""
    noise = Image.fromarray(RNG.integers(0, 6, (40, 40), dtype=np.uint8))
    write(tmp_path, "training", "empty", noise, size=(40, 40), mask_suffix=".jpg")
    for split in ("training", "validation"):
        write(tmp_path, split, "full", Image.fromarray(disc(200, 300)), mask_suffix=".jpg")
    train = Pairs(root=str(tmp_path)).build(0).train
    assert not train[0][1].any()
    np.testing.assert_array_equal(train[1][1], disc(200, 300, inside=1))
    with pytest.raises(ValueError, match="data.mask=nonzero .*data.mask=half"):
        read_binary_mask(tmp_path / "annotations" / "training" / "empty.jpg")


def test_a_palette_of_classes_counts_by_its_index(tmp_path):
    image = Image.fromarray(disc(inside=1), mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_binary_mask(tmp_path / "mask.png"), disc(inside=1))
    assert set(np.unique(read_class_mask(tmp_path / "mask.png", 2, ignore_zero=False))) == {0, 1}


def test_class_values_and_ignored_values(tmp_path):
    values = np.array([[0, 1, 150, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "mask.png")
    read = read_class_mask(tmp_path / "mask.png", 150, ignore_zero=True)
    assert read.tolist() == [[255, 0, 149, 255]]
    with pytest.raises(ImageError, match="has the value 150, but classes are 0 to 149 and 255 is"):
        read_class_mask(tmp_path / "mask.png", 150, ignore_zero=False)


def damage(root):
    """Add one of each problem: no mask, no image, other size, broken file, odd values."""
    (root / "annotations" / "training" / "a.png").unlink()
    (root / "images" / "validation" / "a.jpg").unlink()
    write(root, "training", "b", disc(), size=(10, 30))
    (root / "annotations" / "validation" / "b.png").write_bytes(b"no picture")
    odd = disc()
    odd[0, :3] = 7, 90, 200
    write(root, "validation", "deep/c", odd)


def test_check_lists_every_problem(root):
    damage(root)
    problems = "\n".join(check_pairs(Pairs(root=str(root)), root))
    assert "training/a.jpg has no mask" in problems
    assert "validation/a.png has no image" in problems
    assert "training/b.jpg has 30 x 10 pixels, but" in problems
    assert "validation/b.png is not an image" in problems
    assert "deep/c.png is not binary: it has 5 values (0, 7, 90, 200, 255)" in problems
    assert len(problems.splitlines()) == 5


def test_a_broken_pair_stops_the_run_or_is_skipped(root, caplog):
    damage(root)
    with pytest.raises(ValueError, match=r"training/a.jpg has no mask \(and 1 more problem\); "):
        Pairs(root=str(root)).build(0)
    whole = root / "images" / "validation" / "deep" / "c.jpg"
    whole.write_bytes(whole.read_bytes()[:-400])
    write(root, "validation", "d", disc())
    splits = Pairs(root=str(root), broken="skip").build(0)
    assert [pair[0].stem for pair in splits.train.pairs] == ["c"]
    assert [pair[0].stem for pair in splits.val.pairs] == ["d"]
    told = "\n".join(caplog.messages)
    for problem in (
        "training/a.jpg has no mask",
        "training/b.jpg has 30 x 10 pixels",
        "validation/b.png is not an image",
        "deep/c.jpg cannot be decoded",
    ):
        assert problem in told


def test_a_file_that_is_no_image_stops_the_run(root):
    (root / "annotations" / "validation" / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"data: .*validation/b.png is not an image; `tokendial"):
        Pairs(root=str(root)).build(0)


def test_the_command_line_checks_a_folder(root):
    done = CliRunner().invoke(app, ["data", "check", str(root)])
    part = disc().mean() / 255
    shares = [
        f"{root}: {split}: {part:.1%} of the pixels are inside; 0 of 3 masks empty, 0 full"
        for split in ("training", "validation")
    ]
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        f"{root}: inside are pixels of value 255",
        *shares,
        f"{root}: 6 pairs, no problems",
    ]
    damage(root)
    done = CliRunner().invoke(app, ["data", "check", str(root)])
    assert done.exit_code == 1
    assert len(done.output.splitlines()) == 9
    assert "inside are pixels brighter than half of the range" in done.output
    assert done.output.splitlines()[-1] == f"{root}: 4 pairs, 5 problems"


def test_an_upright_photograph_fits_its_mask(tmp_path):
    """A rotated camera stores a rotated image with an EXIF orientation."""
    image, _ = write(tmp_path, "training", "a", disc(30, 20), size=(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image).save(image, exif=exif)
    write(tmp_path, "validation", "a", disc())
    image, mask = Pairs(root=str(tmp_path)).build(0).train[0]
    assert image.size == mask.shape[::-1] == (20, 30)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda root: Pairs(root=str(root / "no")).build(0),
            "no such folder: .*no/images/training",
        ),
        (lambda root: Pairs(root=[]), "root must name at least one folder"),
        (lambda root: Pairs(root="x", classes=1), "classes must be at least 2, or null, got 1"),
        (lambda root: Pairs(root="x", ignore_zero=True), "ignore_zero must be false for binary"),
        (lambda root: Pairs(root="x", broken="maybe"), "broken must be one of error, skip"),
        (lambda root: Pairs(root="x", mask=[]), "mask must name at least one value"),
        (lambda root: Pairs(root="x", classes=2, mask="half"), "mask is for binary masks, but"),
        (
            lambda root: Pairs(root="x", palette="voc"),
            "palette is for masks of classes, but classes is null",
        ),
        (
            lambda root: Pairs(root="x", classes=20, palette="voc"),
            r"palette must have 20 colours \(one for each class\), got 21",
        ),
        (lambda root: Pairs(root="x", ignore=(0, 0, 256)), r"colours must lie in .*\[0, 0, 256\]"),
        (lambda root: Pairs(root="x", range=(3, 1)), "range must be two rising numbers"),
    ],
)
def test_mistakes_are_one_line(root, make, message):
    with pytest.raises(ValueError, match=message):
        make(root)


def test_two_files_of_one_name_are_reported_and_left_out(root, caplog):
    """It is unknown which of them belongs to the mask, or is the mask."""
    image, mask = write(root, "training", "a", disc(), image_suffix=".png", mask_suffix=".tif")
    first, second = root / "images/training/a.jpg", root / "annotations/training/a.png"
    with pytest.raises(ValueError, match=f"data: {second} and {mask} have one name .and 1 more"):
        Pairs(root=str(root)).build(0)
    found, problems = Pairs(root=str(root)).pairs(root, "training")
    assert problems == [f"{second} and {mask} have one name", f"{first} and {image} have one name"]
    assert [path.stem for path, _ in found] == ["b", "c"]
    assert len(Pairs(root=str(root), broken="skip").build(0).train) == 2


def test_names_of_pairs_are_the_same_in_both_forms_of_unicode(root):
    image, mask = write(root, "training", "x", disc())
    image.rename(image.with_name("caf\u00e9.jpg"))
    mask.rename(mask.with_name("cafe\u0301.png"))
    assert len(Pairs(root=str(root)).build(0).train) == 4


def test_files_left_out_of_pairs_are_logged(root, caplog):
    (root / "images/training/d.heic").write_bytes(b"")
    pages = [Image.fromarray(disc())] * 2
    pages[0].save(root / "images/training/e.tif", save_all=True, append_images=pages[1:])
    write(root, "training", "e", disc(), image_suffix=".gif")[0].unlink()
    Pairs(root=str(root)).build(0)
    assert caplog.messages == [
        f"{root}, training: left out 1 file without image endings: 1 .heic",
        f"{root}/images/training/e.tif holds 2 pictures, the first one is read",
    ]
