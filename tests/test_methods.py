import pytest
from examples import ADAPTERS, REDUCERS

import tokendial as td
from tokendial.data import (
    CIFAR100,
    ELPV,
    FGVC,
    SVHN,
    VTAB,
    Food101,
    HuggingFace,
    ImageFolder,
    ImageNet,
    Scenes,
    Stamps,
    WebDataset,
)
from tokendial.methods import from_json, method_class, method_names, to_json

OTHERS = [
    ("reduce", td.ToMe(r=(8, -1.0), proportional_attention=False)),
    ("reduce", td.ToMe(r=[4, 2])),
    ("reduce", td.ToMe(r=[[4, 2], [8]])),
    ("reduce", td.EViT(r=[[4, 2], [8]])),
    ("reduce", td.EViT(r=3, rest="drop")),
    ("reduce", td.EViT(keep_rate=[0.9, 0.5], layers=(2, 3), fuse_weights="normalised")),
    ("data", ImageFolder(root="somewhere")),
    ("data", Scenes(task="where")),
    ("data", Stamps(task="mask", val="val", clutter=2, backgrounds=["a.jpg", "b"])),
    ("data", VTAB(root="vtab", task="dtd", split="search")),
    ("data", FGVC(root="cub", task="cub", val="val", holdout=0.1)),
    ("data", CIFAR100(root="cifar", check=False)),
    ("data", SVHN(root="svhn", extra=True)),
    ("data", Food101(root="food")),
    ("data", ELPV(task="grade", val="val", holdout=0.2, split_seed=3)),
    ("data", ImageNet(root="imagenet", classes="names.txt")),
    ("data", HuggingFace(path="someone/pets", subset="small")),
    ("data", WebDataset(train="a-{0..3}.tar", val="b.tar", classes=["cat", "dog"])),
]
ALL = [
    *(("reduce", method) for method in REDUCERS.values()),
    *(("adapt", method) for method in ADAPTERS.values()),
    *OTHERS,
]


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_json_gives_the_same_method_back(kind, method):
    assert from_json(kind, to_json(kind, method)) == method


def test_every_registered_method_has_an_example():
    for kind, examples in (("reduce", REDUCERS), ("adapt", ADAPTERS)):
        # Other tests register methods of their own.
        classes = {name: method_class(kind, name) for name in method_names(kind)}
        own = {n for n, cls in classes.items() if cls.__module__.startswith("tokendial.")}
        assert {to_json(kind, example)["name"] for example in examples.values()} == own


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"name": "none"},
            r"reduce\.name must be one of dar, dynamicvit, .*, pitome, .*got 'none'",
        ),
        ({"r": 8}, "reduce must be a mapping with a name"),
        ({"name": "tome", "rr": 8}, r"reduce\.rr is not a field of tome; allowed: inflection,"),
    ],
)
def test_a_method_that_does_not_exist_names_what_does(data, message):
    with pytest.raises(ValueError, match=message):
        from_json("reduce", data)


def test_an_unregistered_object_has_no_json():
    with pytest.raises(ValueError, match="int is not a registered reduce method"):
        to_json("reduce", 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.ToMe(r=-1), "r must be an integer of at least 0"),
        (lambda: td.ToMe(r=[]), "r must be an integer of at least 0, or a list"),
        (lambda: td.ToMe(r=(8, 0.5, 1)), r"r as a tuple must be \(r, inflection\)"),
        (lambda: td.ToMe(r=(8, 1.5)), r"inflection must lie in \[-1, 1\], got 1.5"),
        (lambda: td.ToMe(r=[8, 8], inflection=0.5), "inflection must be 0 where r is a list"),
        (lambda: td.EViT(keep_rate=0.0), r"keep_rate must be in \(0, 1\], got 0.0"),
        (lambda: td.EViT(keep_rate=1.2), r"keep_rate must be in \(0, 1\], got 1.2"),
        (lambda: td.EViT(keep_rate=[0.5]), "keep_rate must have one entry for each of the 3"),
        (
            lambda: td.EViT(keep_rate=0.5, r=2),
            "set keep_rate or r, not both: got keep_rate=0.5 and r=2",
        ),
        (lambda: td.EViT(r=-2), r"r must be an integer of at least 0, .*, got -2"),
        (lambda: td.EViT(layers=()), "layers must be integers of at least 1"),
        (lambda: td.EViT(layers=(0, 4)), "layers must be integers of at least 1"),
        (lambda: td.EViT(layers=(4, 4)), "layers must differ from each other"),
        (lambda: td.EViT(rest="fuse"), "rest must be one of merge, argmax, drop, got 'fuse'"),
        (lambda: td.EViT(fuse_weights="x"), "fuse_weights must be one of raw, normalised"),
        (lambda: td.DenseAdapter(dim=0), "dim must be an integer of at least 1, got 0"),
        (lambda: td.DenseAdapter(scale=0), "scale must be a number above 0, got 0"),
        (lambda: td.DenseAdapter(interval=1), "interval must be an integer of at least 2"),
        (lambda: td.DenseAdapter(start=2), r"start must be at least interval \(3\), got 2"),
        (lambda: td.AdaptFormer(experts=0), "experts must be an integer of at least 1, got 0"),
        (lambda: td.AdaptFormer(dim=1.5), "dim must be an integer"),
        (lambda: td.LoRA(rank=0), "rank must be an integer of at least 1"),
        (lambda: td.LoRA(alpha=0), "alpha must be a number above 0"),
        (lambda: td.LoRA(dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (lambda: td.LoRA(target_modules=()), "target_modules must name at least one layer"),
    ],
)
def test_impossible_settings_raise_when_the_method_is_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()
