"""Video models: frame by frame with a pooling head, and tubelets (VideoMAE)."""

import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from examples import (
    ADAPTERS,
    FOR_THE_CLASS_TOKEN,
    REDUCERS,
    golden,
    perturbed,
    replay_noise,
    split,
    tiny_vit,
)
from safetensors.torch import save_file
from torch.nn.functional import multi_head_attention_forward

import tokendial as td
from tokendial.backbones import Backbone, load_weights
from tokendial.backbones.pooling import QueryPooling
from tokendial.reference import wrapped_name

CLOSE = {"atol": 1e-4, "rtol": 0}
TUBELETS = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 7,
    "frames": 4,
}


def per_frame(**kwargs):
    return perturbed(td.video_vit(tiny_vit(img_size=16, **kwargs), frames=4, num_classes=7))


def tubelets(**kwargs):
    torch.manual_seed(0)
    return perturbed(timm.create_model("videomae_small_patch16_224", **(TUBELETS | kwargs)))


MODELS = {"per frame": per_frame, "tubelets": tubelets}


def clips(count=2, frames=4, size=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, frames, 3, size, size, generator=generator)


@pytest.mark.parametrize("reduce", [None, td.ToMe(r=4), td.FrameByFrame(reduce=td.ToMe(r=2))])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_an_empty_batch_gives_the_logits_of_no_clip(make, reduce):
    model = td.wrap(make(), reduce=reduce).eval()
    assert model(clips(0)).shape == (0, 7)
    assert model.feature_map(clips(0)).shape == (0, *model.feature_map(clips(2)).shape[1:])


# The published numbers.


@pytest.mark.parametrize(
    ("adapt", "gmacs"),
    [(None, 142.53), (td.AdaptFormer(dim=64), 144.39), (td.VPT(prompts=8), 148.44)],
    ids=["full", "adaptformer", "vpt"],
)
def test_eight_frames_cost_what_the_paper_prints(adapt, gmacs):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", weight_init="skip")
        model = td.wrap(td.video_vit(vit, frames=8, num_classes=400), adapt=adapt)
    assert model.cost().gmacs == pytest.approx(gmacs, rel=1e-3)


def test_videomae_costs_what_its_authors_print():
    with torch.device("meta"):
        vit = timm.create_model("videomae_base_patch16_224", num_classes=400)
        cost = td.wrap(vit).cost()
    # 87 M and 180 G for 16 frames, https://arxiv.org/abs/2203.12602, table 7.
    assert cost.params == pytest.approx(87e6, rel=0.02)
    assert cost.gmacs == pytest.approx(180, rel=0.02)
    assert cost.tokens_per_layer == (1568,) * 12


# The per-frame model.


def reference_of_frames():
    meta, tensors = golden("video_vit")
    settings = meta["settings"]
    sizes = {k: v for k, v in settings["model"].items() if k not in ("mlp_ratio", "num_classes")}
    vit = td.video_vit(tiny_vit(**sizes), frames=settings["frames"], num_classes=5)
    adapt = td.AdaptFormer(dim=settings["ffn_num"], scale=0.1)
    model = td.wrap(vit, reduce=td.DyT(target_ratio=0.5), adapt=adapt)
    state = split(tensors, "weight.") | split(tensors, "extra.")
    td.load_reference(model, state, system="dyt_video")
    # Channels come before frames there.
    return tensors | {"input": tensors["input"].transpose(1, 2)}, model


@torch.no_grad()
def test_the_per_frame_model_equals_the_reference():
    tensors, model = reference_of_frames()
    outcome = model.eval().forward_pass(tensors["input"])
    masks = torch.stack([tokens.selected[:, 1:] for tokens in outcome.tokens], dim=1)
    assert torch.equal(masks, tensors["output.eval.token_select"].squeeze(-1))
    torch.testing.assert_close(outcome.logits, tensors["output.eval.logits"], **CLOSE)
    torch.testing.assert_close(model(tensors["input"]), outcome.logits)
    model.set_degree(0)
    complete = tensors["output.eval_complete.logits"]
    torch.testing.assert_close(model(tensors["input"]), complete, **CLOSE)


