import pytest
import timm
import torch
from examples import tiny_vit

import tokendial as td
from tokendial.measure.cost import count_macs, count_macs_in_parts


def base(name: str = "vit_base_patch16_224", **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def test_vit_base_costs_what_the_papers_print():
    cost = td.wrap(base(num_classes=100)).cost()
    assert round(cost.gmacs, 3) == 17.582
    assert round(cost.trainable_params / 1e6, 2) == 85.80


def test_sparse_tuning_costs_what_the_paper_prints():
    cost = td.wrap(base(num_classes=100), reduce=td.EViT(), adapt=td.DenseAdapter(dim=32)).cost()
    assert cost.gmacs == pytest.approx(11.70, rel=0.006)
    assert cost.trainable_params / 1e6 == pytest.approx(1.10, rel=0.02)
    assert cost.tokens_per_layer == (197,) * 3 + (140,) * 3 + (100,) * 3 + (72,) * 3


@pytest.mark.parametrize(
    ("r", "gmacs"), [(0, 17.58), (2, 16.46), (4, 15.34), (8, 13.12), (12, 10.93), (16, 8.78)]
)
def test_tome_costs_what_the_paper_prints(r, gmacs):
    model = td.wrap(base("deit_base_patch16_224"), reduce=td.ToMe(r=r))
    assert model.cost().gmacs == pytest.approx(gmacs, abs=0.006)


def test_one_block_is_counted_as_by_hand():
    vit = tiny_vit(depth=1, num_classes=0)
    n, d, p = 65, 48, 64
    linear = p * d * 3 * 16 + n * (3 * d * d + d * d + 8 * d * d)
    attention, norms = 2 * n * n * d, 5 * 3 * n * d
    assert td.wrap(vit).cost().macs == linear + attention + norms


def test_looking_at_another_degree_leaves_the_dial_alone():
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=8))
    assert model.cost(3).degree == 3
    assert model.degree == 8
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got 33"):
        model.cost(33)
    assert model.degree == 8


def test_counting_leaves_weights_and_mode_alone():
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.cost()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_products_of_activations_can_be_left_out():
    n, d = 65, 48
    model = td.wrap(tiny_vit(depth=1, num_classes=0), reduce=td.ToMe(r=4))
    model.set_degree(0)
    images = torch.empty(1, 3, 32, 32, device="meta")
    without = count_macs(model, lambda module: module(images), products=False)
    assert model.cost().macs - without == 2 * n * n * d


def test_interpolation_costs_four_for_each_element():
    images = torch.empty(2, 3, 4, 4, device="meta")
    up = torch.nn.Upsample(scale_factor=2, mode="bilinear")
    assert count_macs(up, lambda module: module(images)) == 4 * 2 * 3 * 8 * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_the_same(dtype):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=8))
    assert model.to(dtype).cost() == td.wrap(tiny_vit(), reduce=td.ToMe(r=8)).cost()


def test_a_module_with_two_names_and_tied_weights_are_left_alone():
    """Catches: weights that stay on the meta device after counting."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "ab"})
    model["again"], model["b"].weight = model["a"], model["a"].weight
    weight, images = model["a"].weight, torch.empty(2, 4, device="meta")
    macs = count_macs(model, lambda m: m["b"](m["again"](m["a"](images))))
    assert macs == 3 * 2 * 4 * 4
    assert model["a"].weight is model["b"].weight is weight
    assert weight.device.type == "cpu"


def test_parts_of_a_call_are_counted_alone():
    first, part, last = torch.nn.Linear(3, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 7)
    x = torch.zeros(2, 3)
    found = count_macs_in_parts(lambda: last(part(part(first(x)))), [part])
    assert found == (2 * (3 * 5 + 2 * 5 * 5 + 5 * 7), 2 * 2 * 5 * 5)
    assert not part._forward_hooks
    assert not part._forward_pre_hooks
