"""Images of more than 8 bits: one rule for all files of a set, and wherever a run reads images."""

import io
import logging
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from tokendial.data import ImageError, ImageFolder, Unlabelled, WebDataset, read_image
from tokendial.data.readers.images import decode_image


def tiff(values, *, white_is_zero=False, orientation=1):
    """Bytes of an uncompressed grey TIFF of any number type, also types that Pillow lacks."""
    height, width = values.shape
    bits, sample = 8 * values.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, int(not white_is_zero))]
    tags += [(273, 8), (274, orientation), (277, 1), (278, height), (279, len(data)), (339, sample)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    return head + entries + bytes(4)


def greys(values, value_range=None, **kwargs):
    """Read a TIFF of one row of values; return its grey levels."""
    data = tiff(np.atleast_2d(values), **kwargs)
    return np.asarray(decode_image(data, "x.tif", value_range=value_range))[..., 0].tolist()[0]


@pytest.mark.parametrize(
    ("values", "value_range", "expected"),
    [
        (np.uint16([0, 2048, 4095]), None, [0, 8, 16]),
        (np.uint16([0, 2048, 4095]), (0, 4095), [0, 128, 255]),
        (np.uint16([0, 257, 65535]), None, [0, 1, 255]),
        (np.uint16([100, 200, 300]), "image", [0, 128, 255]),
        (np.int16([-32768, 0, 32767]), None, [0, 128, 255]),
        (np.int16([-2000, -1000, 0, 1000, 2000]), (-1000, 1000), [0, 0, 128, 255, 255]),
        (np.int8([-128, 0, 127]), None, [0, 128, 255]),
        (np.uint32([0, 100, 255]), (0, 255), [0, 100, 255]),
        (np.uint32([0, 2**31, 2**32 - 1]), (0, 2**32 - 1), [0, 128, 255]),
        (np.int32([-100, 0, 100]), (-100, 100), [0, 128, 255]),
        (np.float32([0, 0.25, 1]), None, [0, 64, 255]),
        (np.float32([0, 100, 255]), (0, 255), [0, 100, 255]),
        (np.float32([3, np.nan, np.inf, 5]), "image", [0, 0, 0, 255]),
    ],
    ids=str,
)
def test_values_are_scaled_by_the_type_or_by_a_range(values, value_range, expected):
    assert greys(values, value_range) == expected


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_zero_may_be_white(kind):
    top = 1 if kind is np.float32 else np.iinfo(kind).max
    values = np.array([0, top, np.nan if kind is np.float32 else top], kind)
    assert greys(values, white_is_zero=True) == [255, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.uint32([0, 254]), r"32-bit integers from 0 to 254: say which .*data.range=\[0,255\]"),
        (np.int32([-3, 3000]), r"32-bit integers from -3 to 3000: .*data.range=\[-3,3000\]"),
        (np.float32([0, 900]), r"numbers from 0 to 900, not 0 to 1: .*data.range=\[0,1023\]"),
    ],
)
def test_values_without_a_default_range_are_an_error(values, message):
    with pytest.raises(ImageError, match=f"^x.tif holds .*{message}"):
        greys(values)


def test_eight_bits_are_read_as_they_are_whatever_the_range(tmp_path):
    Image.fromarray(np.uint8([[0, 15, 255]])).save(tmp_path / "a.png")
    seen = np.asarray(read_image(tmp_path / "a.png", (0, 4095)))
    assert seen[0, :, 0].tolist() == [0, 15, 255]


def test_a_range_does_not_apply_to_16_bit_colours(tmp_path):
    """Pillow does not read their lower 8 bits."""
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 1 1 65535\n" + struct.pack(">HHH", 65535, 2570, 0))
    assert read_image(path).getpixel((0, 0)) == (255, 10, 0)
    Image.new("RGB", (1, 1)).save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    deep = png[:24] + b"\x10" + png[25:]  # the header says 16 bits
    deep = deep[:29] + struct.pack(">I", zlib.crc32(deep[12:29])) + deep[33:]
    with pytest.raises(
        ImageError, match="a.png has 16 bits per colour channel, of which 8 are read"
    ):
        decode_image(deep, "a.png", value_range=(0, 4095))


def test_a_rotated_tiff_is_turned_upright(tmp_path):
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 8)
    (tmp_path / "a.tif").write_bytes(tiff(pixels, orientation=6))
    seen = np.asarray(read_image(tmp_path / "a.tif"))[..., 0]
    assert np.array_equal(seen, np.rot90(pixels, -1))


def deep(value, kind=np.uint16):
    file = io.BytesIO()
    Image.fromarray(np.array([[0, value]], kind)).save(file, "TIFF")
    return file.getvalue()


def image_folder(root, data, value_range):
    for split in ("train", "val"):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            (root / split / label / "1.tif").write_bytes(data)
    return ImageFolder(root=str(root), range=value_range)


def unlabelled(root, data, value_range):
    for name in "ab":
        (root / f"{name}.tif").write_bytes(data)
    return Unlabelled(root=str(root), range=value_range)


def shards(root, data, value_range):
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, content in (("1.tif", data), ("1.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    pattern = str(root / "a.tar")
    return WebDataset(train=pattern, val=pattern, classes=2, range=value_range)


@pytest.mark.parametrize("make", [image_folder, unlabelled, shards])
def test_a_set_has_one_range_and_warns_of_another(tmp_path, caplog, make):
    for name in ("plain", "ranged", "broken", "wide"):
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        splits = make(tmp_path / "ranged", deep(4095), (0, 4095)).build(0)
        make(tmp_path / "wide", deep(40000), None).build(0)
    assert not caplog.messages
    assert np.asarray(splits.val[0][0])[0, :, 0].tolist() == [0, 255]
    splits = make(tmp_path / "plain", deep(4095), None).build(0)
    assert "lie between 0 and 4095, but black is 0 and white is 65535" in caplog.text
    assert "data.range=[0,4095] would fit" in caplog.text
    assert np.asarray(splits.train[0][0])[0, :, 0].tolist() == [0, 16]
    with pytest.raises(ValueError, match=r"^data: .* holds 32-bit integers from 0 to 7: say"):
        make(tmp_path / "broken", deep(7, np.int32), None).build(0)


@pytest.mark.parametrize("bad", [(5, 5), (0, float("nan")), "each"])
def test_a_range_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="^range must be two rising numbers"):
        ImageFolder(root="x", range=bad)
