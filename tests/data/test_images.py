from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from tokendial.data.readers.images import (
    ImageError,
    TooManyPixelsError,
    check_image,
    decode_image,
    find_images,
    read_image,
)


def gradient(height: int = 6, width: int = 8) -> np.ndarray:
    return np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)


def test_sixteen_bit_greys_are_scaled_to_eight(tmp_path):
    Image.fromarray(gradient().astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.stack([gradient()] * 3, axis=-1))


def test_float_images_are_scaled_from_0_and_1(tmp_path):
    Image.fromarray(gradient().astype(np.float32) / 255).save(tmp_path / "float.tif")
    assert np.array_equal(np.asarray(read_image(tmp_path / "float.tif"))[..., 0], gradient())


def test_non_finite_pixels_are_black(tmp_path):
    Image.fromarray(np.float32([[np.nan, np.inf, -np.inf, 1.0]])).save(tmp_path / "float.tif")
    assert np.asarray(read_image(tmp_path / "float.tif"))[0, :, 0].tolist() == [0, 0, 0, 255]


def test_the_transparent_level_of_a_sixteen_bit_grey_is_white(tmp_path):
    pixels = np.array([[0x1234, 0x8080]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png", transparency=0x1234)
    assert np.asarray(read_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [255, 128]


def test_transparent_pixels_become_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    image = np.asarray(read_image(tmp_path / "alpha.png"))
    assert image[0, 0].tolist() == [10, 20, 30]
    assert image[1, 1].tolist() == [255, 255, 255]


def test_transparent_palette_entries_become_white(tmp_path):
    image = Image.fromarray(np.zeros((4, 4), np.uint8)).convert("P")
    image.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "palette.png")).min() == 255


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    red, green, blue = np.asarray(read_image(tmp_path / "print.jpg"))[4, 4].tolist()
    assert red > 200
    assert max(green, blue) < 60


def test_the_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


def photograph(path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jpg", b"not an image at all", "text.jpg is not an image"),
        ("empty.png", b"", "empty.png is empty"),
        ("missing.png", None, "no such image: .*missing.png"),
    ],
)
def test_the_error_for_an_unreadable_file_names_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=message):
        read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix, share):
    whole = photograph(tmp_path / f"whole.{suffix}")
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_an_image_above_pillows_limit_is_an_error(tmp_path, monkeypatch):
    photograph(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"huge.png has more than 200 pixels.*bomb"):
        read_image(tmp_path / "huge.png")


def test_a_warning_turned_into_an_error_names_the_file(tmp_path, monkeypatch):
    photograph(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ImageError, match="large.png cannot be decoded .*bomb"):
        read_image(tmp_path / "large.png")


def test_an_unfinished_tiff_directory_names_the_file(tmp_path):
    whole = photograph(tmp_path / "whole.tif")
    (tmp_path / "cut.tif").write_bytes(whole[:12])
    with pytest.raises(ImageError, match=r"cut\.tif"):
        read_image(tmp_path / "cut.tif")


def test_a_folder_named_like_an_image_is_not_one(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "a.png").write_bytes(b"")
    assert find_images(iter([tmp_path])) == [tmp_path / "folder.jpg" / "a.png"]


def test_folders_are_searched_and_sorted(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in find_images([tmp_path])]
    assert found == ["a/c.JPG", "b.png"]


def test_nothing_found_raises(tmp_path):
    with pytest.raises(ImageError, match="no images found in"):
        find_images([tmp_path])
    with pytest.raises(ImageError, match=f"no images found in {tmp_path}"):
        find_images(iter([tmp_path]))
    with pytest.raises(ImageError, match="no such image or folder: .*nowhere"):
        find_images([tmp_path / "nowhere"])


def png(**kwargs):
    file = BytesIO()
    Image.fromarray(gradient()).save(file, "PNG", **kwargs)
    return file.getvalue()


def test_max_pixels_is_the_largest_allowed_number():
    assert decode_image(png(), "some.png", max_pixels=48).size == (8, 6)
    with pytest.raises(TooManyPixelsError, match="some.png has 8 x 6 pixels, more than 47 in all"):
        decode_image(png(), "some.png", max_pixels=47)


def test_pixels_are_counted_by_the_header_before_anything_is_decoded():
    """The file ends where its pixel data would begin."""
    with pytest.raises(TooManyPixelsError):
        decode_image(png().partition(b"IDAT")[0] + b"IDAT", "bomb.png", max_pixels=47)


def test_other_formats_than_the_allowed_ones_are_not_opened():
    assert decode_image(png(), "some.png", formats=("PNG",)).size == (8, 6)
    with pytest.raises(ImageError, match="some.png is not an image"):
        decode_image(png(), "some.png", formats=("JPEG", "WEBP"))


def test_an_error_without_a_message_names_its_type(monkeypatch):
    def fails(image):
        raise MemoryError

    monkeypatch.setattr(ImageOps, "exif_transpose", fails)
    with pytest.raises(ImageError, match=r"some.png cannot be decoded \(MemoryError\)"):
        decode_image(png(), "some.png")


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}])
def test_check_image_refuses_what_read_image_refuses(tmp_path, settings):
    """Damaged photographs with EXIF data: the fast check refuses the same ones as the full read."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    photo = Image.effect_noise((48, 40), 60).convert("RGB")
    photo.save(path, exif=exif, **settings)
    whole = path.read_bytes()

    def refused(read):
        try:
            read(path)
        except ImageError as error:
            return str(error)
        return None

    found = []
    for number in range(60):
        data = bytearray(whole)
        if number % 2:
            data = data[: rng.integers(2, len(data))]
        else:
            data[rng.integers(2, len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        found.append((refused(check_image), refused(read_image)))
    assert all(quick == full for quick, full in found)
    assert 30 <= sum(full is not None for _, full in found) < 60


def test_only_pictures_are_opened_whatever_their_ending(tmp_path):
    """Pillow would pass PostScript to Ghostscript."""
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path, "EPS")
    with pytest.raises(ImageError, match="a.png is not an image"):
        read_image(path)
