"""PYRA: the merge equals the reference; untrained it is ToMe."""

import pytest
import torch
from examples import golden, images, split, tiny_vit

import tokendial as td
from tokendial.reduce.pyra import ModulatedGrouping, Modulation
from tokendial.reduce.tome import bipartite_matching
from tokendial.tokens import Tokens


def test_a_merge_equals_the_reference():
    meta, tensors = golden("pyra_merge")
    settings = meta["settings"]
    modulation = Modulation(settings["r"], settings["channels"])
    names = {"pyra_a": "of_pairs", "pyra_b": "of_channels", "pyra_norm.": "norm."}
    state = {}
    for name, value in split(tensors, "extra.").items():
        start = next(old for old in names if name.startswith(old))
        state[names[start] + name.removeprefix(start)] = value
    modulation.load_state_dict(state)
    pairs = bipartite_matching(tensors["input.metric"], settings["r"], num_prefix_tokens=1)
    grouping = ModulatedGrouping(
        pairs.keep, pairs.src, pairs.dst, pairs.num_tokens, modulate=modulation
    )
    size = tensors["input.size"].squeeze(-1)
    merged = Tokens(tensors["input.x"], prefix=1, grid=(4, 5), size=size).apply_grouping(
        grouping, track_size=True
    )
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(merged.x, tensors["output.x"], **close)
    torch.testing.assert_close(merged.size, tensors["output.size"].squeeze(-1), **close)
    merged.x.square().sum().backward()
    for name, ours in (("pyra_a", "of_pairs"), ("pyra_b", "of_channels")):
        gradient = modulation.get_parameter(ours).grad
        torch.testing.assert_close(gradient, tensors[f"output.grad.{name}"], atol=1e-4, rtol=1e-4)
    gradient = modulation.norm.weight.grad
    expected = tensors["output.grad.pyra_norm.weight"]
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_untrained_it_is_tome():
    schedule = [6, 0, 4]
    model = td.wrap(tiny_vit(), reduce=td.PYRA(r=schedule)).eval()
    plain = td.wrap(model.vit, reduce=td.ToMe(r=schedule)).eval()
    torch.testing.assert_close(model(images()), plain(images()))
    assert model.cost().tokens_per_layer == plain.cost().tokens_per_layer
    for modulation in model.reducer.modulations.values():
        modulation.of_channels += torch.randn_like(modulation.of_channels)
    assert not torch.allclose(model(images()), plain(images()), atol=1e-3)


@torch.no_grad()
def test_the_dial_lowers_the_numbers_of_all_layers():
    model = td.wrap(tiny_vit(), reduce=td.PYRA(r=[6, 0, 4])).eval()
    for degree, schedule in ((5, [5, 0, 4]), (2, [2, 0, 2])):
        model.set_degree(degree)
        plain = td.wrap(model.vit, reduce=td.ToMe(r=schedule)).eval()
        torch.testing.assert_close(model(images()), plain(images()))


def test_it_has_weights_for_the_layers_that_merge_only():
    model = td.wrap(tiny_vit(), reduce=td.PYRA(r=[6, 0, 40]))
    assert {*model.reducer.modulations} == {"1", "3"}
    counted = sum(p.numel() for p in model.reducer.parameters())
    assert counted == 6 + 40 + 2 * 3 * 48
    assert (model.degrees[-1], model.degree) == (40, 40)
    model(images()).sum().backward()  # 40 pairs are more than there are: 29 merge
    assert all(p.grad is not None for p in model.reducer.parameters())


@pytest.mark.parametrize(
    ("r", "message"),
    [
        ([[1, 2], [3, 4]], r"r must be one number or one list, got \[\[1, 2\], \[3, 4\]\]"),
        (-1, "r must be an integer of at least 0"),
    ],
)
def test_settings_are_checked(r, message):
    with pytest.raises(ValueError, match=message):
        td.PYRA(r=r)
