import hashlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import write_elpv

from tokendial.data import ELPV
from tokendial.data.sets import elpv
from tokendial.extras import MissingPackageError

PROBABILITIES = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")
GRADES = ("sound", "probably sound", "probably defective", "defective")
STRATA = [(text, kind) for text in PROBABILITIES for kind in ("mono", "poly")]
PER_STRATUM = {stratum: 4 + 2 * number for number, stratum in enumerate(STRATA)}
LINES = [
    f"images/cell{number:04}.png  {text}   {kind}"
    for number, (text, kind) in enumerate(
        stratum for stratum, count in PER_STRATUM.items() for stratum in [stratum] * count
    )
]
STRATUM = {line.split()[0]: tuple(line.split()[1:]) for line in LINES}


@pytest.fixture(scope="module")
def root(tmp_path_factory, pieces):
    return write_elpv(tmp_path_factory.mktemp("elpv"), pieces, LINES)


def names(part):
    return [path.relative_to(path.parents[1]).as_posix() for path, _ in part.files]


def build(root, **fields):
    return ELPV(**{"root": str(root), "check": False} | fields).build(0)


@pytest.mark.parametrize(
    ("task", "classes"),
    [
        ("defect", ("sound", "defective")),
        ("grade", GRADES),
        ("type", ("mono", "poly")),
    ],
)
def test_each_task_labels_the_cells(root, task, classes):
    splits = build(root, task=task)
    assert splits.classes == classes
    for part in (splits.train, splits.val):
        for name, label in zip(names(part), part.labels, strict=True):
            text, kind = STRATUM[name]
            wanted = {
                "defect": "defective" if float(text) >= 0.5 else "sound",
                "grade": GRADES[PROBABILITIES.index(text)],
                "type": kind,
            }
            assert classes[label] == wanted[task]


def test_images_are_those_of_the_list(root, shows):
    part = build(root).val
    image, _ = part[0]
    assert image.mode == "RGB"
    assert shows(image, int(names(part)[0][-8:-4]) % 48)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    task=st.sampled_from(["defect", "grade", "type"]),
    seed=st.integers(0, 2**31),
    split_seed=st.integers(0, 2**31),
    test_share=st.floats(0.13, 0.9),
    holdout=st.floats(0.0, 0.9),
)
def test_the_split_keeps_proportions_for_every_task_and_seed(
    root, task, seed, split_seed, test_share, holdout
):
    shared = {"root": str(root), "check": False, "split_seed": split_seed}
    data = ELPV(task=task, test_share=test_share, holdout=holdout, **shared)
    final = data.build(seed)
    train, test = names(final.train), names(final.val)
    assert not set(train) & set(test)
    other = replace(data, task="grade").build(seed + 1)
    assert (names(other.train), names(other.val)) == (train, test)
    for stratum, count in Counter(STRATUM[name] for name in test).items():
        assert abs(count - test_share * PER_STRATUM[stratum]) <= 1
    held = set(STRATUM) - set(train) - set(test)
    if not held:
        assert round(holdout * max(PER_STRATUM.values()) * (1 - test_share)) <= 1
        return
    choose = replace(data, val="val").build(seed)
    assert names(choose.train) == train
    assert set(names(choose.val)) == held
    for stratum, count in Counter(STRATUM[name] for name in held).items():
        rest = PER_STRATUM[stratum] - Counter(STRATUM[name] for name in test)[stratum]
        assert abs(count - holdout * rest) <= 1


def test_another_split_seed_gives_another_test_set(root):
    assert names(build(root).val) != names(build(root, split_seed=1).val)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/cell0000.png 0.5 mono", "must be a path, a probability .*, got 'images"),
        ("images/cell0000.png nan mono", "must be a path, a probability"),
        ("images/cell0000.png 1.5 mono", "must be a path, a probability"),
        ("images/cell0000.png mono", "must be a path, a probability"),
        ("images/cell0000.png 1.0 multi", "mono or poly, got 'images/cell0000.png 1.0 multi'"),
        ("images/cell0001.png 1.0 mono", "images/cell0001.png is listed twice"),
        ("images/none.png 1.0 mono", "no such image: .*images/none.png"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path, pieces, line, message):
    write_elpv(tmp_path, pieces, LINES)
    (tmp_path / "labels.csv").write_text("\n".join([*LINES[1:9], line]))
    with pytest.raises(ValueError, match=rf"^data: .*labels.csv, line 9: .*{message}"):
        build(tmp_path)


def test_an_unreadable_image_is_named_before_the_run(tmp_path, pieces):
    write_elpv(tmp_path, pieces, LINES)
    (tmp_path / "images" / "cell0003.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cell0003.png is empty"):
        build(tmp_path)


def test_the_published_list_is_required_unless_check_is_false(root, monkeypatch):
    with pytest.raises(ValueError, match=r"images in .*labels.csv must be 2,624, got \d+; data.ch"):
        build(root, check=True)
    monkeypatch.setattr(elpv, "_NUM_IMAGES", len(LINES))
    with pytest.raises(ValueError, match=r"SHA-256 of .*labels.csv must be 0abe.*data.check=false"):
        build(root, check=True)
    content = (root / "labels.csv").read_bytes()
    monkeypatch.setattr(elpv, "_SHA256", hashlib.sha256(content).hexdigest())
    build(root, check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"val": "val"}, "data.holdout must hold out at least one image for data.val=val, got 0.0"),
        ({"test_share": 0.001}, "data.test_share must take at least one of 88 images .*got 0.001"),
        ({"task": "defects"}, "task must be one of defect, grade, type, got 'defects'"),
        ({"val": "train"}, "val must be one of val, test, got 'train'"),
        ({"holdout": 1.0}, r"holdout must lie in \[0, 1\), got 1.0"),
        ({"test_share": 0.0}, r"test_share must lie in \(0, 1\), got 0.0"),
        ({"split_seed": -1}, "split_seed must be an integer of at least 0, got -1"),
        ({"root": "nowhere"}, "data.root: no such folder: nowhere .*ELPV, https"),
    ],
)
def test_bad_fields_are_refused(root, fields, message):
    with pytest.raises(ValueError, match=message):
        build(**{"root": root} | fields)


def test_a_folder_without_the_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*labels.csv. ELPV, https"):
        build(tmp_path)


def install_package(folder: Path, pieces, monkeypatch) -> Path:
    package = folder / "elpv_dataset"
    write_elpv(package / "data", pieces, LINES)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder)
    return package


def test_the_installed_package_is_read_without_importing_it(tmp_path, pieces, monkeypatch, root):
    package = install_package(tmp_path, pieces, monkeypatch)
    found = ELPV(check=False).build(0)
    assert names(found.val) == names(build(root).val) == names(build(package).val)
    assert found.val.files[0][0].is_relative_to(package)
    assert "elpv_dataset" not in sys.modules


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(elpv, "find_spec", lambda name: None)
    message = r"needs elpv-dataset, which is not installed: pip install 'tokendial\[real\]'"
    with pytest.raises(MissingPackageError, match=message):
        ELPV().build(0)
