"""ProxyCLIP: the authors' attention, an independent numpy run of small models, the dial."""

import copy

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from examples import golden, perturbed
from proxy_clip_numpy import name_embedding, picture_logits, weights_of, window_logits
from torch import nn
from zoo import backbone

import tokendial as td
from tokendial.open_vocabulary import proxy_attention
from tokendial.open_vocabulary.class_lists import imagenet_prompts
from tokendial.tokens import from_grid, to_grid

SIDE = 48
VISION = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": SIDE}
TEXT = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 49408}
CLASSES = ["cat", ("sofa", "couch"), "grass"]
CONFIG = td.ProxyCLIPConfig(shortest_side=SIDE, window=SIDE, stride=16, multiple=1)


def tiny_clip(**vision):
    torch.manual_seed(0)
    return perturbed(open_clip.CLIP(embed_dim=20, vision_cfg=VISION | vision, text_cfg=TEXT))


def tiny_dino(**kwargs):
    torch.manual_seed(1)
    sizes = {"img_size": SIDE, "patch_size": 6, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return perturbed(timm.create_model("vit_small_patch8_224.dino", **(sizes | kwargs)), std=0.1)


def small_model(config=CONFIG, **kwargs):
    model = td.ProxyCLIP(tiny_clip(), tiny_dino(), config=config, **kwargs)
    model.set_classes(CLASSES)
    return model.eval()


def pictures(count=2, height=SIDE, width=SIDE):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def test_the_attention_equals_that_of_the_authors():
    meta, tensors = golden("proxy_attention")
    settings = meta["settings"]
    block = nn.MultiheadAttention(settings["dim"], settings["heads"])
    block.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("weight.")})
    x, dim = tensors["input.x"][:, 1:], settings["dim"]
    values = F.linear(x, block.in_proj_weight[2 * dim :], block.in_proj_bias[2 * dim :])
    out = proxy_attention(
        to_grid(values, tuple(settings["clip_grid"])),
        tensors["input.proxy_features"],
        beta=settings["beta"],
        gamma=settings["gamma"],
    )
    torch.testing.assert_close(block.out_proj(out), tensors["output.x"], atol=1e-5, rtol=1e-5)


def test_an_image_of_one_colour_gives_equal_weights():
    values, features = torch.randn(1, 6, 4, 4), torch.ones(1, 5, 4, 4)
    out = proxy_attention(values, features)
    expected = values.mean(dim=(2, 3)).unsqueeze(1).expand(1, 16, 6)
    torch.testing.assert_close(out, expected)


@pytest.fixture(scope="module")
def reference():
    """The small model, and a function that computes the logits of a window in numpy."""
    model = small_model()
    clip, dino = weights_of(model.clip), weights_of(model.proxy.vit)
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    names = [
        name_embedding(
            tokenizer([prompt.replace("{}", name) for prompt in imagenet_prompts()]).numpy(),
            clip,
            depth=2,
            heads=2,
        )
        for name in ("cat", "sofa", "couch", "grass")
    ]

    def logits_of(image):
        return window_logits(image, clip, 3, dino, 3, np.array(names))

    return model, logits_of


def test_a_window_equals_the_formulas(reference):
    model, logits_of = reference
    windows = pictures()
    expected = torch.from_numpy(np.stack([logits_of(w.double().numpy()) for w in windows]))
    found = model.window_logits(windows).double()
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(windows).double(), expected, atol=1e-4, rtol=0)


def test_a_picture_of_several_windows_equals_the_formulas(reference):
    model, logits_of = reference
    (picture,) = pictures(1, SIDE, 90)
    expected = picture_logits(picture.double().numpy(), SIDE, 16, logits_of)
    found = model(picture.unsqueeze(0))[0].double()
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-4, rtol=0)
    # From logits to classes: one softmax over all names, the largest name of each class.
    e = np.exp(40 * expected)
    p = e / e.sum(0)
    classes = np.stack([p[0], np.maximum(p[1], p[2]), p[3]])
    probabilities = model.probabilities(picture.unsqueeze(0))[0]
    torch.testing.assert_close(probabilities.double(), torch.from_numpy(classes), atol=4e-3, rtol=0)
    sure = np.sort(classes, 0)[-1] - np.sort(classes, 0)[-2] > 0.01
    predicted = model.predict(picture.unsqueeze(0))[0].numpy()
    assert sure.mean() > 0.5
    assert (predicted == classes.argmax(0))[sure].all()