def test_a_training_step_of_the_per_frame_model_equals_the_reference(monkeypatch):
    tensors, model = reference_of_frames()
    model.train()
    replay_noise(monkeypatch, tensors["input.train.logistic_noise"])
    student = model.forward_pass(tensors["input"])
    torch.testing.assert_close(student.logits, tensors["output.train.logits"], **CLOSE)
    model.set_degree(0)
    complete = model.forward_pass(tensors["input"])

    def task_loss(logits):
        return F.cross_entropy(logits, tensors["input.labels"])

    losses = model.reducer.losses(td.passes.TrainingPasses(student, complete, None, task_loss))
    expected = split(tensors, "output.train.loss.")
    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(losses["rate"], expected["token_weighted"], **close)
    total = task_loss(student.logits) + sum(losses.values())
    torch.testing.assert_close(total, expected["total"], **close)
    total.backward()
    ours = dict(model.named_parameters())
    for name, value in split(tensors, "output.train.grad.").items():
        gradient = ours[wrapped_name(name, "dyt_video")].grad
        torch.testing.assert_close(gradient, value, rtol=1e-3, atol=5e-6)


@torch.no_grad()
def test_pooling_is_cross_attention_of_one_query():
    pool = perturbed(QueryPooling(48, 5, num_heads=3, frames=5), std=0.2)
    x = torch.randn(10, 2, 48)
    joined = x.reshape(2, 10, 48)
    q = pool.norm_q(pool.query).expand(2, -1, -1).transpose(0, 1)
    k, v = pool.norm_k(joined).transpose(0, 1), pool.norm_v(joined).transpose(0, 1)
    biases = torch.cat([pool.q.bias, torch.zeros(48), pool.v.bias])
    pooled, _ = multi_head_attention_forward(
        q, k, v, 48, 3, None, biases, None, None, False, 0.0, pool.proj.weight, pool.proj.bias,
        training=False, use_separate_proj_weight=True, q_proj_weight=pool.q.weight,
        k_proj_weight=pool.k.weight, v_proj_weight=pool.v.weight,
    )  # fmt: skip
    torch.testing.assert_close(pool(x), pool.head(pooled[0]))


@torch.no_grad()
def test_pooling_counts_a_merged_token_as_often_as_its_patches():
    pool = perturbed(QueryPooling(48, 5, num_heads=3, frames=1), std=0.2)
    x = torch.randn(2, 3, 48)
    twice = torch.cat([x, x[:, :1]], dim=1)
    torch.testing.assert_close(pool(x, torch.tensor([[2.0, 1.0, 1.0]] * 2)), pool(twice))


@torch.no_grad()
def test_the_order_of_frames_does_not_matter_to_the_per_frame_model():
    model = td.wrap(per_frame(), reduce=td.EViT(layers=(2,)))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(clips()[:, order]), model(clips()), atol=1e-5, rtol=1e-5)


# VideoMAE.


@torch.no_grad()
def test_videomae_equals_the_reference(tmp_path):
    meta, tensors = golden("video_vit_videomae")
    settings = meta["settings"]["model"]
    renamed = {"all_frames": "frames", "tubelet_size": "tubelet"}
    sizes = {renamed.get(k, k): v for k, v in settings.items()}
    vit = timm.create_model("videomae_small_patch16_224", **sizes)
    save_file(split(tensors, "weight."), tmp_path / "weights.safetensors")
    load_weights(vit, tmp_path / "weights.safetensors")
    positions = tensors["output.sinusoid_pos_embed"]
    torch.testing.assert_close(vit.patch_embed.positions, positions)
    video = tensors["input"].transpose(1, 2)
    torch.testing.assert_close(
        vit.eval()(video), tensors["output.logits_without_adapters"], **CLOSE
    )
    tuning = meta["settings"]["tuning_config"]
    adapt = td.AdaptFormer(dim=tuning["ffn_num"], scale=float(tuning["ffn_adapter_scalar"]))
    model = td.wrap(vit, adapt=adapt).eval()
    adapters = {wrapped_name(n, "dyt"): v for n, v in split(tensors, "extra.").items()}
    assert not model.load_state_dict(adapters, strict=False).unexpected_keys
    patches = tensors["output.patch_tokens"]  # without positions
    torch.testing.assert_close(model.anatomy.embed(video).x, patches + positions, **CLOSE)
    for block, step in enumerate(model.steps(video)):
        expected = tensors[f"output.block{block}.tokens"]
        torch.testing.assert_close(step.tokens.x, expected, **CLOSE)
    torch.testing.assert_close(model(video), tensors["output.logits"], **CLOSE)


