"""Mask files of many kinds: how each is read, alone and together with others of a set."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tokendial.cli import app
from tokendial.data import ImageError, Pairs
from tokendial.data.check import check_pairs
from tokendial.data.readers.binary_masks import read_binary_mask
from tokendial.data.readers.class_masks import palette_colours, read_class_mask

SHAPE = (12, 16)
OBJECT = np.zeros(SHAPE, np.uint8)
OBJECT[3:9, 4:12] = 1
RING = np.zeros(SHAPE, bool)
RING[2:10, 3:13] = True
RING &= OBJECT == 0
EMPTY = np.zeros(SHAPE, np.uint8)


def grey(inside, outside=0, kind=np.uint8, of=OBJECT):
    return Image.fromarray(np.where(of > 0, inside, outside).astype(kind))


def colours(inside, outside):
    return Image.fromarray(np.where(OBJECT[..., None] > 0, inside, outside).astype(np.uint8))


def palette(inside, outside, *, index=1):
    """An image with a palette in which the object has an index."""
    image = Image.fromarray(np.where(OBJECT > 0, index, 1 - index).astype(np.uint8), mode="P")
    image.putpalette([*inside, *outside] if index == 0 else [*outside, *inside])
    return image


def soft(colour=(255, 255, 255)):
    """A mask with soft borders."""
    blurred = grey(255).resize((64, 48), Image.Resampling.BICUBIC).resize(SHAPE[::-1])
    levels = np.asarray(blurred)[..., None] / 255
    return Image.fromarray((levels * colour).round().astype(np.uint8))


BLACK, WHITE, RED, BLUE, CLEAR = (0, 0, 0), (255,) * 3, (255, 0, 0), (0, 0, 255), (0, 0, 0, 0)


@pytest.mark.parametrize(
    "image",
    [
        colours((*WHITE, 255), CLEAR),
        colours((*BLACK, 255), CLEAR),
        colours((*RED, 255), (*RED, 0)),
        colours(RED, BLACK),
        colours(BLUE, BLACK),
        colours((*BLUE, 255), (*BLACK, 255)),
        soft(RED),
        soft(),
        palette((128, 0, 0), BLACK),
        palette(WHITE, BLACK, index=0),
        palette((250, 250, 250), (5, 5, 5), index=0),
        grey(2),
        grey(100),
        grey(1),
        grey(252, 3),
        grey(4095, kind=np.uint16),
        grey(65535, kind=np.uint16),
        grey(1, kind=np.float32),
        grey(0.5, kind=np.float32),
        grey(True, kind=bool),
    ],
    ids=[
        "white in alpha",
        "black in alpha",
        "red in alpha",
        "red",
        "blue",
        "blue, opaque",
        "soft red",
        "soft grey",
        "dark red of a palette",
        "white is index 0",
        "quantised",
        "0 and 2",
        "0 and 100",
        "0 and 1",
        "3 and 252",
        "12 bits",
        "16 bits",
        "float",
        "half",
        "bits",
    ],
)
def test_the_object_is_inside_whatever_stands_for_it(tmp_path, image):
    path = tmp_path / ("mask.tif" if image.mode == "F" else "mask.png")
    image.save(path)
    np.testing.assert_array_equal(read_binary_mask(path), OBJECT)


def test_a_transparent_palette_entry_is_outside(tmp_path):
    palette(RED, RED).save(tmp_path / "mask.png", transparency=0)
    np.testing.assert_array_equal(read_binary_mask(tmp_path / "mask.png"), OBJECT)


def with_void(inside, void):
    values = np.where(OBJECT > 0, inside, 0).astype(np.uint8)
    values[RING] = void
    return values


def voc(values):
    image = Image.fromarray(values, mode="P")
    table = np.zeros((256, 3), np.uint8)
    table[:21] = palette_colours("voc")[0]
    table[255] = 224, 224, 192
    image.putpalette(table.flatten().tolist())
    return image


@pytest.mark.parametrize(
    ("image", "message", "ignore"),
    [
        (
            Image.fromarray(with_void(1, 255)),
            r"have 0, 1 and 255 .*data.mask=\[1\] data.ignore=255; .*data.mask=half",
            255,
        ),
        (
            voc(with_void(15, 255)),
            r"have 0, \[192,128,128\] and \[224,224,192\] .*data.ignore=\[224,224,192\]",
            255,
        ),
        (voc(with_void(15, 255)), r"several ways", (224, 224, 192)),
        (voc(with_void(15, 255)).convert("RGB"), r"several ways", (224, 224, 192)),
    ],
)
def test_a_ring_of_a_third_value_is_an_error_and_can_be_ignored(tmp_path, image, message, ignore):
    image.save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=message):
        read_binary_mask(tmp_path / "mask.png")
    read = read_binary_mask(tmp_path / "mask.png", ignore=ignore)
    np.testing.assert_array_equal(read, np.where(RING, 255, OBJECT))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (grey(2, 1), r"have 1 and 2 .*data.mask=\[1\]; data.mask=\[2\]"),
        (colours(RED, WHITE), r"have 255 and \[255,0,0\] .*data.mask=\[255\]; data.mask=\[\[255,0"),
        (Image.fromarray(np.uint8([[0, 1, 2, 3, 4]])), r"data.mask=nonzero.*data.classes="),
        (Image.fromarray(np.uint8([[0, 1, 2, 255]])), r"several ways"),
        (Image.fromarray(np.uint8([[0, 128, 255]])), r"data.mask=\[255\] data.ignore=128"),
        (
            Image.fromarray(np.uint8([[(*RED, 255), (*BLUE, 255), CLEAR]])),
            r"both transparency and colour vary in .*mask.png: data.mask=alpha",
        ),
    ],
    ids=["1 and 2", "red and white", "indices", "indices and void", "trimap", "alpha and colour"],
)
def test_an_ambiguous_mask_is_an_error_that_lists_the_readings(tmp_path, image, message):
    image.save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=message) as caught:
        read_binary_mask(tmp_path / "mask.png")
    assert "\n" not in str(caught.value)


def save(root, split, **masks):
    """Write pairs of a split with black images."""
    for name, mask in masks.items():
        image = Image.new("RGB", mask.size)
        for folder, file in (("images", image), ("annotations", mask)):
            path = root / folder / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            file.save(path)


@pytest.fixture
def root(tmp_path):
    """Training masks with the values {0, 2}, and an empty validation mask."""
    save(tmp_path, "training", a=grey(2), b=grey(0))
    save(tmp_path, "validation", a=grey(0))
    return tmp_path


def masks_of(split):
    return [split[index][1] for index in range(len(split))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, OBJECT),
        ({"mask": "nonzero"}, OBJECT),
        ({"mask": [2]}, OBJECT),
        ({"mask": [0]}, 1 - OBJECT),
        ({"mask": "half"}, EMPTY),
        ({"mask": [0], "ignore": 2}, np.where(OBJECT > 0, 255, 1)),
    ],
    ids=str,
)
def test_the_field_mask_chooses_the_reading(root, settings, expected):
    masks = masks_of(Pairs(root=str(root), **settings).build(0).train)
    np.testing.assert_array_equal(masks[0], expected)


def test_indices_of_a_palette_and_colours_may_be_named(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path, split, a=voc(with_void(15, 7)))
    for named in ([15], [(192, 128, 128)]):
        train = Pairs(root=str(tmp_path), mask=named).build(0).train
        np.testing.assert_array_equal(train[0][1], OBJECT)


def test_one_reading_holds_for_all_masks_of_a_root(root):
    save(root, "validation", b=grey(255))
    with pytest.raises(
        ValueError, match=r"^data: .*: binary masks have 0, 2 and 255 \(such as .*b"
    ):
        Pairs(root=str(root)).build(0)
    splits = Pairs(root=str(root), mask="nonzero").build(0)
    assert [mask.sum() for mask in masks_of(splits.train)] == [OBJECT.sum(), 0]
    assert [mask.sum() for mask in masks_of(splits.val)] == [0, OBJECT.sum()]


def test_roots_are_read_each_for_itself(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for split in ("training", "validation"):
        save(other, split, z=grey(255))
    train = Pairs(root=[str(root), str(other)]).build(0).train
    assert [mask.sum() for mask in masks_of(train)] == [OBJECT.sum(), 0, OBJECT.sum()]


def test_a_mask_of_small_values_among_soft_masks_is_an_error(tmp_path):
    save(tmp_path, "training", a=soft(), b=grey(1))
    save(tmp_path, "validation", a=soft())
    train = Pairs(root=str(tmp_path)).build(0).train
    np.testing.assert_array_equal(train[0][1], OBJECT)
    with pytest.raises(ImageError, match=r"b.png has the values 0 and 1, but .*data.mask=half"):
        train[1]
    train = Pairs(root=str(tmp_path), broken="skip").build(0).train
    assert len(train) == 1


def test_new_files_do_not_change_how_masks_are_read(root):
    train = Pairs(root=str(root)).build(0).train
    grey(1).save(root / "annotations" / "training" / "b.png")
    with pytest.raises(ImageError, match=r"b.png has 1, but masks of its set have 0 and 2"):
        train[1]


def test_check_reports_splits_whose_masks_are_all_empty_or_full(root, caplog):
    notes = []
    problems = list(check_pairs(Pairs(root=str(root)), root, notes))
    assert problems == [f"{root / 'annotations' / 'validation'}: all masks are empty"]
    half = OBJECT.sum() / OBJECT.size / 2
    assert notes == [
        "inside are pixels of value 2",
        f"training: {half:.1%} of the pixels are inside; 1 of 2 masks empty, 0 full",
        "validation: 0.0% of the pixels are inside; 1 of 1 mask empty, 0 full",
    ]
    problems = list(check_pairs(Pairs(root=str(root), mask=[0, 2]), root))
    assert [problem.partition(": ")[2] for problem in problems] == ["all masks are full"] * 2
    (root / "annotations" / "training" / "a.png").unlink()
    (root / "images" / "training" / "a.png").unlink()
    Pairs(root=str(root)).build(0)
    assert f"all masks in {root} are empty" in caplog.text


def test_data_check_takes_the_mask_settings_of_a_recipe(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path, split, a=Image.fromarray(with_void(1, 255)))
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path)])
    assert done.exit_code == 1
    assert "data.mask=[1] data.ignore=255" in done.output
    done = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--ignore", "255"])
    assert done.exit_code == 0, done.output
    share = OBJECT.sum() / (OBJECT.size - RING.sum())
    assert f"training: {share:.1%} of the pixels are inside" in done.output


@pytest.mark.parametrize("orientation", [3, 6])
def test_image_and_mask_are_turned_alike(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            (tmp_path / folder / split).mkdir(parents=True)
            path = tmp_path / folder / split / "a.png"
            grey(255, of=np.tri(*SHAPE)).save(path, exif=exif)
    image, mask = Pairs(root=str(tmp_path)).build(0).train[0]
    assert np.array_equal(np.asarray(image)[..., 0], mask * 255)
    turns = {3: 2, 6: -1}[orientation]
    assert np.array_equal(mask, np.rot90(np.tri(*SHAPE, dtype=np.uint8), turns))


def test_a_rotated_tiff_has_the_size_of_its_mask(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path, split, a=grey(255))
        (tmp_path / "images" / split / "a.png").unlink()
        lying = Image.fromarray(np.zeros(SHAPE[::-1], np.uint8))
        lying.save(tmp_path / "images" / split / "a.tif", tiffinfo={274: 6})
    image, mask = Pairs(root=str(tmp_path)).build(0).train[0]
    assert image.size == mask.shape[::-1]


CLASSES = np.uint8([[0, 1, 2, 255]])


def png(values, bits):
    """Bytes of a grey PNG of one row with 1, 2 or 4 bits, which Pillow cannot write."""
    row = "".join(f"{value:0{bits}b}" for value in values)
    data = int(row, 2).to_bytes(len(row) // 8, "big")

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(b"\0" + data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(CLASSES), "png"),
        (Image.fromarray(CLASSES).convert("RGB"), "png"),
        (Image.fromarray(CLASSES).convert("LA"), "png"),
        (Image.fromarray(CLASSES).convert("RGBA"), "png"),
        (Image.fromarray(CLASSES.astype(np.float32)), "tif"),
        (Image.fromarray(CLASSES.astype(np.int32)), "tif"),
        (Image.fromarray(CLASSES.astype(np.uint16)), "png"),
        (voc(CLASSES), "png"),
    ],
    ids=["grey", "RGB", "LA", "RGBA", "float", "32 bits", "16 bits", "palette"],
)
def test_indices_of_classes_are_read_from_any_kind_of_file(tmp_path, image, suffix):
    image.save(path := tmp_path / f"mask.{suffix}")
    assert read_class_mask(path, 3).tolist() == CLASSES.tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_are_indices_too(tmp_path, bits):
    path = tmp_path / "mask.png"
    path.write_bytes(png([0, 3, 1, 2], bits))
    assert read_class_mask(path, 4).tolist() == [[0, 3, 1, 2]]


@pytest.mark.parametrize(
    ("settings", "image", "expected"),
    [
        ({"classes": 21, "palette": "voc"}, voc(np.uint8([[0, 1, 20, 255]])), [0, 1, 20, 255]),
        (
            {"classes": 21, "palette": "voc"},
            voc(np.uint8([[0, 1, 20, 255]])).convert("RGBA"),
            [0, 1, 20, 255],
        ),
        (
            {"classes": 20, "palette": "voc", "ignore_zero": True},
            voc(np.uint8([[0, 1, 20, 255]])).convert("RGB"),
            [255, 0, 19, 255],
        ),
        (
            {"classes": 19, "palette": "cityscapes"},
            Image.fromarray(np.uint8([[(128, 64, 128), (119, 11, 32), (0, 0, 0), (81, 0, 81)]])),
            [0, 18, 255, 255],
        ),
        (
            {"classes": 2, "palette": [WHITE, RED], "ignore": BLUE},
            Image.fromarray(np.uint8([[WHITE, RED, BLUE, RED]])),
            [0, 1, 255, 1],
        ),
        ({"classes": 3, "ignore": 2}, Image.fromarray(CLASSES), [0, 1, 255, 255]),
    ],
    ids=["indices of voc", "colours of voc", "voc without ground", "cityscapes", "own", "ignored"],
)
def test_colours_of_a_palette_are_classes(tmp_path, settings, image, expected):
    for split in ("training", "validation"):
        save(tmp_path, split, a=image)
    data = Pairs(root=str(tmp_path), **settings)
    assert data.build(0).train[0][1].tolist() == [expected]
    assert list(check_pairs(data, tmp_path)) == []


@pytest.mark.parametrize(
    ("image", "palette", "message"),
    [
        (colours(RED, BLACK), None, r"has colours such as \[255,0,0\], but must hold .*palette"),
        (colours(RED, BLUE), [BLUE, WHITE], r"colour \[255,0,0\], which .*: 48\)"),
        (grey(0.5, kind=np.float32), None, "must hold class indices, but has fractions"),
    ],
)
def test_a_value_that_is_no_class_is_an_error(tmp_path, image, palette, message):
    image.save(path := tmp_path / "mask.tif")
    with pytest.raises(ImageError, match=message):
        read_class_mask(path, 2, palette=palette)
