import pytest
from PIL import Image

from tokendial.data import ImageFolder
from tokendial.data.readers import integrity


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def test_classes_are_numbered_by_name_and_files_listed(tmp_path):
    write(tmp_path, "train/dog/1.png", "train/cat/1.png", "train/cat/deep/2.jpg", "val/dog/3.png")
    splits = ImageFolder(root=str(tmp_path)).build(0)
    assert splits.classes == ("cat", "dog")
    assert [splits.train[i][1] for i in range(len(splits.train))] == [0, 0, 1]
    image, target = splits.val[0]
    assert (image.size, target, splits.multi_label) == ((4, 4), 1, False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "data.root: no such folder"),
        (
            ["a/1.png", "b/1.png"],
            "has no folder 'train'; it has a, b. If these are classes, data.h",
        ),
        (["val/a/1.png"], "has no folder 'train'; it has val.$"),
        (["train/1.png", "val/a/1.png"], "train has no class folders"),
        (["train/a/1.png"], "has no folder 'val'; it has train. data.holdout=0.2 validates on"),
        (["train/a/1.png", "val/b/1.png"], "class 'b' of .*val is not in .*train"),
    ],
)
def test_errors_in_the_folder_layout_name_the_folder(tmp_path, files, message):
    root = tmp_path / "data"
    write(root, *files)
    with pytest.raises(ValueError, match=message):
        ImageFolder(root=str(root)).build(0)


def test_an_empty_class_folder_is_named(tmp_path):
    write(tmp_path, "train/a/1.png", "val/a/1.png")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(ValueError, match="class folder .*b holds no images"):
        ImageFolder(root=str(tmp_path)).build(0)


@pytest.mark.parametrize(
    ("folders", "trained", "validated"),
    [
        (["train", "valid", "test"], "train", "valid"),
        (["Training", "Validation"], "Training", "Validation"),
        (["train", "test"], "train", "test"),
        (["train", "test", "val"], "train", "val"),
    ],
)
def test_the_usual_names_of_splits_are_found(tmp_path, folders, trained, validated):
    write(tmp_path, *(f"{folder}/a/1.png" for folder in folders))
    splits = ImageFolder(root=str(tmp_path)).build(0)
    for part, folder in ((splits.train, trained), (splits.val, validated)):
        assert [path for path, _ in part.files] == [tmp_path / folder / "a" / "1.png"]


def test_other_names_are_found_only_for_the_default_names(tmp_path):
    write(tmp_path, "train/a/1.png", "val/a/1.png", "test/a/1.png")
    with pytest.raises(ValueError, match="has no folder 'dev'; it has test, train, val"):
        ImageFolder(root=str(tmp_path), val="dev").build(0)


def test_a_share_of_a_folder_of_classes_is_held_out_by_class_and_seed(tmp_path):
    write(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(10)))
    write(tmp_path, *(f"c/{number}.png" for number in range(5)))
    first, again, other = (
        ImageFolder(root=str(tmp_path), holdout=0.2).build(seed) for seed in (0, 0, 1)
    )
    assert first.classes == ("a", "b", "c")
    assert [label for _, label in first.val.files] == [0, 0, 1, 1, 2]
    assert sorted(first.train.files + first.val.files) == sorted(
        (path, "abc".index(path.parent.name)) for path in tmp_path.rglob("*.png")
    )
    assert first.val.files == again.val.files != other.val.files