def videomae_names(state, form):
    """A state dict of ours by the names of VideoMAE's code, or of transformers."""
    named = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            block = name.removesuffix("attn.qkv.bias")
            inner = "attention.attention." if form == "transformers" else "attn."
            named |= {f"{block}{inner}q_bias": q, f"{block}{inner}v_bias": v}
        elif name.endswith("attn.qkv.weight") and form == "transformers":
            block = name.removesuffix("attn.qkv.weight")
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[f"{block}attention.attention.{part}.weight"] = rows.clone()
        else:
            named[name] = value
    if form == "fine-tuned":
        return named
    if form == "pre-trained":
        kept = {n: v for n, v in named.items() if not n.startswith(("fc_norm.", "head."))}
        kept |= {"norm.weight": torch.ones(48), "norm.bias": torch.zeros(48)}
        extra = {"mask_token": torch.zeros(1, 1, 48), "decoder.head.bias": torch.zeros(3)}
        return {f"encoder.{n}": v for n, v in kept.items()} | extra
    for ours, theirs in (
        ("patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
        ("blocks.", "videomae.encoder.layer."),
        (".attn.proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
        ("head.", "classifier."),
    ):
        named = {name.replace(ours, theirs): value for name, value in named.items()}
    return named


@pytest.mark.parametrize("form", ["fine-tuned", "pre-trained", "transformers"])
@torch.no_grad()
def test_checkpoints_of_videomae_load(form, tmp_path):
    vit = tubelets()
    for block in vit.blocks:
        block.attn.qkv.bias[48:96] = 0.0  # VideoMAE has no bias of keys
    state = videomae_names(vit.state_dict(), form)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {name: value.clone() for name, value in state.items()}}, path)
    args = {k: v for k, v in TUBELETS.items() if k != "frames"}
    loaded = Backbone(
        name="videomae_small_patch16_224", weights=str(path), args=args, frames=4
    ).create()
    same = loaded.eval().forward_features(clips())
    torch.testing.assert_close(same, vit.forward_features(clips()))
    if form != "pre-trained":
        torch.testing.assert_close(loaded(clips()), vit(clips()))


@pytest.mark.parametrize("name", ["pos_embed", "encoder.pos_embed"])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_positions_of_videomae_are_refused_if_they_were_learnt(tmp_path, name, shift):
    vit = tubelets()
    form = "pre-trained" if name.startswith("encoder.") else "fine-tuned"
    state = videomae_names(vit.state_dict(), form)
    state[name] = vit.patch_embed.positions + shift
    save_file(state, tmp_path / "model.safetensors")
    if shift:
        with pytest.raises(ValueError, match=r"its positions \(pos_embed\) were learnt, those of"):
            load_weights(vit, tmp_path)
    else:
        load_weights(vit, tmp_path)


@torch.no_grad()
def test_learnt_positions_of_videomae_load(tmp_path):
    fixed = tubelets()
    state = videomae_names(fixed.state_dict(), "fine-tuned")
    shift = torch.randn_like(fixed.patch_embed.positions)
    state["pos_embed"] = fixed.patch_embed.positions + shift
    save_file(state, tmp_path / "model.safetensors")
    learnt = tubelets(learnt_positions=True)
    load_weights(learnt, tmp_path)
    assert not torch.allclose(learnt.eval()(clips()), fixed.eval()(clips()), atol=1e-2)
    fixed.patch_embed.positions += shift
    torch.testing.assert_close(learnt(clips()), fixed(clips()))
    state.pop("pos_embed")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing.* the first is patch_embed\.positions"):
        load_weights(tubelets(learnt_positions=True), tmp_path)


def test_a_model_with_learnt_positions_is_saved_and_trains_them_only_when_all_weights_train(
    tmp_path,
):
    args = {k: v for k, v in TUBELETS.items() if k != "frames"} | {"learnt_positions": True}
    backbone = Backbone(name="videomae_small_patch16_224", weights=None, args=args, frames=4)
    model = td.wrap(backbone.create(), adapt=td.LinearProbe())
    name = "vit.patch_embed.positions"
    assert name not in {n for n, p in model.named_parameters() if p.requires_grad}
    whole = td.wrap(backbone.create(), adapt=td.FullFineTuning(), backbone=backbone)
    with torch.no_grad():
        dict(whole.named_parameters())[name].add_(0.1)
    whole.save_pretrained(tmp_path)
    loaded = td.load(tmp_path)
    torch.testing.assert_close(loaded.state_dict()[name], whole.state_dict()[name])


def test_what_videomaes_pre_training_alone_needs_is_left_out_and_named(tmp_path, caplog):
    vit = tubelets()
    save_file(videomae_names(vit.state_dict(), "pre-trained"), tmp_path / "model.safetensors")
    load_weights(vit, tmp_path)
    assert "left out: 1 decoder, 1 mask_token, 2 norm" in caplog.text


