"""`attach`: models that hold a ViT run under the dial, and everything around it stays as it was."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import accelerate
import pytest
import timm
import torch
import transformers
from examples import perturbed, tiny_vit
from torch import Tensor, nn
from whole_models import COMPILED, PATCH, SIDE, VISION, WHOLE, whole_model

import tokendial as td
from tokendial.backbones import anatomy_of
from tokendial.reduce.tome import bipartite_matching

METHODS: dict[str, td.ReducerConfig] = {
    "tome": td.ToMe(r=6),
    "evit": td.EViT(r=6),
    "ffn_merge": td.FFNMerge(r=12),
}
CASES = [
    (name, method)
    for name, kind in WHOLE.items()
    for method in METHODS
    if not kind.windowed and (kind.has_class_token or method != "evit")
]
# Methods that reduce at the same place as ToMe, on one tower of each library.
METHODS |= {"pitome": td.PiToMe(r=6), "prune_merge": td.PruneMerge(r=6)}
CASES += [
    (name, method)
    for name in ("CLIP", "DINOv2 features", "open_clip", "timm ViT")
    for method in ("pitome", "prune_merge")
]
# What towers without a class token are offered instead of EViT's scores and sizes of one each.
METHODS |= {
    "evit_shift": td.EViT(r=6, score="shift"),
    "tome_similarity": td.ToMe(r=6, sizes="similarity"),
}
CASES += [
    (name, method)
    for name in ("SigLIP", "ViTPose", "timm NaFlexVit")
    for method in ("evit_shift", "tome_similarity")
]
# It reads the rows and columns of patches, which blocks do not get.
METHODS |= {"in_windows": td.InWindows(reduce=td.ToMe(r=2))}
CASES += [
    (name, "in_windows")
    for name in (
        "CLIP", "open_clip", "ViTPose", "DINOv2 feature maps", "DINOv3 features", "YOLOS",
        "timm ViT", "torchvision",
    )
]  # fmt: skip
WINDOWED = [name for name, kind in WHOLE.items() if kind.windowed]


def answers(name: str, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """What a model of `WHOLE` answers."""
    with torch.no_grad():
        return WHOLE[name].answer(model, images)


def method_of(name: str) -> td.ReducerConfig:
    """A method that a model of `WHOLE` can run."""
    return METHODS["ffn_merge" if WHOLE[name].windowed else "tome"]


def assert_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], atol: float = 0.0) -> None:
    """Compare all outputs of a model."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