def test_a_share_is_held_out_of_a_training_folder_and_a_test_folder_left_alone(tmp_path):
    write(tmp_path, *(f"train/a/{n}.png" for n in range(4)), "train/b/1.png", "test/a/9.png")
    splits = ImageFolder(root=str(tmp_path), holdout=0.9).build(0)
    # The only image of a class stays to be trained on, however large the share is.
    assert [label for _, label in splits.train.files] == [0, 1]
    assert {path.parent for path, _ in splits.val.files} == {tmp_path / "train" / "a"}


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (["train/a/1.png", "valid/a/1.png"], {}, "must be 0, as .* has the folder valid to"),
        (["train/a/1.png", "test/a/1.png"], {"val": "test"}, "must be 0, as .* the folder test"),
        (["test/a/1.png"], {}, "has no folder 'train'"),
        (["a/1.png"], {"train": "photos"}, "has no folder 'photos'; it has a."),
        (["a/1.png", "b/1.png"], {"holdout": 0.4}, "must hold out at least one of .*, got 0.4"),
        ([], {"holdout": 1.0}, r"holdout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_a_share_that_cannot_be_held_out_is_refused(tmp_path, files, settings, message):
    write(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        ImageFolder(**{"root": str(tmp_path), "holdout": 0.5} | settings).build(0)


def test_files_and_folders_of_the_system_are_skipped(tmp_path, caplog):
    write(tmp_path, "train/a/1.png", "train/a/._1.png", "train/a/@eaDir/1.png/thumb.jpg")
    write(tmp_path, "train/__MACOSX/a/2.png", "train/.cache/3.png", "val/a/1.png")
    (tmp_path / "train" / "a" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"")
    splits = ImageFolder(root=str(tmp_path)).build(0)
    assert splits.classes == ("a",)
    assert [path for path, _ in splits.train.files] == [tmp_path / "train" / "a" / "1.png"]
    assert caplog.messages == []


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "ppm", "pgm", "jp2", "tga", "apng"])
def test_every_ending_that_pillow_reads_safely_is_found(tmp_path, suffix):
    formats = {"jfif": "JPEG", "jpe": "JPEG", "apng": "PNG"}
    path = tmp_path / "train" / "a" / f"1.{suffix}"
    write(tmp_path, "train/a/2.png", "val/a/1.png")
    Image.new("L", (4, 4), 200).save(path, format=formats.get(suffix))
    image, _ = ImageFolder(root=str(tmp_path)).build(0).train[0]
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (200, 200, 200))


def test_files_that_are_left_out_are_counted_by_their_endings(tmp_path, caplog):
    write(tmp_path, "train/a/1.png", "val/a/1.png")
    for name in ("a/1.heic", "a/2.HEIC", "a/note.txt", "loose.png"):
        (tmp_path / "train" / name).write_bytes(b"")
    ImageFolder(root=str(tmp_path)).build(0)
    assert caplog.messages == [
        f"{tmp_path}/train: left out 3 files without image endings: 2 .heic, 1 .txt",
        f"{tmp_path}/train: left out 1 file outside of the class folders",
    ]


def test_the_name_of_a_class_is_the_same_in_both_forms_of_unicode(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    write(tmp_path, f"train/{apart}/1.png", "train/tea/1.png", f"val/{composed}/1.png")
    splits = ImageFolder(root=str(tmp_path)).build(0)
    assert splits.classes == (composed, "tea")
    assert splits.val[0][1] == 0


@pytest.mark.parametrize("name", ["Cat", "cat ", "cats"])
def test_a_class_missing_in_train_is_named_with_a_similar_one(tmp_path, name):
    write(tmp_path, "train/cat/1.png", "train/dog/1.png", f"val/{name}/1.png")
    with pytest.raises(ValueError, match=f"class '{name}' of .*, which has 'cat': rename one"):
        ImageFolder(root=str(tmp_path)).build(0)


@pytest.fixture
def damaged(tmp_path):
    """A folder of six images, of which three are broken: cut off, empty, and a text file."""
    write(tmp_path, *(f"train/{name}/{number}.jpg" for name in "ab" for number in range(2)))
    write(tmp_path, "val/a/1.jpg", "val/b/1.jpg")
    cut = tmp_path / "train" / "a" / "1.jpg"
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / "train" / "b" / "0.jpg").write_bytes(b"")
    (tmp_path / "val" / "b" / "1.jpg").write_text("no picture")
    return tmp_path


