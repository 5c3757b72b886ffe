import pytest
from layouts import write_food101

from tokendial.data import Food101

TRAIN = ["baklava/12", "apple_pie/7", "apple_pie/9"]
TEST = ["apple_pie/3"]


@pytest.fixture
def root(tmp_path, pieces):
    return write_food101(tmp_path, pieces, TRAIN, TEST)


def build(root, **settings):
    return Food101(**{"root": str(root), "check": False} | settings).build(0)


def test_images_come_in_the_order_of_the_lists(root, shows):
    splits = build(root)
    assert splits.classes == ("apple_pie", "baklava")
    assert [label for _, label in splits.train] == [1, 0, 0]
    assert all(shows(image, number) for number, (image, _) in enumerate(splits.train))
    image, label = splits.val[0]
    assert shows(image, 3)
    assert label == 0


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("train", "sushi/1", r"train.txt, line 1: must be CLASS/ID with a class of classes.txt"),
        ("train", "baklava", r"train.txt, line 1: must be CLASS/ID .*, got 'baklava'"),
        ("test", "baklava/5", r"test.txt, line 1: no such image: .*images/baklava/5.jpg"),
        ("test", "", r"number of images in .*test.txt must be 25,250, got 0"),
    ],
)
def test_errors_in_a_list_name_the_line(root, name, lines, message):
    (root / "meta" / f"{name}.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        build(root)


def test_a_part_of_the_set_needs_check_false(root):
    with pytest.raises(
        ValueError, match=r"classes in .*classes.txt must be 101, got 2; data.check"
    ):
        build(root, check=True)
    (root / "meta" / "classes.txt").write_text(
        "\n".join(["apple_pie", "baklava", *map(str, range(99))])
    )
    with pytest.raises(ValueError, match=r"images in .*train.txt must be 75,750, got 3"):
        build(root, check=True)


def test_a_missing_list_is_named_with_where_to_get_it(root):
    with pytest.raises(ValueError, match=r"no such file: .*meta/classes.txt. Food-101, https"):
        build(root / "nowhere")


def test_an_unreadable_image_is_named_before_the_run(root):
    (root / "images" / "baklava" / "12.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"baklava/12.jpg is empty"):
        build(root)