def composed(
    name: str,
    model: nn.Module,
    images: Tensor,
    tower: str,
    reduce: td.ReducerConfig,
    protected: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What a model answers whose blocks return what a wrapped copy of its ViT gives.

    This needs nothing of `attach`: PyTorch's hooks put the features of every position, which the
    wrapped ViT restores after each block, in place of what the blocks return.
    """
    vit = model.get_submodule(tower)
    wrapped = td.wrap(copy.deepcopy(vit), reduce=reduce)
    protecting = nullcontext() if protected is None else wrapped.protecting(protected)
    with torch.no_grad(), protecting:
        steps = wrapped.steps(images, track=True, dropped="own")
        restored = [step.tokens.restore_positions() for step in steps]
    if name == "YOLOS":  # the wrapped one has its six detection tokens before the patches
        restored = [torch.cat([x[:, :1], x[:, 7:], x[:, 1:7]], dim=1) for x in restored]
    hooks = [
        # Before transformers' own hooks, which collect the hidden states.
        block.register_forward_hook(lambda _module, _args, _out, x=x: x, prepend=True)
        for block, x in zip(anatomy_of(vit).blocks, restored, strict=True)
    ]
    found = answers(name, model, images)
    for hook in hooks:
        hook.remove()
    return found


def reduced_answers(
    name: str, model: nn.Module, images: Tensor, reduce: td.ReducerConfig
) -> tuple[tuple[Tensor, ...], str]:
    """What a model answers under the dial, and the name of its tower.

    It is checked that the model answers as before at degree 0 and once the dial is detached, and
    that nothing of the dial stays in it.
    """
    before = answers(name, model, images)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]

    dial = td.attach(model, reduce)
    (tower,) = dial.towers
    reduced = answers(name, model, images)
    assert dial.cost().macs < dial.cost(0).macs
    assert all(isinstance(m, own) for m, own in zip(model.modules(), classes, strict=True))
    assert model.state_dict().keys() == weights.keys()
    dial.set_degree(0)
    assert_equal(answers(name, model, images), before)
    dial.set_degree(tower.degrees[-1])
    assert all(x.isfinite().all() for x in answers(name, model, images))

    dial.detach()
    assert_equal(answers(name, model, images), before)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])
    assert [x.shape for x in reduced] == [x.shape for x in before]
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(reduced, before, strict=True))
    return reduced, tower.name


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_model_runs_under_the_dial_and_is_as_before_without(name, method):
    model, images = whole_model(name)
    reduced, tower = reduced_answers(name, model, images, METHODS[method])
    by_hand = composed(name, model, images, tower, METHODS[method])
    scale = max(float(x.abs().max()) for x in by_hand)
    assert_equal(reduced, by_hand, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("name", ["DINOv3 features", "timm Eva", "YOLOS"])
def test_protected_patches_keep_their_positions(name):
    """Protected patches move in front of the others, and their rotary positions with them."""
    model, images = whole_model(name)
    mask = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2)) < 0.3
    with td.attach(model, td.ToMe(r=6)) as dial, dial.protecting(mask):
        found, tower = answers(name, model, images), dial.towers[0].name
    by_hand = composed(name, model, images, tower, td.ToMe(r=6), mask)
    assert_equal(found, by_hand, atol=1e-5 * max(1.0, *(float(x.abs().max()) for x in by_hand)))


def test_a_clip_is_reduced_frame_by_frame():
    """Compared with a wrapped copy, whose mean weighs tokens by their size."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = perturbed(timm.create_model("videomae_small_patch16_224", **sizes, num_classes=5))
    clips = torch.randn(2, 16, 3, 16, 16)
    reduce = td.FrameByFrame(reduce=td.ToMe(r=2))
    wrapped = td.wrap(copy.deepcopy(vit), reduce=reduce).eval()
    with td.attach(vit, reduce) as dial, torch.no_grad():
        assert dial.degrees == wrapped.degrees
        torch.testing.assert_close(vit(clips), wrapped(clips), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WINDOWED)
def test_ffns_of_windowed_encoders_run_on_merged_tokens(name):
    model, images = whole_model(name)
    reduced, tower = reduced_answers(name, model, images, METHODS["ffn_merge"])

    def merge(ffn: nn.Module, args: tuple[Tensor], _out: Tensor) -> Tensor:
        """The FFN by PyTorch's hook, with a matching that is written once more, token by token."""
        outs = []
        for x in args[0].flatten(1, -2):
            unit = x / x.norm(dim=1, keepdim=True)
            similar = unit[0::2] @ unit[1::2].T
            best, partner = similar.max(dim=1)
            group = torch.arange(len(x))
            for even in best.argsort(descending=True)[:12].tolist():
                group[2 * even] = 2 * partner[even] + 1
            means = torch.stack([x[group == g].mean(dim=0) for g in group])
            outs.append(type(ffn).forward(ffn, means))
        return torch.stack(outs).view(args[0].shape)

    ffns = [m for n, m in model.get_submodule(tower).named_modules() if n.endswith(".mlp")]
    hooks = [ffn.register_forward_hook(merge) for ffn in ffns]
    by_hand = answers(name, model, images)
    for hook in hooks:
        hook.remove()
    assert_equal(reduced, by_hand, atol=1e-4)
    with pytest.raises(ValueError, match="reduce must be FFNMerge .* got ToMe"):
        td.attach(model, td.ToMe(r=2))
    with pytest.raises(ValueError, match=r"attention in windows, .*: use td.attach\(model, red"):
        td.wrap(model.get_submodule(tower))


@pytest.mark.parametrize("name", COMPILED)
def test_the_vit_compiles_as_one_graph(name):
    torch.compiler.reset()
    model, images = whole_model(name)
    with td.attach(model, method_of(name)) as dial, torch.no_grad():
        vit = dial.towers[0].module
        compiled = torch.compile(WHOLE[name].of_vit, backend="eager", fullgraph=True)
        assert_equal(compiled(vit, images), WHOLE[name].of_vit(vit, images), atol=1e-5)


@torch.no_grad()
def test_rows_and_columns_are_read_in_one_graph():
    torch.compiler.reset()
    vit, images = tiny_vit(depth=1), torch.randn(1, 3, 32, 32)
    td.attach(vit, METHODS["in_windows"])
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), vit(images), atol=1e-5, rtol=0)


