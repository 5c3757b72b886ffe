"""NOAH: subnets equal the authors' code, are counted exactly, and are drawn in training."""

from dataclasses import replace

import pytest
import timm
import torch
from examples import golden_vit, images, perturbed, split, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from zoo import backbone

import tokendial as td

SPACE = {"prompts": (2, 4), "rank": (1, 3), "dim": (2, 5), "depths": (1, 3)}
CASE = golden_vit("noah_subnet")


def supernet(**changes):
    torch.manual_seed(0)
    return td.wrap(tiny_vit(), adapt=td.NOAHSupernet(**(SPACE | changes)))


def weights_of(tensors):
    """The authors' weights of the supernet under our names."""
    ours = {}
    for name, value in split(tensors, "extra.blocks.").items():
        block, part, *rest = name.split(".")
        layer = int(block) + 1
        if part == "visual_prompt_token":
            ours[f"prompts.{layer}"] = value[0]
        elif part == "attn":
            side = {"LoRA_a": "down", "LoRA_b": "up"}[rest[0]]
            ours[f"lora.{layer}-attn-qkv.{side}.weight"] = value
        else:
            side = {"ln1": "down", "ln2": "up"}[rest[0]]
            ours[f"adapters.{layer}.{side}.{rest[1]}"] = value
    return ours


def golden_supernet():
    meta, tensors, vit = golden_vit("noah_subnet")
    sizes = meta["settings"]["supernet"]
    config = td.NOAHSupernet(**{k: (size,) for k, size in sizes.items()}, depths=(4,))
    model = td.wrap(vit, adapt=config).eval()
    model.adapter.load_state_dict(weights_of(tensors))
    return meta["settings"], tensors, model


@pytest.mark.parametrize("variant", CASE[0]["settings"]["variants"])
@torch.no_grad()
def test_subnets_of_the_supernet_equal_the_reference(variant):
    settings, tensors, model = golden_supernet()
    subnet = td.NOAH(**settings["variants"][variant])
    model.adapter.use(subnet)
    expected = tensors[f"output.{variant}.logits"]
    torch.testing.assert_close(model(tensors["input"]), expected, atol=1e-4, rtol=0)
    # The authors also count prompts of the input, and all of their position embeddings.
    unused = (subnet.prompts[0] + settings["supernet"]["prompts"]) * 32
    theirs = settings["sampled_params"][variant]
    assert model.adapter.num_parameters(subnet) == theirs - unused


@pytest.mark.parametrize("variant", CASE[0]["settings"]["variants"])
@torch.no_grad()
def test_a_subnet_on_its_own_equals_the_reference(variant):
    meta, tensors, vit = golden_vit("noah_subnet")
    model = td.wrap(vit, adapt=td.NOAH(**meta["settings"]["variants"][variant])).eval()
    for name, parameter in model.adapter.named_parameters():
        first = tuple(slice(size) for size in parameter.shape)
        parameter.copy_(weights_of(tensors)[name][first])
    expected = tensors[f"output.{variant}.logits"]
    torch.testing.assert_close(model(tensors["input"]), expected, atol=1e-4, rtol=0)


@given(choices=st.lists(st.integers(0, 1), min_size=20, max_size=20))
def test_a_subnet_has_as_many_parameters_as_are_counted(choices):
    drawn = iter(choices)
    model = supernet()
    subnet = model.adapt_config.draw(4, lambda options: options[next(drawn)])
    alone = td.wrap(tiny_vit(), adapt=subnet)
    count = sum(parameter.numel() for parameter in alone.adapter.parameters())
    assert model.adapter.num_parameters(subnet) == count
    assert alone.cost().trainable_params == count


def test_parameters_on_vit_base():
    """Those of the authors' subnet for CIFAR-100 (experiments/NOAH/subnet/VTAB)."""
    adapt = td.NOAH(
        prompts=[10, 5, 10, 1, 5, 1, 10, 1, 10, 5, 1, 10],
        rank=[10, 1, 5, 5, 1, 10, 1, 1, 1, 10, 1, 1],
        dim=[5, 10, 10, 10, 5, 1, 1, 1, 10, 10, 10, 1],
    )
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        cost = td.wrap(vit, adapt=adapt).cost()
    assert cost.trainable_params == 768 * 69 + 4 * 768 * 47 + 2 * 768 * 74 + 74 + 12 * 768
    assert cost.tokens_per_layer[:4] == (207, 202, 207, 198)


@torch.no_grad()
def test_prompts_stay_until_others_replace_them(vit):
    adapt = td.NOAH(prompts=[0, 2, 0, 3], rank=0, dim=0)
    model = td.wrap(vit, adapt=adapt).eval()
    perturbed(model.adapter)
    second, fourth = (model.adapter.prompts[layer].expand(2, -1, -1) for layer in "24")
    x = vit.blocks[0](vit._pos_embed(vit.patch_embed(images())))
    x = vit.blocks[2](vit.blocks[1](torch.cat([x, second], dim=1)))
    x = vit.blocks[3](torch.cat([x[:, :-2], fourth], dim=1))
    expected = vit.forward_head(vit.norm(x[:, :-3]))
    torch.testing.assert_close(model(images()), expected)


def drawn_widths(model, passes=40):
    model.train()
    for _ in range(passes):
        model(images())
        yield model.adapter.active


