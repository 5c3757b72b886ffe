import pytest
import timm
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td

# Name, arguments, and a second image size that is not a square.
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {}, (64, 96)),
    "augreg": ("vit_small_patch32_224.augreg_in21k", {}, (96, 64)),
    "deit": ("deit_tiny_patch16_224", {}, (64, 96)),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}, (64, 96)),
    "deit3": ("deit3_small_patch16_224", {}, (96, 64)),
    "dino": ("vit_small_patch16_224.dino", {}, (64, 96)),
    "dinov2": ("vit_small_patch14_dinov2", {"num_classes": 5}, (56, 84)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 5}, (84, 56)),
    "mae": ("vit_base_patch16_224.mae", {"global_pool": "avg", "num_classes": 5}, (64, 96)),
    "clip": ("vit_base_patch32_clip_224", {}, (64, 96)),
    "siglip": ("vit_base_patch16_siglip_224", {"num_classes": 5}, (64, 96)),
    "siglip average": ("vit_base_patch16_siglip_gap_224", {"num_classes": 5}, (64, 96)),
}
SQUARE = {14: (70, 70), 16: (64, 64), 32: (64, 64)}


def backbone(name: str, size: tuple[int, int] | None = None, **kwargs):
    model, arguments, other = BACKBONES[name]
    patch = 14 if "patch14" in model else 32 if "patch32" in model else 16
    size = size or SQUARE[patch]
    torch.manual_seed(0)
    vit = timm.create_model(model, img_size=size, depth=2, **(arguments | kwargs))
    return perturbed(vit, std=0.02), images(2, *size), other


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_degree_0_equals_timm(name):
    vit, pictures, _ = backbone(name)
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    torch.testing.assert_close(model(pictures), vit(pictures), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_degree_0_equals_timm_on_an_image_that_is_not_square(name):
    vit, pictures, _ = backbone(name, BACKBONES[name][2])
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    torch.testing.assert_close(model(pictures), vit(pictures), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
@torch.no_grad()
def test_degree_0_equals_timm_at_any_size_with_dynamic_images(size):
    vit, _, _ = backbone("vit", dynamic_img_size=True)
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    torch.testing.assert_close(model(images(2, *size)), vit(images(2, *size)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_feature_map_has_the_full_grid_at_the_largest_degree(name):
    vit, pictures, _ = backbone(name, BACKBONES[name][2])
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    model.set_degree(model.degrees[-1])
    rows, columns = vit.patch_embed.grid_size
    assert model.feature_map(pictures).shape == (2, vit.embed_dim, rows, columns)
    assert model(pictures).isfinite().all()


@pytest.mark.parametrize("rest", ["merge", "argmax", "drop"])
@pytest.mark.parametrize("name", ["deit distilled", "dinov2 registers", "clip"])
@torch.no_grad()
def test_evit_keeps_the_full_grid_for_feature_maps(name, rest):
    vit, pictures, _ = backbone(name)
    model = td.wrap(vit, reduce=td.EViT(keep_rate=0.1, layers=(1, 2), rest=rest))
    rows, columns = vit.patch_embed.grid_size
    feature_map = model.feature_map(pictures)
    assert feature_map.shape == (2, vit.embed_dim, rows, columns)
    assert feature_map.isfinite().all()


@torch.no_grad()
def test_feature_maps_at_degree_0_are_timms_intermediates():
    vit, pictures, _ = backbone("dinov2 registers")
    model = td.wrap(vit, reduce=td.ToMe(r=0))
    inner = vit.forward_intermediates(pictures, indices=[0], intermediates_only=True)
    last = vit.forward_intermediates(pictures, indices=[1], norm=True, intermediates_only=True)
    torch.testing.assert_close(model.feature_map(pictures, layer=1), inner[0])
    torch.testing.assert_close(model.feature_map(pictures), last[0])


def test_both_heads_of_a_distilled_model_train():
    vit, pictures, _ = backbone("deit distilled")
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=td.Linear())
    model(pictures).sum().backward()
    assert vit.head.weight.grad.abs().sum() > 0
    assert vit.head_dist.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layer", [0, 5])
def test_a_layer_that_is_not_there_has_no_feature_map(vit, layer):
    with pytest.raises(ValueError, match=rf"layer must lie in \[1, 4\] .*, got {layer}"):
        td.wrap(vit).feature_map(images(), layer=layer)


@pytest.mark.parametrize("degree", [-1, 33, 1.5, True, None])
def test_a_degree_that_is_not_offered_raises(vit, degree):
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got"):
        td.wrap(vit, reduce=td.ToMe(r=4)).set_degree(degree)


def test_an_r_that_is_not_offered_raises(vit):
    with pytest.raises(ValueError, match=r"degree must be an integer in \[0, 32\], got 99"):
        td.wrap(vit, reduce=td.ToMe(r=99))


@torch.no_grad()
def test_turning_the_dial_and_back_gives_the_same_bits(vit):
    model = td.wrap(vit, reduce=td.ToMe(r=4))
    before = model(images())
    model.set_degree(16)
    assert not torch.equal(model(images()), before)
    model.set_degree(4)
    assert torch.equal(model(images()), before)


def test_the_timm_model_is_left_as_it_is(vit):
    names = set(vit.state_dict())
    model = td.wrap(vit, reduce=td.ToMe(r=4), adapt=td.DenseAdapter(dim=4))
    assert model.vit is vit
    assert set(vit.state_dict()) == names


def test_gradients_stop_at_the_frozen_backbone(vit):
    model = td.wrap(vit, reduce=td.EViT(layers=(2,)), adapt=td.AdaptFormer(dim=4))
    model(images()).sum().backward()
    assert vit.blocks[0].mlp.fc1.weight.grad is None
    assert vit.head.weight.grad is not None


@pytest.mark.parametrize("reduce", [td.ToMe(r=0), td.EViT(r=0)], ids=["tome", "evit"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # the compiler's own, of the machine and of Python
def test_compiled_as_one_graph_equals_eager(reduce, backend):
    torch._dynamo.reset()
    model = td.wrap(tiny_vit(depth=2), reduce=reduce)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    # The default compiler takes its time; one degree of it stands for the three.
    for degree in (0, 8, 16) if backend == "aot_eager" else (8,):
        model.set_degree(degree)
        torch.testing.assert_close(compiled(images()), model(images()), atol=1e-5, rtol=0)