def test_a_norm_that_videomae_would_not_apply_is_refused(tmp_path):
    vit = tubelets()
    state = videomae_names(vit.state_dict(), "fine-tuned")
    save_file(state | {"norm.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected; the first is norm\.weight"):
        load_weights(vit, tmp_path)


def test_transformers_gives_the_same_logits(tmp_path):
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=192, num_frames=4, tubelet_size=2, num_labels=7, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = perturbed(transformers.VideoMAEForVideoClassification(config))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    args = {k: v for k, v in TUBELETS.items() if k != "frames"} | {"depth": 2}
    weights = str(tmp_path / "model.safetensors")
    backbone = Backbone(name="videomae_small_patch16_224", weights=weights, args=args, frames=4)
    ours = backbone.create().eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(clips()), theirs(clips()).logits, atol=1e-4, rtol=1e-4)


# Every method on both.


VARIANTS = {
    "evit shift": td.EViT(layers=(1, 2), score="shift"),
    "prune_merge shift": td.PruneMerge(score="shift"),
    "tome similarity": td.ToMe(sizes="similarity"),
}


def fitting(reduce):
    """The example, on sequences of 16 patches a frame or 32 a clip without a class token."""
    changes = {}
    if getattr(reduce, "score", None) == "class":
        changes = {"score": "mean"}
    if isinstance(reduce, td.EViT):
        changes["fuse_weights"] = "normalised"
    if isinstance(
        reduce, td.ToMe | td.PiToMe | td.PruneMerge | td.LearntMetric | td.PYRA | td.FFNMerge
    ):
        changes["r"] = 3
    return dataclasses.replace(reduce, **changes)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", [*sorted({*REDUCERS} - {"in_windows"}), *VARIANTS, None])
@torch.no_grad()
def test_reduction_of_clips(method, kind):
    reduce = fitting((REDUCERS | VARIANTS)[method]) if method else None
    torch.manual_seed(0)
    model = td.wrap(MODELS[kind](), reduce=reduce).eval()
    logits = model(clips(3))
    assert logits.shape == (3, 7)
    torch.testing.assert_close(model(clips(3)[1:2]), logits[1:2], atol=1e-5, rtol=1e-5)
    steps = {"per frame": 4, "tubelets": 2}[kind]
    assert model.feature_map(clips(3)).shape == (3, steps, 48, 4, 4)
    if reduce:
        assert model.cost().macs < model.cost(0).macs
        whole = td.wrap(MODELS[kind]())(clips(3))
        assert not torch.equal(logits, whole)
        model.set_degree(0)
        torch.testing.assert_close(model(clips(3)), whole)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", sorted(ADAPTERS.keys() - FOR_THE_CLASS_TOKEN))
def test_adapters_on_clips(method, kind, tmp_path):
    adapt = ADAPTERS[method]
    model = td.wrap(MODELS[kind](), reduce=td.DyT(), adapt=adapt).train()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {f"vit.head.{name}" for name, _ in model.vit.head.named_parameters()}
    assert head < names or method == "linear"
    F.cross_entropy(model(clips()), torch.tensor([1, 2])).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in head)
    perturbed(model.adapter)
    model.save_pretrained(tmp_path)
    loaded = td.load(tmp_path, vit=MODELS[kind]())
    with torch.no_grad():
        torch.testing.assert_close(loaded(clips()), model.eval()(clips()))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", sorted(FOR_THE_CLASS_TOKEN))