def test_every_broken_image_is_named_once_before_the_run(damaged, caplog):
    with pytest.raises(ValueError, match="one of 3 broken images, .*; data.broken=skip leaves"):
        ImageFolder(root=str(damaged)).build(0)
    assert [message.split(" ")[1] for message in caplog.messages] == [
        f"{damaged}/{name}" for name in ("train/a/1.jpg", "train/b/0.jpg", "val/b/1.jpg")
    ]


def test_broken_images_are_reported_and_left_out(damaged, caplog):
    splits = ImageFolder(root=str(damaged), broken="skip").build(0)
    names = [str(path.relative_to(damaged)) for path, _ in splits.train.files + splits.val.files]
    assert names == ["train/a/0.jpg", "train/b/1.jpg", "val/a/1.jpg"]
    assert [message[:8] for message in caplog.messages] == ["left out"] * 3


def test_a_class_without_an_image_that_can_be_read_is_refused(damaged):
    (damaged / "train" / "b" / "1.jpg").unlink()
    with pytest.raises(ValueError, match="no image of class 'b' in .* can be read"):
        ImageFolder(root=str(damaged), broken="skip").build(0)


def test_intact_files_are_not_decoded_again_unless_they_changed(damaged, monkeypatch):
    ImageFolder(root=str(damaged), broken="skip").build(0)
    read = []
    monkeypatch.setattr(integrity, "check_image", lambda path, value_range: read.append(path))
    (damaged / "train" / "a" / "0.jpg").write_bytes((damaged / "val/a/1.jpg").read_bytes())
    broken = ["train/a/1.jpg", "train/b/0.jpg", "val/b/1.jpg"]
    ImageFolder(root=str(damaged), broken="skip").build(0)
    assert [str(path.relative_to(damaged)) for path in read] == ["train/a/0.jpg", *broken]


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}'])
def test_a_damaged_cache_of_intact_files_is_ignored(damaged, content):
    integrity._cache_file(damaged, None).write_text(content)
    with pytest.raises(ValueError, match="one of 3 broken images"):
        ImageFolder(root=str(damaged)).build(0)


def test_files_of_several_pictures_are_logged_in_every_run(tmp_path, caplog):
    write(tmp_path, "train/a/1.png", "val/a/1.png")
    pages = [Image.new("L", (4, 4), grey) for grey in (0, 100, 200)]
    for name in ("train/a/x.tif", "val/a/y.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    for _ in range(2):
        caplog.clear()
        ImageFolder(root=str(tmp_path)).build(0)
        assert caplog.messages == [
            f"{tmp_path}/train/a/x.tif holds 3 pictures, the first one is read "
            "(and 1 more such file)"
        ]


def test_a_set_is_checked_from_the_command_line(damaged, cli):
    write(damaged, "train/c/1.png", "val/B/2.png", "val/a/3.png")
    (damaged / "train" / "empty").mkdir()
    code, out, _ = cli("data", "check", damaged)
    *problems, summary = out.splitlines()
    assert code == 1
    assert problems[:4] == [
        f"class folder {damaged}/train/empty holds no images",
        f"class 'B' of {damaged}/val is not in {damaged}/train, which has 'b': rename one if they "
        "are the same",
        f"class 'c' has no images in {damaged}/val",
        f"class 'empty' has no images in {damaged}/val",
    ]
    assert [line.split()[0] for line in problems[4:]] == [
        f"{damaged}/{name}" for name in ("train/a/1.jpg", "train/b/0.jpg", "val/b/1.jpg")
    ]
    assert summary == (
        f"{damaged}: 5 images of 4 classes to train on, 4 to validate on; 7 problems"
    )


def test_a_folder_of_classes_without_splits_is_checked_too(tmp_path, cli):
    write(tmp_path, "a/1.png", "b/1.png")
    assert cli("data", "check", tmp_path)[:2] == (
        0,
        f"{tmp_path}: 2 images of 2 classes, no folder to validate on: see data.holdout; "
        "no problems\n",
    )
    code, _, err = cli("data", "check", tmp_path / "nowhere")
    assert (code, err) == (2, f"error: data.root: no such folder: {tmp_path}/nowhere.\n")
