"""Pictures without labels: what they are made of, and what is left out because it is tested on."""

import json
from dataclasses import replace

import build_real_pictures
import numpy as np
import pytest
from build_real_pictures import KINDS, count_by_kind, photographs_of, training_cells, whole_cells
from layouts import BACKGROUNDS, write_elpv, write_images
from PIL import Image

from tokendial.data import ELPV, Stamps

SIZE = 64
CELLS = [f"images/cell{n:04}.png {n % 2}.0 {('mono', 'poly')[n // 2 % 2]}" for n in range(40)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, pieces):
    """A folder as scikit-image has one: photographs, a logo and a test file."""
    names = ("cat.png", "moon.png", "logo.png", "tests/other.png")
    return write_images(tmp_path_factory.mktemp("photographs"), pieces, names)


@pytest.fixture
def arguments(stamp_folder, photographs, tmp_path):
    return [
        *("--out", str(tmp_path / "out"), "--number", "11", "--size", str(SIZE)),
        *("--stamps", str(stamp_folder), "--backgrounds", str(BACKGROUNDS)),
        *("--wallpapers", str(photographs / "cat.png"), "--folder", str(photographs)),
    ]


@pytest.fixture
def run(arguments, tmp_path):
    """Function that runs the tool with some more options; returns the folder."""

    def run_tool(*more):
        build_real_pictures.main([*arguments, *more])
        return tmp_path / "out"

    return run_tool


def test_each_kind_has_its_folder_of_pictures(run, capsys):
    root = run()
    found = {path.name: len(list(path.glob("*.jpg"))) for path in root.iterdir() if path.is_dir()}
    assert found == {"stamps": 7, "wallpapers": 2, "photographs": 2}
    shown = set()
    for path in root.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
            shown.add(image.tobytes())
    assert len(shown) == 11
    assert "11 built, 0 there already" in capsys.readouterr().out
    noted = json.loads((root / "settings.json").read_text())
    assert noted["size"] == SIZE
    assert noted["stamps"] == 7


def test_a_second_run_builds_what_is_missing_as_it_was(run, capsys):
    root = run()
    lost = root / "stamps" / "stamps_000003.jpg"
    content = lost.read_bytes()
    lost.unlink()
    run()
    assert lost.read_bytes() == content
    assert "1 built, 10 there already" in capsys.readouterr().out


@pytest.mark.parametrize("more", [("--seed", "5"), ("--number", "12"), ("--folder", "MORE")])
def test_a_folder_with_other_settings_is_refused(run, more):
    run()
    with pytest.raises(SystemExit, match=r"settings.json: \w+ is .* there, got .*; a folder"):
        run(*(str(BACKGROUNDS) if word == "MORE" else word for word in more))


def test_objects_and_backgrounds_of_the_other_parts_are_left_out(stamp_folder, arguments):
    sources = build_real_pictures.sources_of(build_real_pictures.parser().parse_args(arguments))
    used = {digest for source in sources.values() for digest in source.digests}
    data = Stamps(
        img_size=SIZE, stamps=str(stamp_folder), backgrounds=[str(BACKGROUNDS)], clutter=1
    )
    for val in ("val", "test"):
        part = replace(data, val=val).build(0).val.pictures.part
        cutouts = [cutout for of_class in (*part.by_class, part.others) for cutout in of_class]
        assert len(cutouts) >= 4
        assert used.isdisjoint(item.digest for item in (*cutouts, *part.backgrounds))


def test_cells_of_the_test_set_are_left_out(tmp_path, pieces):
    write_elpv(tmp_path, pieces, CELLS)
    cells = training_cells(tmp_path, check=False)
    tested = {path for path, _ in ELPV(root=str(tmp_path), check=False).build(7).val.files}
    assert len(cells) + len(tested) == len(CELLS)
    assert len(tested) == 8
    assert tested.isdisjoint(cells)


def test_a_cell_is_shown_whole_and_once_before_any_is_repeated(tmp_path, pieces):
    write_elpv(tmp_path, pieces, CELLS)
    files = training_cells(tmp_path, check=False)
    compose = whole_cells(files, pieces.shape[1], seed=0)
    found = []
    for index in range(len(files)):
        shown = np.asarray(compose(np.random.default_rng(index), index))
        views = [shown, shown[::-1], shown[:, ::-1], shown[::-1, ::-1]]
        (number,) = {n for n in range(len(CELLS)) for view in views if (view == pieces[n]).all()}
        found.append(number)
    assert len(set(found)) == len(files)


def test_known_drawings_and_text_are_no_photographs(photographs):
    names = {path.name for path in photographs_of([photographs, BACKGROUNDS / "grass.jpg"])}
    assert names == {"cat.png", "moon.png", "grass.jpg"}


def test_numbers_of_the_kinds_add_up():
    assert count_by_kind(6000, list(KINDS)) == {
        "stamps": 2400,
        "wallpapers": 1200,
        "photographs": 1200,
        "cells": 1200,
    }
    assert sum(count_by_kind(17, ["stamps", "wallpapers"]).values()) == 17


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--stamps", "nowhere"), "error: data.stamps: nowhere holds no PNG files; install the D"),
        (("--wallpapers", "nowhere"), "error: --wallpapers: nowhere is missing; install the D"),
        (("--folder", "nowhere"), "error: --folder: no such file or folder: nowhere."),
        (("--elpv", "nowhere"), "error: data.root: no such folder: nowhere"),
    ],
)
def test_what_is_missing_is_one_line(run, more, message):
    with pytest.raises(SystemExit, match=message):
        run(*more)