def test_a_compiled_model_follows_the_dial():
    torch.compiler.reset()
    model, images = whole_model("CLIP")
    compiled = torch.compile(WHOLE["CLIP"].answer, backend="eager")
    before = compiled(model, images)
    with td.attach(model, td.ToMe(r=6)) as dial:
        for degree in (6, 0, 3):
            dial.set_degree(degree)
            with torch.no_grad():
                assert_equal(compiled(model, images), answers("CLIP", model, images), atol=1e-5)
    assert_equal(compiled(model, images), before)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float16) for name in WHOLE), ("CLIP", torch.bfloat16)]
)
def test_a_model_in_half_precision_stays_in_it(name, dtype):
    model, images = whole_model(name)
    before = answers(name, model, images)
    with td.attach(model, method_of(name)):
        model.to(dtype)
        found = answers(name, model, images.to(dtype))
        assert next(model.parameters()).dtype == dtype
    assert [x.shape for x in found] == [x.shape for x in before]
    assert all(x.isfinite().all() for x in found)


def test_only_the_chosen_towers_get_a_dial():
    def two() -> nn.Module:
        return nn.ModuleDict({n: tiny_vit() for n in ("left", "right")})

    images = torch.randn(1, 3, 32, 32)
    for towers in ("right", ["right"], lambda name, _: name == "right"):
        model = two()
        dial = td.attach(model, td.ToMe(r=2), towers=towers)
        assert [tower.name for tower in dial.towers] == ["right"]
        dial.towers[0].set_degree(0)
        assert dial.degree == 0
        assert model["left"](images).shape == model["right"](images).shape
    both = td.attach(two(), td.ToMe(r=2))
    assert [tower.name for tower in both.towers] == ["left", "right"]
    assert both.cost(2).macs == 2 * both.towers[0].cost(2).macs
    both.towers[1].set_degree(0)
    assert (both.towers[0].degree, both.towers[1].degree) == (2, 0)


def pooled() -> nn.Module:
    """A ViT that no dial fits: it pools its first patch as if that were a class token."""
    return transformers.IJepaModel(transformers.IJepaConfig(**VISION), add_pooling_layer=True)


