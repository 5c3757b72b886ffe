"""Paths of data sets that start from another folder."""

import pytest

from tokendial.data import K400, HuggingFace, ImageFolder, Pairs, Unlabelled, WebDataset
from tokendial.data.readers.files import resolve_paths


@pytest.mark.parametrize(
    "make",
    [
        lambda there, set_, list_: ImageFolder(root=set_, val="list.tar"),
        lambda there, set_, list_: ImageFolder(root="elsewhere"),
        lambda there, set_, list_: Unlabelled(root="/absolute"),
        lambda there, set_, list_: Pairs(root=[set_, "elsewhere"]),
        lambda there, set_, list_: HuggingFace(path=set_),
        lambda there, set_, list_: HuggingFace(path="user/set"),
        lambda there, set_, list_: K400(root=set_, classes=list_),
        lambda there, set_, list_: WebDataset(
            train=f"{there}{{list,b}}.tar", val=f"{there}l*.tar", classes=2
        ),
    ],
)
def test_relative_paths_are_looked_up_where_something_is_there(tmp_path, make):
    (tmp_path / "set").mkdir()
    (tmp_path / "list.tar").write_bytes(b"")
    there = f"{tmp_path}/"
    found = resolve_paths(make("", "set", "list.tar"), tmp_path)
    assert found == make(there, f"{there}set", f"{there}list.tar")
