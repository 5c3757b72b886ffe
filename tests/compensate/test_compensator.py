"""The plugin and its work in a model: the authors' outputs, exact dials, every kind of model."""

import copy

import pytest
import timm
import torch
from examples import TINY, golden, images, perturbed, split, tiny_vit
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st
from zoo import KINDS, backbone

import tokendial as td

BACKBONE = td.Backbone(name="vit_tiny_patch16_224", args=TINY)
CASE, TENSORS = golden("tocom_vit")
VARIANTS = {
    name: tuple(variant["pairs_r_tgt_r_src"][0])
    for name, variant in CASE["settings"]["variants"].items()
}


def reference():
    vit = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    vit.load_state_dict(split(TENSORS, "weight."))
    plugin = td.Compensator.from_reference(
        split(TENSORS, "extra."), scale=CASE["settings"]["tocom_scale"]
    )
    return plugin, td.wrap(vit, reduce=td.ToMe(r=0))


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_the_authors_code_for_every_pair_of_degrees(name, merge):
    target, source = VARIANTS[name]
    plugin, model = reference()
    model.set_degree(target)
    plain = model(TENSORS["input"])
    expected = TENSORS[f"output.{name}.logits_without_tocom"]
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=0)
    plugin.attach(model, source=source, merge=merge)
    *_, last = model.steps(TENSORS["input"])
    torch.testing.assert_close(
        last.tokens.x, TENSORS[f"output.{name}.final_tokens"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        model(TENSORS["input"]), TENSORS[f"output.{name}.logits"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("source", "target"), [(0, 8), (12, 4), (6, 0)])
@torch.no_grad()
def test_a_branch_equals_that_of_the_authors_code(source, target):
    plugin, _ = reference()
    out = plugin.branch("query", 1, source, target, TENSORS["input.adapter_x"]) / plugin.scale
    expected = TENSORS[f"output.adapter_q0.tgt{target}_src{source}"]
    torch.testing.assert_close(out, expected)


def test_the_authors_format_is_written_as_it_was_read():
    plugin, _ = reference()
    extra = split(TENSORS, "extra.")
    written = plugin.to_reference()
    assert written.keys() == extra.keys()
    assert all(torch.equal(written[name], extra[name]) for name in extra)


@pytest.mark.parametrize(("rank", "millions"), [(1, 0.59), (2, 1.18), (4, 2.36), (8, 4.72)])
def test_parameters_on_deit_base(rank, millions):
    with torch.device("meta"):
        model = td.wrap(timm.create_model("deit_base_patch16_224"), reduce=td.ToMe(r=16))
        plugin = td.Compensator.for_model(model, td.ToCom(rank=rank))
    assert plugin.steps == 16
    assert round(sum(p.numel() for p in plugin.parameters()) / 1e6, 2) == millions


def tuned(adapt=None, reduce=td.ToMe(r=8), **vit):  # noqa: B008  # immutable
    """A fine-tuned model and a compensator with weights for its backbone."""
    model = td.wrap(tiny_vit(**vit), reduce=reduce, backbone=BACKBONE)
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=0.5)), std=0.3)
    model = td.wrap(tiny_vit(**vit), reduce=reduce, adapt=adapt, backbone=BACKBONE).eval()
    if adapt is not None:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model, plugin


METHODS = {
    "full": td.FullFineTuning(),
    "adaptformer": td.AdaptFormer(dim=4),
    "dense_adapter": td.DenseAdapter(dim=4),
    "lora": td.LoRA(rank=2),
    "ssf": td.SSF(),
    "fact": td.FacT(rank=3),
    "vpt": td.VPT(prompts=2),
    "none": None,
}


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_merged_and_beside_are_the_same_with_every_method(name):
    model, plugin = tuned(METHODS[name])
    other = copy.deepcopy(model)
    model.set_degree(0)
    plain, macs = model(images()), model.cost(8).macs
    plugin.attach(model, source=0)
    plugin.attach(other, source=0, merge=False)
    for degree in (8, 3, 0, 5):
        model.set_degree(degree)
        other.set_degree(degree)
        torch.testing.assert_close(model(images()), other(images()), atol=1e-4, rtol=1e-4)
    if name != "ssf":  # which would scale a difference in the weights, too
        assert model.cost(8).macs == macs
    assert other.cost(8).macs > macs
    model.set_degree(0)
    assert torch.equal(model(images()), plain)
    assert not torch.equal(_at(model, 8), _at(tuned(METHODS[name])[0], 8))