def experts() -> nn.Module:
    """A model whose ViT no dial fits."""
    backbone = transformers.VitPoseBackboneConfig(
        **{**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        num_experts=2,
        part_features=8,
        mlp_ratio=2,
        out_features=["stage3"],
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=6)
    return transformers.VitPoseForPoseEstimation(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.attach(nn.Linear(2, 2), td.ToMe(r=2)), r"\(Linear\) holds no ViT that is"),
        (
            lambda: td.attach(nn.Sequential(tiny_vit(patch_drop_rate=0.1), pooled()), td.ToMe(r=2)),
            r"no ViT that can have a dial: '0', VisionTransformer: it drops patches at random "
            r"\(patch_drop_rate\); '1', IJepaModel: its pooler reads the first patch",
        ),
        (
            lambda: td.attach(experts(), td.ToMe(r=2)),
            r"no ViT that can have a dial: 'backbone', VitPoseBackbone: its layers are mixtures of",
        ),
        (
            lambda: td.attach(nn.Sequential(tiny_vit(), pooled()), td.ToMe(r=2), towers="1"),
            r"'0' \(VisionTransformer\), got '1', which cannot have a dial \(IJepaModel: its poo",
        ),
        (lambda: td.attach(tiny_vit(), td.DyT()), "without weights of its own, .* got DyT"),
        (lambda: td.attach(tiny_vit(), None), "reduce must be a reduction method .* got None"),
        (lambda: td.attach(tiny_vit(), "tome"), r"reduce must be .* pass td.ToMe\(...\)"),
        (lambda: td.attach("clip", td.ToMe(r=2)), "model must be a torch.nn.Module, got 'clip'"),
        (
            lambda: td.attach(tiny_vit(), td.ToMe(r=2), towers="visual"),
            r"names of ViTs in the model: '' \(VisionTransformer\), got 'visual'",
        ),
        (lambda: td.attach(tiny_vit(), td.ToMe(r=2), towers=[]), "got none"),
        (
            lambda: td.attach(tiny_vit(), td.ToMe(r=2), towers=lambda *_: False),
            r"none of the ViTs in the model: '' \(VisionTransformer\)",
        ),
        (lambda: td.attached(tiny_vit()), "has no dial: call td.attach"),
        (lambda: td.attach(tiny_vit(), td.ToMe(r=2)).set_degree(99), r"degree must be .* got 99"),
        (lambda: td.attach(tiny_vit(), td.ToMe(r=2)).cost(-1), r"degree must be .* got -1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["SigLIP 2", "MAE features"])
def test_rows_and_columns_that_no_layer_knows_are_refused(name):
    model, _ = whole_model(name)
    with pytest.raises(
        ValueError, match="InWindows needs the rows and columns .* use another"
    ) as e:
        td.attach(model, METHODS["in_windows"])
    assert "\n" not in str(e.value)


@torch.no_grad()
def test_windows_need_all_patches_of_the_image():
    vit = tiny_vit()
    td.attach(vit, td.InWindows(reduce=td.ToMe(r=2)))
    vit(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="InWindows needs all patches .* got 60, and .* gave none"):
        vit.blocks(torch.randn(1, 61, 48))


def test_a_model_gets_one_dial_only():
    model = tiny_vit()
    dial = td.attach(model, td.ToMe(r=2))
    with pytest.raises(ValueError, match="has a dial already"):
        td.attach(model, td.ToMe(r=4))
    with pytest.raises(ValueError, match="detach"):
        td.wrap(model, reduce=td.ToMe(r=4))
    dial.detach()
    dial.detach()
    with pytest.raises(ValueError, match="the dial is detached"):
        dial.set_degree(0)
    td.attach(model, td.ToMe(r=4)).detach()


def test_a_refused_model_stays_as_it_was():
    model = tiny_vit()
    with pytest.raises(ValueError, match="without weights"):
        td.attach(model, td.DyT())
    assert not any("tower_dial" in vars(module) for module in model.modules())


@pytest.mark.parametrize("method", ["tome", "in_windows"])
def test_a_copy_has_its_own_dial(method):
    model, images = whole_model("CLIP")
    dial = td.attach(model, METHODS[method])
    reduced = answers("CLIP", model, images)
    twin = copy.deepcopy(model)
    td.attached(twin).set_degree(0)
    assert dial.degree > 0
    assert_equal(answers("CLIP", model, images), reduced)
    td.attached(twin).set_degree(dial.degree)
    nn.init.zeros_(model.visual_projection.weight)  # the copy has weights of its own
    assert_equal(answers("CLIP", twin, images), reduced)
    td.attached(twin).detach()
    assert not twin.vision_model.embeddings.patch_embedding._forward_hooks


def test_threads_share_a_model():
    model, _ = whole_model("CLIP")
    td.attach(model, td.ToMe(r=6))
    batches = [torch.randn(1 + i % 2, 3, 64, 64) for i in range(8)]
    alone = [answers("CLIP", model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: answers("CLIP", model, batch), batches))
    for one, other in zip(found, alone, strict=True):
        assert_equal(one, other, atol=1e-6)


def replica(module: Any) -> Any:
    """A replica of a module as torch.nn.DataParallel makes it, with weights of half the size."""
    twin = module._replicate_for_data_parallel()
    for name, value in module._parameters.items():
        setattr(twin, name, None if value is None else value.detach() / 2)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    return twin


@pytest.mark.parametrize("name", ["CLIP", "open_clip", "timm Eva", "torchvision"])
def test_replicas_of_data_parallel_use_their_own_weights(name):
    model, images = whole_model(name)
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter /= 2
    td.attach(model, td.ToMe(r=6))
    td.attach(halved, td.ToMe(r=6))
    assert_equal(answers(name, replica(model), images), answers(name, halved, images), atol=1e-5)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@torch.no_grad()
def test_a_model_with_a_dial_can_be_moved(device):
    """To other weights, by themselves and in torch.nn.DataParallel, which has a replica per GPU."""
    model, images = whole_model("torchvision")
    with td.attach(model, td.InWindows(reduce=td.ToMe(r=2))):
        expected = model(images)
        model.to(device, torch.float64)
        moved = images.to(device, torch.float64)
        for found in (model(moved), nn.DataParallel(model)(moved)):
            assert (found.device.type, found.dtype) == (device, torch.float64)
            torch.testing.assert_close(found.float().cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", ["hooks", "dial"])
def test_it_works_with_the_hooks_of_accelerate(first):
    model, images = whole_model("CLIP")
    before = answers("CLIP", model, images)
    with td.attach(model, td.ToMe(r=6)):
        reduced = answers("CLIP", model, images)

    def add_hooks() -> None:
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        for block in model.vision_model.encoder.layers:
            hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
            accelerate.hooks.add_hook_to_module(block, hook)

    if first == "hooks":
        add_hooks()
    dial = td.attach(model, td.ToMe(r=6))
    if first == "dial":
        add_hooks()
    assert_equal(answers("CLIP", model, images), reduced)
    dial.set_degree(0)
    assert_equal(answers("CLIP", model, images), before)
    dial.detach()
    assert_equal(answers("CLIP", model, images), before)


def test_saving_leaves_no_trace(tmp_path):
    model, images = whole_model("CLIP")
    model.save_pretrained(tmp_path / "before")
    td.attach(model, td.ToMe(r=6))
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()
    again = transformers.CLIPModel.from_pretrained(tmp_path / "after")
    with td.attach(again, td.ToMe(r=6)):
        assert_equal(answers("CLIP", again, images), answers("CLIP", model, images), atol=1e-6)


def test_training_through_the_reduced_blocks_reaches_all_weights():
    model, images = whole_model("CLIP")
    td.attach(model, td.ToMe(r=6))
    model.train()
    WHOLE["CLIP"].answer(model, images)[0].sum().backward()
    weights = dict(model.vision_model.encoder.named_parameters())
    assert all(weight.grad is not None for weight in weights.values())
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing must be off"):
        WHOLE["CLIP"].answer(model, images)


def test_attention_maps_are_refused_above_degree_0():
    vit = transformers.ViTModel(transformers.ViTConfig(**VISION)).eval()
    vit.set_attn_implementation("eager")
    dial = td.attach(vit, td.ToMe(r=6))
    images = torch.randn(1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        vit(images, output_attentions=True)
    dial.set_degree(0)
    assert len(vit(images, output_attentions=True).attentions) == 3


def test_masked_attention_is_refused_above_degree_0():
    vit = tiny_vit()
    td.attach(vit, td.ToMe(r=2))
    with pytest.raises(ValueError, match="attention mask"):
        vit.forward_features(torch.randn(1, 3, 32, 32), attn_mask=torch.zeros(17, 17))


def test_a_block_by_itself_runs_as_before():
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32).eval()
    x = torch.randn(1, 5, 192)
    before = vit.blocks[1](x)
    td.attach(vit, td.ToMe(r=1))
    assert torch.equal(vit.blocks[1](x), before)


def test_the_cost_of_a_call_counts_what_is_around_the_towers():
    model, images = whole_model("CLIP")
    dial = td.attach(model, td.ToMe(r=6))
    towers = {degree: dial.cost(degree).macs for degree in (0, 6)}
    calls = {
        degree: dial.cost_of_call(
            pixel_values=images[:1], input_ids=torch.tensor([[1, 5, 2]]), degree=degree
        )
        for degree in (0, 6)
    }
    assert dial.degree == 6
    assert towers[6] < towers[0] < calls[0]
    assert calls[0] - calls[6] == towers[0] - towers[6]
    assert dial.cost(6).tokens_per_layer == (59, 53, 47)
    assert dial.cost(0).tokens_per_layer == (65, 65, 65)


def padded_batch() -> dict[str, Tensor]:
    """Patches of two images of 4 x 6 and 3 x 5 patches, as the processor of SigLIP 2 pads them."""
    valid = torch.arange(24) < torch.tensor([[24], [15]])
    patches = torch.randn(2, 24, 3 * 8 * 8) * valid.unsqueeze(-1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": valid.int(),
        "spatial_shapes": torch.tensor([[4, 6], [3, 5]]),
    }


def siglip2() -> Any:
    """A small SigLIP 2."""
    sizes = {key: value for key, value in VISION.items() if key != "image_size"}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=64)
    return perturbed(transformers.Siglip2VisionModel(config)).eval()


def run_by_hand(vit: Any, batch: dict[str, Tensor], r: int) -> Tensor:
    """The pooled output of SigLIP 2 under ToMe, where padding has size 0 and is masked."""
    valid = batch["pixel_attention_mask"]
    x = vit.embeddings(batch["pixel_values"], batch["spatial_shapes"])
    size, place = valid.float(), torch.arange(24).expand(2, -1)
    for layer in vit.encoder.layers:
        own = layer.self_attn
        normed = layer.layer_norm1(x)
        q, k, v = (
            part(normed).unflatten(-1, (3, 16)).transpose(1, 2)
            for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        logits = q @ k.transpose(-1, -2) / 4 + size.log()[:, None, None, :]
        x = x + own.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        group = bipartite_matching(k.mean(1), r).index
        members = nn.functional.one_hot(group).float().transpose(1, 2)  # [B, groups, tokens]
        weights = members * size.unsqueeze(1)
        only_padding = weights.sum(-1, keepdim=True) == 0
        weights = torch.where(only_padding, members, weights)
        x = weights / weights.sum(-1, keepdim=True) @ x
        size = (members @ size.unsqueeze(-1)).squeeze(-1)
        place = group.gather(1, place)
        x = x + layer.mlp(layer.layer_norm2(x))
    restored = torch.stack([tokens[own] for tokens, own in zip(x, place, strict=True)])
    return vit.head(vit.post_layernorm(restored), valid)


@torch.no_grad()
def test_images_of_different_sizes_share_a_batch():
    torch.manual_seed(0)  # padding is alike, and with some weights rounding decides which merges
    vit, batch = siglip2(), padded_batch()
    before = vit(**batch).pooler_output
    with td.attach(vit, td.ToMe(r=4)) as dial:
        found = vit(**batch).pooler_output
        dial.set_degree(0)
        assert torch.equal(vit(**batch).pooler_output, before)
    torch.testing.assert_close(found, run_by_hand(vit, batch, 4), atol=1e-5, rtol=0)
    assert (found - before).abs().max() > 1e-3


@torch.no_grad()
def test_padding_of_timm_merges_without_a_trace():
    torch.manual_seed(0)
    vit = timm.create_model(
        "naflexvit_base_patch16_gap", depth=2, embed_dim=48, num_heads=3, num_classes=5
    )
    vit = perturbed(vit, std=0.3)
    valid = torch.arange(24) < torch.tensor([[24], [15]])
    coord = torch.stack([torch.arange(24) // 6, torch.arange(24) % 6], dim=-1).expand(2, -1, -1)
    # The padding of the second image is nine times the same patch, which merges first.
    coord = torch.where(valid.unsqueeze(-1), coord, 0)
    patches = torch.randn(2, 24, 768) * valid.unsqueeze(-1)
    batch = {"patches": patches, "patch_coord": coord, "patch_valid": valid}
    before = vit(batch)
    with td.attach(vit, td.ToMe(r=1)):
        found = vit(batch)
    assert (found[0] - before[0]).abs().max() > 1e-2
    torch.testing.assert_close(found[1], before[1], atol=1e-4, rtol=0)


def test_other_methods_refuse_padding():
    vit = siglip2()
    td.attach(vit, td.FFNMerge(r=2))
    with pytest.raises(ValueError, match="padding need reduce=td.ToMe.* got FFNMerge"):
        vit(**padded_batch())