@torch.no_grad()
def test_the_dial_acts_in_both_towers_and_is_undone():
    """Equals a composition by hand of the two wrapped towers.

    Catches: tokens that are not restored before the last block or in the proxy's map; a reduction
    in the last block of CLIP; towers that are exchanged.
    """
    model = small_model(reduce=td.ToMe(r=4), proxy_reduce=td.EViT(keep_rate=0.6, layers=(1, 2)))
    windows = pictures()
    assert (model.degree, model.degrees[0]) == (4, 0)
    merged = model.window_logits(windows)

    clip_images = (windows - model._clip_mean) / model._clip_std
    proxy_images = (windows - model._proxy_mean) / model._proxy_std
    tower, visual = model.tower, model.clip.visual
    x = from_grid(tower.feature_map(clip_images, layer=2), 36)
    block = visual.transformer.resblocks[-1]
    weight, bias = block.attn.in_proj_weight[96:], block.attn.in_proj_bias[96:]
    values = F.linear(block.ln_1(x), weight, bias)
    out = proxy_attention(to_grid(values, (6, 6)), model.proxy.feature_map(proxy_images))
    y = F.normalize(visual.ln_post(block.attn.out_proj(out)) @ visual.proj, dim=-1)
    expected = F.interpolate(to_grid(y @ model._text.T, (8, 8)), (SIDE, SIDE), mode="bilinear")
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)

    costs = [model.cost()]
    assert costs[0].tokens_per_layer[:2] == (33, 29)
    for turn in (lambda: model.set_degree(0), lambda: model.set_proxy_degree(0)):
        before = model.window_logits(windows)
        turn()
        assert not torch.allclose(model.window_logits(windows), before, atol=1e-5)
        costs.append(model.cost())
    assert costs[0].macs < costs[1].macs < costs[2].macs
    assert costs[2].tokens_per_layer == (37, 37, 65, 65)
    torch.testing.assert_close(model.window_logits(windows), small_model().window_logits(windows))
    with pytest.raises(ValueError, match="degree must be"):
        model.set_proxy_degree(99)


@torch.no_grad()
def test_class_0_below_the_threshold():
    picture = pictures(1, 60, 100)
    model = small_model()
    probabilities = model.probabilities(picture)
    assert probabilities.shape == (1, 3, 60, 100)
    best, index = probabilities.max(dim=1)
    assert torch.equal(model.predict(picture), index)
    threshold = best.median().item()
    low = small_model(config=td.ProxyCLIPConfig(**_settings(threshold=threshold)))
    below = low.predict(picture)
    assert torch.equal(below[best > threshold + 1e-4], index[best > threshold + 1e-4])
    assert (below[best < threshold - 1e-4] == 0).all()
    assert not torch.equal(below, index)


def _settings(**changes):
    fields = ("shortest_side", "window", "stride", "multiple")
    return {name: getattr(CONFIG, name) for name in fields} | changes


@torch.no_grad()
def test_the_shorter_side_is_resized_first():
    model = small_model()
    assert model(pictures(1, 96, 144)).shape == (1, 4, 48, 72)
    assert model(pictures(1, 30, 24)).shape == (1, 4, 60, 48)


@torch.no_grad()
def test_windows_are_padded_with_the_mean_colour_on_all_sides():
    model = small_model()
    window = pictures(1, 40, 44)
    padded = model._clip_mean.expand(1, 3, SIDE, SIDE).clone()
    padded[..., 4:44, 2:46] = window
    expected = model.window_logits(padded)[..., 4:44, 2:46]
    torch.testing.assert_close(model.window_logits(window), expected, atol=1e-5, rtol=1e-5)
    assert model._pad(pictures(1, SIDE, SIDE))[0].shape == (1, 3, SIDE, SIDE)
    wide = small_model(config=td.ProxyCLIPConfig(**_settings(multiple=56)))
    assert wide._pad(pictures(1, SIDE, SIDE))[0].shape == (1, 3, 168, 168)


class FakeTokenizer:
    """Stands for transformers' tokenizer of CLIP, whose files are not at hand."""

    def __call__(self, prompts, **options):
        assert options == {"padding": True, "truncation": True, "return_tensors": "pt"}
        ids = open_clip.tokenizer.SimpleTokenizer()(prompts)
        end = ids.argmax(dim=1, keepdim=True)
        mask = (torch.arange(ids.shape[1]) <= end).long()
        return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_a_clip_of_transformers_gives_the_same():
    """The weights of the small model of open_clip, under the names of transformers."""
    model = small_model(reduce=td.ToMe(r=4))
    clip = as_transformers(model.clip)
    other = td.ProxyCLIP(
        clip, tiny_dino(), reduce=td.ToMe(r=4), tokenizer=FakeTokenizer(), config=CONFIG
    )
    other.set_classes(CLASSES)
    expected = model.window_logits(pictures())
    torch.testing.assert_close(other.window_logits(pictures()), expected, atol=1e-4, rtol=1e-4)