@pytest.mark.parametrize(
    "reduce",
    [
        td.PiToMe(r=8),
        td.PruneMerge(r=8),
        td.LearntMetric(r=8, dim=8),
        td.EViT(r=8, score="shift"),
        td.ToMe(r=8, sizes="similarity"),
    ],
    ids=lambda reduce: type(reduce).__name__,
)
@torch.no_grad()
def test_merged_and_beside_are_the_same_with_other_reductions(reduce):
    model, plugin = tuned(reduce=reduce)
    other = copy.deepcopy(model)
    plain = {degree: _at(model, degree) for degree in (0, 3, 8)}
    plugin.attach(model, source=0)
    plugin.attach(other, source=0, merge=False)
    for degree in (8, 3):
        assert (_at(model, degree) - plain[degree]).abs().max() > 0.01
        torch.testing.assert_close(_at(model, degree), _at(other, degree), atol=1e-4, rtol=1e-4)
    assert torch.equal(_at(model, 0), plain[0])


def _at(model, degree):
    model.set_degree(degree)
    return model(images())


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_images_of_one_batch_may_want_different_degrees(merge):
    model, plugin = tuned(td.AdaptFormer(dim=4))
    plugin.attach(model, merge=merge)
    batch, degrees = images(5), [3, 0, 8, 3, 0]
    model.set_degree(5)
    expected = []
    for image, degree in zip(batch, degrees, strict=True):
        model.set_degree(degree)
        expected.append(model(image[None]))
    model.set_degree(5)
    mixed = model.forward_at(batch, degrees)
    torch.testing.assert_close(mixed, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert model.degree == 5
    with pytest.raises(ValueError, match="degrees must be one for each of the 5 images, got 2"):
        model.forward_at(batch, [0, 3])
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 8\]"):
        model.forward_at(batch, [0, 0, 0, 0, 20])
    assert model.degree == 5


@torch.no_grad()
def test_a_thousand_turns_and_back_restore_every_bit():
    model, plugin = tuned(td.FullFineTuning())
    model.set_degree(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plugin.attach(model, source=2)
    generator = torch.Generator().manual_seed(0)
    for degree in torch.randint(0, 9, (1000,), generator=generator).tolist():
        model.set_degree(degree)
    model.set_degree(2)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.set_degree(7)
    plugin.detach(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.compensation is None


@given(
    source=st.integers(0, 6),
    target=st.integers(0, 6),
    kind=st.sampled_from(["paper", "shared", "no inversion"]),
)
def test_differences_add_up_along_the_dial(source, target, kind):
    torch.manual_seed(0)
    config = td.ToCom(rank=3, shared=kind == "shared", inversion=kind != "no inversion")
    plugin = perturbed(td.Compensator(config, depth=1, embed_dim=8, steps=6), std=0.5)

    def difference(source, target):
        down, up = plugin.pair("value", 1, source, target)
        return (up @ down).detach()

    forth, back = difference(source, target), difference(target, source)
    if source == target:
        assert torch.equal(forth, torch.zeros(8, 8))
    if kind == "shared":
        assert torch.allclose(forth.abs(), difference(0, 1).abs() * (source != target), atol=1e-5)
        assert torch.allclose(forth, -back, atol=1e-5)
        return
    step = 1 if target >= source else -1
    path = range(source, target, step)
    steps = sum((difference(n, n + step) for n in path), start=torch.zeros(8, 8))
    assert torch.allclose(forth, steps, atol=1e-4)
    if kind == "paper":
        assert torch.allclose(forth, -back, atol=1e-5)
    elif source != target:
        assert not torch.allclose(forth, -back, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_backbone(kind):
    vit, (height, width) = backbone(kind)
    batch = images(height=height, width=width)
    model = td.wrap(vit.eval(), reduce=td.ToMe(r=2))
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=1.0)), std=0.2)
    model.set_degree(2)
    plain = model(batch)
    plugin.attach(model)
    merged = model(batch)
    assert not torch.allclose(merged, plain, atol=1e-3)
    plugin.detach(model)
    assert torch.equal(model(batch), plain)
    plugin.attach(model, merge=False)
    torch.testing.assert_close(model(batch), merged, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_adapters_take_turns_and_merge_while_a_compensator_is_attached(tmp_path):
    model, plugin = tuned()
    for name in ("full", "lora"):
        model.add_adapter(name, METHODS[name])
        model.set_adapter(name)
        perturbed(model.adapter), perturbed(model.vit.head)
    alone = {}
    for name in model.adapters:
        single = copy.deepcopy(model)
        single.set_adapter(name)
        plugin.attach(single)
        alone[name] = _at(single, 6)
    plugin.attach(model)
    model.set_degree(6)
    for name, expected in alone.items():
        model.set_adapter(name)
        assert torch.equal(model(images()), expected)
    model.set_adapter("lora")
    model.merge_adapters()
    assert torch.allclose(model(images()), alone["lora"], atol=1e-4)
    model.unmerge_adapters()
    assert torch.equal(model(images()), alone["lora"])
    model.save_adapter("full", tmp_path)
    loaded = td.load(tmp_path, vit=tiny_vit())
    plugin.attach(loaded)
    assert torch.equal(_at(loaded, 6), alone["full"])


@torch.no_grad()
def test_what_is_saved_is_the_models_own_and_fits_the_compensator_again(tmp_path):
    random = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    model = td.wrap(
        tiny_vit(), reduce=td.ToMe(r=8), adapt=td.FullFineTuning(), backbone=random
    ).eval()
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom()), std=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    plain = _at(model, 8)
    plugin.attach(model)
    assert not torch.equal(model(images()), plain)
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path)
    assert torch.equal(loaded(images()), plain)
    plugin.attach(loaded)
    assert torch.equal(loaded(images()), model(images()))


