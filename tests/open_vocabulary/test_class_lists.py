"""Names of classes: the shipped lists, files, and what is written on the command line."""

import pytest
from open_clip import OPENAI_IMAGENET_TEMPLATES

from tokendial.open_vocabulary import CLASS_LISTS, class_list, parse_classes
from tokendial.open_vocabulary.class_lists import imagenet_prompts

SIZES = {
    "voc20": 20,
    "voc21": 21,
    "context59": 59,
    "context60": 60,
    "coco_object": 81,
    "coco_stuff": 171,
    "cityscapes": 19,
    "ade20k": 150,
}


@pytest.mark.parametrize("name", CLASS_LISTS)
def test_a_shipped_list_has_the_classes_of_its_data_set(name):
    classes = class_list(name)
    assert len(classes) == SIZES[name]
    assert all(names and all(names) for names in classes)
    # A prediction that two classes share would depend on their order.
    every = [each for names in classes for each in names]
    assert len(set(every)) == len(every)
    assert (classes[0][0] == "background") == (name in ("voc21", "context60", "coco_object"))


def test_some_classes_stand_where_their_data_sets_have_them():
    assert class_list("voc21")[15][0] == "person"
    assert class_list("voc20")[14][0] == "person"
    assert class_list("context60")[59] == ("wood",)
    assert class_list("coco_object")[1:] == class_list("coco_stuff")[:80]
    assert class_list("coco_stuff")[170] == ("wood",)
    assert class_list("cityscapes")[18] == ("bicycle",)
    assert class_list("ade20k")[149] == ("flag",)


def test_the_prompts_are_those_of_the_authors():
    assert len(imagenet_prompts()) == 80
    theirs = [template("sofa") for template in OPENAI_IMAGENET_TEMPLATES]
    assert [prompt.replace("{}", "sofa") for prompt in imagenet_prompts()] == theirs


def test_classes_are_read_from_a_line_a_list_and_a_file(tmp_path):
    expected = (("cat",), ("sofa", "couch"), ("tall grass",))
    assert parse_classes(" cat, sofa |couch,tall grass,") == expected
    path = tmp_path / "names.txt"
    path.write_text("cat\nsofa | couch\n\ntall grass\n")
    assert parse_classes(str(path)) == expected
    assert parse_classes("voc21") == class_list("voc21")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no.txt", "classes: no such file: no.txt"),
        (" , ", "at least one class, got none"),
        ("cat,|", r"class 1 has \(\)"),
    ],
)
def test_what_names_no_class_is_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_classes(text)


def test_an_unknown_list_and_a_file_that_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="must be one of voc20, .*, got 'voc'"):
        class_list("voc")
    path = tmp_path / "photo.txt"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is not a text file in UTF-8"):
        parse_classes(str(path))
