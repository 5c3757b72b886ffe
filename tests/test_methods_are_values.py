"""Methods are values: they hash, compare, print, copy, go through JSON, and can be replaced."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import tokendial as td
from tokendial.methods import from_json, method_class, method_names, to_json

KINDS = ("reduce", "adapt", "decode")
METHODS = [(kind, method_class(kind, name)) for kind in KINDS for name in method_names(kind)]
each_method = pytest.mark.parametrize(
    ("kind", "cls"), METHODS, ids=[f"{kind}-{cls.__name__}" for kind, cls in METHODS]
)

counts = st.integers(1, 64)
removals = st.integers(0, 40)
schedules = st.lists(removals, min_size=1, max_size=4)
fractions = st.floats(0.0, 1.0, exclude_min=True)
factors = st.floats(0.01, 10.0) | counts
flags = st.booleans()
layers = st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True).map(sorted)
r = removals | schedules | st.lists(schedules, min_size=1, max_size=3)
matching = {
    "matching": st.sampled_from(["bipartite", "random"]),
    "stride": st.integers(2, 4),
    "seed": st.integers(0, 9),
}
selection = {
    "target_ratio": fractions,
    "ratio_weight": factors,
    "selection": st.sampled_from(["threshold", "topk"]),
}
dropouts = st.floats(0.0, 1.0, exclude_max=True)
widths = removals | st.lists(removals, min_size=1, max_size=4)
targets = st.lists(st.sampled_from(["qkv", "proj", "fc1"]), min_size=1, unique=True)
SETTINGS = {
    td.ToMe: {
        "r": r | st.tuples(removals, st.sampled_from([-1.0, 0.5, 1])),
        "inflection": st.floats(-1.0, 1.0),
        "proportional_attention": flags,
        "sizes": st.sampled_from(["count", "similarity"]),
        **matching,
    },
    td.EViT: {
        "keep_rate": fractions | st.lists(fractions, min_size=1, max_size=3) | st.none(),
        "layers": layers,
        "r": r | st.none(),
        "rest": st.sampled_from(["merge", "argmax", "drop"]),
        "fuse_weights": st.sampled_from(["raw", "normalised"]),
        "score": st.sampled_from(["class", "mean", "shift"]),
        "shrink": st.sampled_from([None, [0, 5], (2, 9)]),
    },
    td.DynamicViT: {
        "keep_rate": fractions | st.just([0.7, 0.5, 0.2]),
        "ratio_over": st.sampled_from(["image", "batch"]),
        "layers": layers,
        "ratio_weight": factors,
        "distill_weight": factors,
        "token_loss": st.sampled_from(["mse", "kl"]),
    },
    td.DyT: {
        **selection,
        "minimal_ratio": fractions | st.none(),
        "minimal_weight": factors,
        "complete": flags,
    },
    td.DAR: selection,
    td.PruneMerge: {
        "r": r,
        "prune_share": st.floats(0.0, 1.0) | st.lists(st.floats(0.0, 1.0), min_size=1),
        "pruned": schedules | st.none(),
        "score": st.sampled_from(["class", "mean", "shift"]),
        "proportional_attention": flags,
    },
    td.PiToMe: {
        "r": r | st.none(),
        "keep_ratio": st.floats(0.5, 1.0) | st.none(),
        "margin": st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=2),
        "first_layers": st.integers(0, 12) | st.none(),
        "proportional_attention": flags,
    },
    td.PYRA: {"r": counts | schedules, "proportional_attention": flags},
    td.LearntMetric: {
        "r": r,
        "dim": counts,
        "targets": counts,
        "temperatures": st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2),
        "proportional_attention": flags,
    },
    td.FFNMerge: {"r": st.integers(0, 9).map(lambda n: 32 * n), "step": st.just(32), **matching},
    td.Stack: {
        "methods": st.just((td.ToMe(r=[8, 1]), {"name": "dyt", "target_ratio": 0.5})).map(list),
        "dial": st.lists(st.tuples(counts, counts), min_size=1, max_size=3) | st.none(),
    },
    td.InWindows: {
        "reduce": st.sampled_from([td.ToMe(r=[8, 1]), {"name": "evit", "r": [[1], [2]]}]),
        "windows": st.lists(counts, min_size=2, max_size=2),
        "regions": st.none(),  # they exclude other windows: see tests/reduce/test_in_windows.py
    },
    td.FrameByFrame: {
        "reduce": st.sampled_from([td.ToMe(r=[8, 1]), {"name": "evit", "r": [[1], [2]]}])
    },
    td.DenseAdapter: {
        "dim": counts,
        "scale": factors,
        "start": st.integers(3, 9),
        "interval": st.integers(2, 3),
        "reads": st.lists(st.sampled_from(["previous", "earlier"]), unique=True),
        "fusion": st.sampled_from(["input", "inner", "output"]),
        "channel_scale": flags,
    },
    td.AdaptFormer: {
        "dim": counts,
        "scale": factors | st.just("learnt"),
        "experts": counts,
        "dropout": dropouts,
        "layer_norm": st.sampled_from(["none", "in", "out"]),
    },
    td.DARAdapter: {"dims": st.lists(counts, min_size=2, max_size=2), "scale": factors},
    td.Houlsby: {"dim": counts, "scale": factors},
    td.VPT: {"prompts": counts, "deep": flags},
    td.SSF: {"patch_embedding": flags, "init_std": st.floats(0.0, 1.0)},
    td.Combined: {
        "methods": st.just((td.VPT(prompts=2), {"name": "adaptformer", "dim": 4})).map(list)
    },
    td.ReleasedDenseAdapter: {"dims": st.lists(counts, min_size=2, max_size=2)},
    td.ResTuning: {"dim": counts},
    td.SynQT: {
        "queries": counts,
        "dim": counts,
        "attention_dim": counts,
        "feature_scale": factors,
        "attention_scale": factors,
        "ffn_scale": factors,
        "dropout": dropouts,
        "drop_path": dropouts,
    },
    td.NOAH: {
        "prompts": widths,
        "rank": widths,
        "dim": widths,
        "dropout": dropouts,
        "target_modules": targets,
    },
    td.NOAHSupernet: {
        **dict.fromkeys(("prompts", "rank", "dim", "depths"), st.lists(counts, min_size=1)),
        "dropout": dropouts,
        "target_modules": targets,
    },
    td.FacT: {
        "rank": counts,
        "scale": factors,
        "kind": st.sampled_from(["tt", "tk"]),
        "dropout": dropouts,
    },
    td.ConvPass: {"dim": counts, "scale": factors, "dropout": dropouts},
    td.BitFit: {},
    td.LastBlocks: {"blocks": counts},
    td.LoRA: {"rank": counts, "alpha": factors, "dropout": dropouts, "target_modules": targets},
    td.PEFT: {
        "method": st.sampled_from(["loha", "oft"]),
        "options": st.dictionaries(
            st.sampled_from(["r", "alpha", "rank_pattern"]),
            counts | st.lists(counts) | st.dictionaries(st.just("qkv"), counts),
        ),
        "target_modules": targets,
    },
    td.LinearProbe: {},
    td.FullFineTuning: {},
    td.DARDecoder: {
        "num_classes": counts,
        "channels": counts,
        "enlarge": counts,
        "dropout": dropouts,
    },
    td.LinearDecoder: {"num_classes": counts},
    td.MaskTransformer: {
        "num_classes": counts,
        "dim": counts | st.none(),
        "depth": counts,
        "num_heads": counts | st.none(),
        "dropout": dropouts,
    },
    td.UpConvDecoder: {"num_classes": counts, "channels": st.lists(counts, min_size=1)},
}
# Of Combined, FrameByFrame, InWindows, PEFT and Stack, which have no default.
REQUIRED = {"reduce", "method", "methods"}


@st.composite
def arguments(draw, cls):
    """Arguments with which `cls` can be made: the required ones and some others."""
    fields = SETTINGS[cls]
    chosen = draw(st.sets(st.sampled_from(sorted(fields)))) if fields else set()
    values = {name: draw(fields[name]) for name in sorted(chosen | REQUIRED & fields.keys())}
    try:
        cls(**values)
    except ValueError:
        assume(False)  # settings that contradict each other
    return values


def test_every_field_of_every_method_is_drawn():
    for _, cls in METHODS:
        assert {field.name for field in dataclasses.fields(cls)} == set(SETTINGS[cls]), cls


@each_method
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_method_hashes_compares_prints_and_copies(kind, cls, data):
    """Catches: a field that stays a list; a list that is read back as (r, inflection); a hash that
    depends on the values of options; a field that JSON leaves out; a setting that changes when it
    is read again.
    """
    method = cls(**data.draw(arguments(cls)))
    text = json.dumps(to_json(kind, method))
    fields = {name: value for name, value in json.loads(text).items() if name != "name"}
    again = [
        from_json(kind, json.loads(text)),
        eval(repr(method), vars(td) | {cls.__name__: cls}),
        copy.deepcopy(method),
        pickle.loads(pickle.dumps(method)),
        dataclasses.replace(method),
        TypeAdapter(cls).validate_python(fields),
    ]
    for other in again:
        assert other == method
        assert hash(other) == hash(method)
        assert to_json(kind, other) == json.loads(text)


@each_method
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_changing_a_list_that_was_given_does_not_change_the_method(kind, cls, data):
    values = data.draw(arguments(cls))
    method = cls(**values)
    before = copy.deepcopy(to_json(kind, method))
    for value in values.values():
        for part in value if isinstance(value, list) else ():
            if isinstance(part, list):
                part.append(1)
        if isinstance(value, list):
            value.append(1)
        elif isinstance(value, dict):
            value["new"] = 1
    assert to_json(kind, method) == before


@each_method
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_replacing_one_setting_gives_what_the_changed_arguments_give(kind, cls, data):
    """Catches: defaults that are stored and then contradict the setting that is replaced."""
    values = data.draw(arguments(cls))
    assume(not isinstance(values.get("r"), tuple))  # it sets two fields
    for name, strategy in SETTINGS[cls].items():
        changed = values | {name: data.draw(strategy)}
        try:
            expected = cls(**changed)
        except ValueError:
            continue  # the new value contradicts another argument
        assert dataclasses.replace(cls(**values), **{name: changed[name]}) == expected


def test_evit_is_switched_between_its_two_ways_by_one_setting():
    assert dataclasses.replace(td.EViT(), r=3) == td.EViT(r=3)
    assert dataclasses.replace(td.EViT(), r=[3, 0]) == td.EViT(r=[3, 0])
    assert dataclasses.replace(td.EViT(r=3), r=None) == td.EViT()
    assert dataclasses.replace(td.EViT(r=3), rest="drop") == td.EViT(r=3, rest="drop")
    with pytest.raises(ValueError, match=r"got keep_rate=0\.5 and r=3; set the other one to None"):
        dataclasses.replace(td.EViT(r=3), keep_rate=0.5)
    with pytest.raises(ValueError, match=r"got keep_rate=0\.5 and r=3; set the other one to None"):
        dataclasses.replace(td.EViT(keep_rate=0.5), r=3)


def test_a_list_of_two_is_not_a_mean_and_an_inflection():
    listed, inflected = td.ToMe(r=[8, 1]), td.ToMe(r=(8, 1))
    assert (listed.r, listed.inflection) == ((8, 1), 0.0)
    assert (inflected.r, inflected.inflection) == (8, 1.0)
    assert dataclasses.replace(listed, stride=3).r == (8, 1)
    assert repr(listed).startswith("ToMe(r=[8, 1], inflection=0.0")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, float("nan"), 0, -1])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (td.VPT, "prompts"),
        (td.LastBlocks, "blocks"),
        (td.FacT, "rank"),
        (td.LoRA, "rank"),
        (td.AdaptFormer, "experts"),
        (td.DenseAdapter, "dim"),
        (td.FFNMerge, "step"),
        (td.DARDecoder, "channels"),
    ],
)
def test_a_count_is_an_integer(cls, name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value!r}"):
        cls(**{name: value})


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), "1", None])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (td.ToMe, "inflection"),
        (td.DynamicViT, "keep_rate"),
        (td.DynamicViT, "distill_weight"),
        (td.DyT, "target_ratio"),
        (td.DyT, "ratio_weight"),
        (td.DyT, "minimal_weight"),
        (td.FacT, "scale"),
        (td.LoRA, "alpha"),
        (td.LoRA, "dropout"),
        (td.Houlsby, "scale"),
        (td.MaskTransformer, "dropout"),
    ],
)
def test_a_number_is_finite_and_no_bool(cls, name, value):
    with pytest.raises(ValueError, match=rf"{name} must .*, got {value!r}"):
        cls(**{name: value})