def test_adapters_for_the_class_token_refuse_clips(method, kind):
    with pytest.raises(ValueError, match=r"reads the class token\s+alone: not .* a clip"):
        td.wrap(MODELS[kind](), adapt=ADAPTERS[method])


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_saved_video_model_is_built_again_by_its_name(kind, tmp_path):
    name, args = {
        "per frame": ("vit_tiny_patch16_224", {"patch_size": 4}),
        "tubelets": ("videomae_small_patch16_224", {"patch_size": 4}),
    }[kind]
    args |= {"img_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    backbone = Backbone(name=name, weights=None, args=args, frames=4)
    model = td.wrap(backbone.create(), reduce=td.ToMe(r=2), adapt=td.LoRA(), backbone=backbone)
    model.save_pretrained(tmp_path / "one")
    assert torch.equal(td.load(tmp_path / "one")(clips()), model.eval()(clips()))
    # A model that was not built from a description knows itself.
    model = td.wrap(backbone.create(), adapt=td.FullFineTuning())
    model.save_pretrained(tmp_path / "two")
    assert torch.equal(td.load(tmp_path / "two")(clips()), model.eval()(clips()))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_adapters_take_turns_with_heads_of_their_own(kind, tmp_path):
    model = td.wrap(MODELS[kind](), adapt=td.LoRA(rank=2)).eval()
    before = model(clips())
    model.add_adapter("other", td.AdaptFormer(dim=4), num_classes=3)
    model.set_adapter("other")
    assert model(clips()).shape == (2, 3)
    other = model(clips())
    model.save_adapter("other", tmp_path)
    model.set_adapter("default")
    assert torch.equal(model(clips()), before)
    model.load_adapter("again", tmp_path)
    model.set_adapter("again")
    assert torch.equal(model.eval()(clips()), other)


# One time step at a time.


ONE_STEP = {name: fitting(REDUCERS[name]) for name in ("tome", "evit", "dynamicvit", "ffn_merge")}
ONE_STEP["dyt"] = td.DyT(selection="topk")
ONE_STEP["evit of one"] = dataclasses.replace(ONE_STEP["evit"], keep_rate=15 / 16, layers=(2,))


@pytest.mark.parametrize("prompts", [None, "deep", "shallow"])
@pytest.mark.parametrize("reduce", ONE_STEP.values(), ids=ONE_STEP)
@torch.no_grad()
def test_frame_by_frame_equals_the_method_on_each_time_step(reduce, prompts):
    """With tokens that are the same at every time step, each loses the same ones."""

    def model_of(frames, reduce):
        # As many for each time step: attention sees them, and matching goes by even and odd places.
        adapt = td.VPT(prompts=frames, deep=prompts == "deep") if prompts else None
        torch.manual_seed(0)
        model = td.wrap(tubelets(frames=frames), reduce=reduce, adapt=adapt).eval()
        model.vit.patch_embed.positions[:] = 0
        return model

    model, one = model_of(6, td.FrameByFrame(reduce=reduce)), model_of(2, reduce)
    if prompts:
        model.adapter.prompts.copy_(one.adapter.prompts.repeat(1, 3, 1))
    pair = clips(2, frames=2)
    still = pair.repeat(1, 3, 1, 1, 1)
    # Attention over three equal parts is that over one of them: the model of one time step.
    torch.testing.assert_close(model(still), one(pair), atol=1e-5, rtol=1e-5)
    maps = one.feature_map(pair).expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(model.feature_map(still), maps, atol=1e-5, rtol=1e-5)
    assert model.cost().tokens_per_layer == tuple(3 * n for n in one.cost().tokens_per_layer)


@torch.no_grad()
def test_jointly_tokens_merge_over_time():
    model = td.wrap(tubelets(), reduce=td.ToMe(r=8)).eval()
    model.vit.patch_embed.positions[:] = 0
    still = clips(1, frames=2).repeat(1, 2, 1, 1, 1)
    tokens = next(model.steps(still, track=True)).tokens
    first, second = tokens.origin.chunk(2, dim=1)
    assert (first == second).any()


def test_frame_by_frame_is_saved_and_read(tmp_path):
    reduce = td.FrameByFrame(reduce=td.ToMe(r=3))
    model = td.wrap(tubelets(), reduce=reduce, adapt=td.LinearProbe())
    model.save_pretrained(tmp_path)
    assert td.load(tmp_path, vit=tubelets()).reduce_config == reduce
    with pytest.raises(ValueError, match=r"reduce must be another reduction method, got 3\."):
        td.FrameByFrame(reduce=3)
    with pytest.raises(ValueError, match="leave frame_by_frame out"):
        td.FrameByFrame(reduce=td.DyT())


# Mistakes.


@pytest.mark.parametrize("kind", MODELS)
def test_clips_that_do_not_fit_are_refused(kind):
    model = td.wrap(MODELS[kind]())
    for wrong in (clips(2, frames=3), clips(2)[:, 0]):
        with pytest.raises(
            ValueError, match=r"clips must be \[batch, 4 frames, 3, height, width\]"
        ):
            model(wrong)


def test_models_that_cannot_be_made_are_refused():
    with pytest.raises(ValueError, match="create it with global_pool=''"):
        td.video_vit(tiny_vit(global_pool="avg"), num_classes=3)
    with pytest.raises(ValueError, match=r"frames must be an integer of at least 1, got 0"):
        td.video_vit(tiny_vit(), frames=0, num_classes=3)
    with pytest.raises(ValueError, match=r"frames must be a multiple of tubelet \(2\), got 3"):
        Backbone(name="videomae_small_patch16_224", weights=None, frames=3).create()
    with pytest.raises(ValueError, match="a decoder reads images, but this model takes clips"):
        td.wrap(per_frame(), decode=td.LinearDecoder())