def as_transformers(clip):
    common = {"intermediate_size": 192, "hidden_act": "gelu"}
    vision = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3} | common
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | common
    config = transformers.CLIPConfig(
        vision_config=vision | {"image_size": SIDE, "patch_size": 8},
        text_config=text | {"intermediate_size": 128, "eos_token_id": 49407},
        projection_dim=20,
    )
    state = clip.state_dict()
    new = {
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    norms = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for kind in ("weight", "bias"):
        for old, name in norms.items():
            new[f"vision_model.{name}.{kind}"] = state[f"visual.{old}.{kind}"]
        new[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for tower, prefix, depth in (("vision", "visual.", 3), ("text", "", 2)):
            for n in range(depth):
                old = f"{prefix}transformer.resblocks.{n}"
                name = f"{tower}_model.encoder.layers.{n}"
                parts = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
                for part, value in zip("qkv", parts, strict=True):
                    new[f"{name}.self_attn.{part}_proj.{kind}"] = value
                for theirs, ours in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    new[f"{name}.{theirs}.{kind}"] = state[f"{old}.{ours}.{kind}"]
    model = transformers.CLIPModel(config).eval()
    missing, unexpected = model.load_state_dict(new, strict=False)
    assert not unexpected
    assert all(name in ("logit_scale",) or "position_ids" in name for name in missing)
    return model


def test_sparse_tuning_of_the_tower_trains_and_acts_in_the_masks():
    clip, dino = tiny_clip(), tiny_dino()
    plain = td.ProxyCLIP(copy.deepcopy(clip), copy.deepcopy(dino), config=CONFIG)
    reduce, adapt = td.EViT(keep_rate=0.7, layers=(2,)), td.DenseAdapter(dim=4)
    tower = td.wrap(clip.visual, reduce=reduce, adapt=adapt)
    optimizer = torch.optim.SGD(tower.trainable_parameters(), lr=1.0)
    loss = tower.train()(pictures()).square().mean()
    loss.backward()
    trained = dict(tower.adapter.named_parameters())
    assert all(p.grad is not None for p in trained.values())
    # Fresh up-projections are zeros, so the gradient reaches them first.
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if ".up." in name)
    assert all(p.grad is None for p in clip.visual.parameters())
    optimizer.step()

    model = td.ProxyCLIP(clip, dino, clip_tower=tower, config=CONFIG).eval()
    for each in (model, plain):
        each.set_classes(CLASSES)
    model.set_degree(0)
    with torch.no_grad():
        tuned = model.window_logits(pictures())
        assert not torch.allclose(tuned, plain.window_logits(pictures()), atol=1e-5)
        # Adapters of blocks 1 and 2 act; that of the last block has no FFN to stand beside.
        for parameter in tower.adapter.layers[2].parameters():
            parameter += 1.0
        torch.testing.assert_close(model.window_logits(pictures()), tuned)
        for parameter in tower.adapter.layers[1].parameters():
            parameter += 1.0
        assert not torch.allclose(model.window_logits(pictures()), tuned, atol=1e-5)


def test_masks_can_train_the_tower():
    clip = tiny_clip()
    tower = td.wrap(clip.visual, reduce=td.ToMe(r=4), adapt=td.AdaptFormer(dim=4))
    model = td.ProxyCLIP(clip, tiny_dino(), clip_tower=tower, config=CONFIG)
    model.set_classes(CLASSES)
    model.window_logits(pictures()).square().mean().backward()
    ups = [up.weight.grad for up in tower.adapter.up]
    assert ups[0].abs().sum() > 0
    assert ups[1].abs().sum() > 0
    assert ups[2] is None


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("dinov2 registers", {"dynamic_img_size": True}),
        ("dinov3", {"dynamic_img_size": True}),
        ("hf dinov2", {}),
    ],
)
@torch.no_grad()
def test_every_kind_of_proxy_gives_a_map_at_its_own_grid(name, kwargs):
    proxy, _ = backbone(name, **kwargs)
    config = td.ProxyCLIPConfig(**_settings(shortest_side=56, window=56))
    reduced = td.ProxyCLIP(
        tiny_clip(), proxy, reduce=td.ToMe(r=4), proxy_reduce=td.ToMe(r=1), config=config
    )
    reduced.set_classes(CLASSES, prompts=["{}"])
    windows = pictures(1, 50, 50)  # padded to a multiple of both patch sizes
    logits = reduced.window_logits(windows)
    assert logits.shape == (1, 4, 50, 50)
    assert logits.isfinite().all()
    reduced.set_proxy_degree(0)
    assert not torch.allclose(reduced.window_logits(windows), logits, atol=1e-6)
    assert reduced.cost().macs > 0