def test_each_pass_in_training_draws_a_subnet_by_the_global_generator():
    model = supernet()
    torch.manual_seed(5)
    first = list(drawn_widths(model))
    assert len({*first}) > 30
    torch.manual_seed(5)
    assert list(drawn_widths(model)) == first
    numbers = [tuple(sum(width > 0 for width in kind) for kind in drawn) for drawn in first]
    assert {depth for depths in numbers for depth in depths} == {1, 3}
    for drawn, depths in zip(first, numbers, strict=True):
        for kind, depth, options in zip(drawn, depths, list(SPACE.values())[:3], strict=True):
            assert {*kind[:depth]} <= {*options}
            assert kind[depth:] == (0,) * (4 - depth)


def test_a_pass_in_training_computes_what_the_drawn_subnet_computes_in_evaluation():
    model = supernet(depths=(1, 4))
    perturbed(model.adapter, std=0.3)
    drawn = set()
    for seed in range(10):
        torch.manual_seed(seed)
        trained, widths = model.train()(images()), model.adapter.active
        model.eval().adapter.use(td.NOAH(**widths._asdict()))
        torch.testing.assert_close(trained, model(images()))
        drawn |= {name for name, kind in widths._asdict().items() if 0 in kind}
    assert drawn == {"prompts", "rank", "dim"}


def test_a_pass_trains_the_first_rows_and_columns_and_gives_all_others_zero_gradients():
    model = supernet(depths=(1, 4))
    perturbed(model.adapter)
    torch.manual_seed(0)
    model.train()(images()).square().sum().backward()
    prompts, rank, dim = model.adapter.active
    assert {*prompts, *rank, *dim} == {0, 1, 2, 3, 4, 5}  # all cases occur
    for name, parameter in model.adapter.named_parameters():
        part, layer, *rest = name.replace("-", ".").split(".")
        width = {"prompts": prompts, "lora": rank, "adapters": dim}[part][int(layer) - 1]
        gradient = parameter.grad if "up" not in rest else parameter.grad.movedim(-1, 0)
        if name.endswith("up.bias"):
            width = len(gradient) * bool(width)
        assert gradient[:width].abs().sum() > 0 or not width, name
        assert (gradient[width:] == 0).all(), name


@torch.no_grad()
def test_evaluation_runs_the_largest_subnet_unless_another_is_asked_for():
    model = perturbed(supernet())
    next(drawn_widths(model))
    model.eval()
    largest = td.NOAH(prompts=[4, 4, 4, 0], rank=[3, 3, 3, 0], dim=[5, 5, 5, 0])
    assert model.adapter.active == largest.widths(4)
    whole = model(images())
    model.adapter.use(td.NOAH(prompts=[2, 0, 0, 0], rank=[1, 0, 0, 0], dim=[2, 0, 0, 0]))
    assert (model(images()) - whole).abs().amax() > 1e-3
    model.adapter.use(largest)
    assert torch.equal(model(images()), whole)
    with pytest.raises(
        ValueError, match=r"rank must be at most \[3, 3, 3, 0\], got \[4, 3, 3, 0\]"
    ):
        model.adapter.use(replace(largest, rank=(4, 3, 3, 0)))


def test_dropout_acts_on_prompts_lora_and_adapters_of_each_image():
    for kind in ("prompts", "rank", "dim"):
        widths = dict.fromkeys(("prompts", "rank", "dim"), 0) | {kind: 3}
        model = td.wrap(tiny_vit(), adapt=td.NOAH(**widths, dropout=0.5))
        perturbed(model.adapter).train()
        twice = images(1).expand(2, -1, -1, -1)
        first, second = model(twice)
        assert (first - second).abs().amax() > 1e-4, kind
        first, second = model.eval()(twice)
        torch.testing.assert_close(first, second)


@torch.no_grad()
def test_lora_acts_on_layers_of_other_names():
    vit, size = backbone("hf vit")
    targets = ("q_proj", "k_proj", "v_proj")
    model = td.wrap(vit, adapt=td.NOAH(prompts=0, rank=2, dim=0, target_modules=targets)).eval()
    before = model(images(2, *size))
    perturbed(model.adapter, std=0.3)
    assert (model(images(2, *size)) - before).abs().amax() > 1e-4
    shape = model.anatomy.shape
    count = sum(parameter.numel() for parameter in model.adapter.parameters())
    assert count == shape.depth * 3 * 2 * 2 * shape.embed_dim


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.NOAH(rank=[1, 2]), "rank must have one width for each of 4 blocks, got"),
        (lambda: td.NOAH(dim=-1), "dim must be an integer of at least 0, got -1"),
        (lambda: td.NOAH(prompts=[1, True]), "prompts must be an integer of at least 0, got True"),
        (lambda: td.NOAH(prompts=[]), r"prompts must be an integer of at least 0, got \[\]"),
        (lambda: td.NOAH(prompts=0, rank=[0], dim=0), "must not all be 0"),
        (lambda: td.NOAH(dropout=1), r"dropout must lie in \[0, 1\), got 1"),
        (lambda: td.NOAH(target_modules=["q"]), "target_modules must name linear layers"),
        (lambda: td.NOAHSupernet(), r"depths must be at most 4, the number of blocks, got \(3, 6"),
        (lambda: td.NOAHSupernet(rank=(0, 1)), "rank must be an integer of at least 1, got 0"),
        (lambda: td.NOAHSupernet(rank=3), "rank must be a list of numbers, got 3"),
        (lambda: td.NOAHSupernet(depths=()), r"depths must be an integer of at least 1, got \(\)"),
    ],
)
def test_settings_are_checked(vit, make, message):
    with pytest.raises(ValueError, match=message):
        td.wrap(vit, adapt=make())


def test_it_cannot_be_merged(vit):
    for adapt in (td.NOAH(), td.NOAH(rank=0)):
        model = td.wrap(tiny_vit(), adapt=adapt)
        with pytest.raises(ValueError, match="cannot be merged into the backbone's weights"):
            model.merge_adapters()