def test_saved_and_loaded(tmp_path, monkeypatch):
    model, plugin = tuned()
    plugin.scale = 0.12
    plugin.save_pretrained(tmp_path / "plugin")
    loaded = td.Compensator.from_pretrained(tmp_path / "plugin")
    assert (loaded.config, loaded.scale, loaded.origin) == (plugin.config, 0.12, plugin.origin)
    own, theirs = plugin.state_dict(), loaded.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    uploaded = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: type("R", (), {"repo_id": "me/x"}))
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path: uploaded.setdefault(repo_id, "address"),
    )
    assert plugin.push_to_hub("me/x") == "address"
    with pytest.raises(ValueError, match="holds a compensator, not a model"):
        td.load(tmp_path / "plugin")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a model, not a compensator"):
        td.Compensator.from_pretrained(tmp_path / "model")


def test_the_scale_with_the_best_accuracy_is_found_and_kept():
    model, plugin = tuned()
    with pytest.raises(ValueError, match="not attached"):
        plugin.search_scale(model, [], degree=4)
    plugin.attach(model)
    plugin.scale = 0.12
    with torch.no_grad():
        answers = _at(model, 8).argmax(-1)
    found = plugin.search_scale(model, [(images(), answers)], degree=8, scales=(0.12, 3.0))
    assert (found[0.12], plugin.scale, model.degree) == (1.0, 0.12, 8)
    assert found.keys() == {0.12, 3.0}


def other_backbone():
    return td.wrap(perturbed(tiny_vit()), reduce=td.ToMe(r=8), backbone=BACKBONE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8)), "is for depth 4, the model's is"),
        (
            lambda: td.wrap(tiny_vit(embed_dim=24), reduce=td.ToMe(r=8)),
            "is for embed_dim 48, the model's is 24",
        ),
        (lambda: td.wrap(tiny_vit()), "needs a model with a reduction method, got none"),
        (
            lambda: td.wrap(tiny_vit(), reduce=td.EViT(r=8)),
            "was trained with another reduction: name tome there, evit here",
        ),
        (
            lambda: td.wrap(tiny_vit(), reduce=td.ToMe(r=8, proportional_attention=False)),
            "another reduction: proportional_attention True there, False here",
        ),
        (other_backbone, "with other weights than those that the model was fine-tuned from"),
        (
            lambda: td.wrap(tiny_vit(), reduce=td.ToMe(r=9)),
            r"degree must be an integer in \[0, 8\], which is as far",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    _, plugin = tuned()
    model = make()
    with pytest.raises(ValueError, match=message):
        plugin.attach(model)
    assert model.compensation is None


def test_attaching_wrongly():
    model, plugin = tuned()
    other = other_backbone()
    plugin.attach(other, strict=False)
    with pytest.raises(ValueError, match=r"source must be an integer in \[0, 8\]"):
        plugin.attach(model, source=9)
    plugin.attach(model)
    with pytest.raises(ValueError, match="attached already"):
        plugin.attach(model)
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 8\], which is as far"):
        model.set_degree(9)
    assert model.degree == 8
    with pytest.raises(ValueError, match="not attached"):
        td.Compensator.for_model(model, td.ToCom()).detach(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.ToCom(rank=0), "rank must be an integer of at least 1, got 0"),
        (lambda: td.ToCom(scale=0), "scale must be above 0"),
        (lambda: td.ToCom(dropout=1), r"dropout must lie in \[0, 1\)"),
        (lambda: td.ToCom(shared=True, inversion=False), "inversion must be true with shared"),
        (
            lambda: td.Compensator(td.ToCom(), 4, 48, steps=0),
            "steps must be an integer of at least",
        ),
        (
            lambda: td.Compensator.for_model(td.wrap(tiny_vit()), td.ToCom()),
            "needs a model with a reduction method",
        ),
        (
            lambda: td.Compensator.for_model(
                td.wrap(tiny_vit(), reduce=td.ToMe(r=8)), td.ToCom(), steps=99
            ),
            "steps must be at most 32, got 99",
        ),
        (lambda: td.Compensator.from_reference({}), "this is not a ToCom state dict"),
        (
            lambda: td.Compensator(td.ToCom(), 4, 48, steps=8).to_reference(),
            "the authors' code knows 16 steps",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