def test_prompts_are_replaced_and_averaged():
    model = small_model()
    before = model._text
    model.set_classes(["cat", "dog"], prompts=["{}"])
    ids = open_clip.tokenizer.SimpleTokenizer()(["cat", "dog"])
    with torch.no_grad():
        expected = F.normalize(model.clip.encode_text(ids), dim=-1)
    torch.testing.assert_close(model._text, expected)
    assert not torch.allclose(model._text[0], before[0], atol=1e-4)
    assert model.classes == (("cat",), ("dog",))


@torch.no_grad()
def test_a_copy_and_another_dtype_run():
    model = small_model(reduce=td.ToMe(r=4))
    again = copy.deepcopy(model)
    assert torch.equal(again.window_logits(pictures()), model.window_logits(pictures()))
    low = again.bfloat16().window_logits(pictures().bfloat16()).float()
    assert (low - model.window_logits(pictures())).abs().max() < 0.1
    assert "3 classes, degree=4" in repr(model)


def wrapped_with_reducer():
    return td.wrap(tiny_dino(), reduce=td.ToMe(r=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: td.ProxyCLIP(nn.Linear(2, 2), tiny_dino()), "a CLIP of open_clip or CLIPModel"),
        (lambda: td.ProxyCLIP(tiny_clip().visual, tiny_dino()), "got VisionTransformer"),
        (
            lambda: td.ProxyCLIP(tiny_clip(timm_model_name="vit_tiny_patch16_224"), tiny_dino()),
            "VisionTransformer as its image tower, got TimmModel",
        ),
        (
            lambda: td.ProxyCLIP(
                tiny_clip(attentional_pool=True, attn_pooler_heads=2), tiny_dino()
            ),
            "must not have attentional pooling",
        ),
        (lambda: td.ProxyCLIP(tiny_clip(layers=1), tiny_dino()), "at least 2 blocks"),
        (
            lambda: td.ProxyCLIP(tiny_clip(), wrapped_with_reducer(), proxy_reduce=td.ToMe(r=2)),
            r"proxy_reduce must be None, .*proxy is wrapped already.*reduce=ToMe",
        ),
        (
            lambda: td.ProxyCLIP(tiny_clip(), tiny_dino(), clip_tower=td.wrap(tiny_clip().visual)),
            "clip_tower must be the wrapped image tower of clip",
        ),
        (lambda: td.ProxyCLIP(as_transformers(tiny_clip()), tiny_dino()), "tokenizer must be"),
        (lambda: td.ProxyCLIPConfig(stride=400), r"stride must be at most window \(336\), got 400"),
        (lambda: td.ProxyCLIPConfig(threshold=1.5), r"threshold must lie in \[0, 1\], got 1.5"),
        (lambda: td.ProxyCLIPConfig(gamma=0), "gamma must be a number above 0, got 0"),
        (lambda: small_model().set_classes([]), "at least one class"),
        (lambda: small_model().set_classes("cat"), "a list of names, got the string 'cat'"),
        (lambda: small_model().set_classes(["cat", ()]), r"class 1 has \(\)"),
        (lambda: small_model().set_classes(["cat"], prompts=["a cat"]), "got 'a cat'"),
        (lambda: small_model()(torch.zeros(3, 8, 8)), r"\[B, 3, H, W\], got \[3, 8, 8\]"),
        (
            lambda: small_model()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
            "floats in .0, 1., got torch.uint8: divide by 255",
        ),
        (
            lambda: td.ProxyCLIP(tiny_clip(), tiny_dino(), config=CONFIG)(pictures()),
            "classes are not set",
        ),
        (
            lambda: small_model(config=td.ProxyCLIPConfig(multiple=1))(pictures()),
            "images must be 48x48, got 336x336; create the timm model with .*dynamic_img_size",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
