import pytest
from layouts import write_vtab

from tokendial.data import VTAB, VTAB_GROUPS, VTAB_TASKS

LISTS = {
    "train800.txt": ["images/a.jpg 0", "images/b 2.jpg 3"],
    "val200.txt": ["images/c.jpg 1"],
    "train800val200.txt": ["images/a.jpg 0", "images/b 2.jpg 3", "images/c.jpg 1"],
    "test.txt": ["images/d.jpg 2", "images/e.jpg 3"],
}


@pytest.fixture
def root(tmp_path, pieces):
    return write_vtab(tmp_path, pieces, "kitti", LISTS)


def build(root, **settings):
    return VTAB(**{"root": str(root), "task": "kitti", "check": False} | settings).build(0)


@pytest.mark.parametrize(
    ("split", "train", "val"),
    [("search", [(0, 0), (1, 3)], [(2, 1)]), ("final", [(0, 0), (1, 3), (2, 1)], [(3, 2), (4, 3)])],
)
def test_each_split_has_its_two_lists(root, shows, split, train, val):
    splits = build(root, split=split)
    for dataset, expected in ((splits.train, train), (splits.val, val)):
        assert [label for _, label in dataset] == [label for _, label in expected]
        assert all(
            shows(image, piece) for (image, _), (piece, _) in zip(dataset, expected, strict=True)
        )
    assert splits.classes == ("class 0", "class 1", "class 2", "class 3")


def test_there_are_seven_four_and_eight_tasks():
    assert [len(group) for group in VTAB_GROUPS.values()] == [7, 4, 8]
    assert len(VTAB_TASKS) == 19
    assert VTAB_TASKS["smallnorb_ele"] == (9, 12_150)


def test_a_whole_set_is_counted(root):
    lines = {"train800val200.txt": 1000, "test.txt": 711}
    for name, size in lines.items():
        (root / "kitti" / name).write_text("images/a.jpg 3\n" * size)
    splits = build(root, check=True)
    assert (len(splits.train), len(splits.val)) == (1000, 711)
    (root / "kitti" / "test.txt").write_text("images/a.jpg 3\n" * 710)
    with pytest.raises(
        ValueError, match=r"test.txt must be 711, got 710; data.check=false accepts"
    ):
        build(root, check=True)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("search", r"number of images in .*train800.txt must be 800, got 2"),
        ("final", r"number of images in .*train800val200.txt must be 1,000, got 3"),
    ],
)
def test_a_short_list_is_refused(root, split, message):
    with pytest.raises(ValueError, match=message):
        build(root, split=split, check=True)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("images/a.jpg 4", r"train800.txt, line 1: label must be a whole number in \[0, 3\], got"),
        ("\nimages/a.jpg -1", r"line 2: label must be a whole number in \[0, 3\], got '-1'"),
        ("images/a.jpg one", r"line 1: label must be a whole number in \[0, 3\], got 'one'"),
        ("images/a.jpg", r"line 1: must look like 'images/1.jpg 0', got 'images/a.jpg'"),
        ("images/x.jpg 1", r"train800.txt, line 1: no such image: .*kitti/images/x.jpg"),
        ("", r"train800.txt must be 800, got 0\.$"),
        (b"\xff\xfe 1", "train800.txt is not a text file"),
    ],
)
def test_errors_in_a_list_name_the_line(root, lines, message):
    content = lines if isinstance(lines, bytes) else lines.encode()
    (root / "kitti" / "train800.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        build(root, split="search")
    assert "\n" not in str(caught.value)


def test_an_error_for_a_missing_file_says_where_to_get_it(root):
    with pytest.raises(ValueError, match=r"data.root: no such folder: .*nowhere. The code of NOAH"):
        build(root / "nowhere")
    with pytest.raises(ValueError, match=r"data.root: no such folder: .*svhn. The code of NOAH"):
        build(root, task="svhn")
    (root / "kitti" / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"no such file: .*kitti/test.txt. The code of NOAH"):
        build(root)


def test_an_unreadable_image_is_named_before_the_run(root):
    (root / "kitti" / "images" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a.jpg is not an image"):
        build(root)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "mnist"}, "task must be one of cifar, caltech101, .*, got 'mnist'"),
        ({"split": "both"}, "split must be one of search, final, got 'both'"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        VTAB(**{"root": "vtab", "task": "kitti"} | settings)
