"""Encoders with attention in windows as proxies of ProxyCLIP: SAM's and ViTDet's."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from examples import perturbed
from whole_models import SIDE, WHOLE

import tokendial as td
from tokendial.open_vocabulary import proxy_attention
from tokendial.tokens import from_grid, to_grid

WINDOW = 48
VISION = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 8, "image_size": WINDOW}
TEXT = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}
CONFIG = td.ProxyCLIPConfig(shortest_side=WINDOW, window=WINDOW, stride=16, multiple=1)
NAMES = ("SAM", "timm SAM", "ViTDet")


def tiny_clip():
    torch.manual_seed(0)
    return perturbed(open_clip.CLIP(embed_dim=20, vision_cfg=VISION, text_cfg=TEXT)).eval()


def encoder_of(name):
    torch.manual_seed(1)
    return perturbed(WHOLE[name].build(), std=0.2).eval()


def proxied(name, **settings):
    model = td.ProxyCLIP(tiny_clip(), encoder_of(name), config=CONFIG, **settings)
    model.set_classes(["cat", "dog"], prompts=["{}"])
    return model.eval()


def windows():
    return torch.rand(2, 3, WINDOW, WINDOW, generator=torch.Generator().manual_seed(2))


def map_of(name, model, images):
    """The feature map that a model itself gives for normalised images."""
    if name == "SAM":
        return model.vision_encoder(images).last_hidden_state
    return model.forward_features(images) if name == "timm SAM" else model(images)[0]


def logits_by_hand(model, features):
    visual = model.clip.visual
    clip_images = (windows() - model._clip_mean) / model._clip_std
    x = from_grid(model.tower.feature_map(clip_images, layer=2), 36)
    block = visual.transformer.resblocks[-1]
    weight, bias = block.attn.in_proj_weight[96:], block.attn.in_proj_bias[96:]
    values = to_grid(F.linear(block.ln_1(x), weight, bias), (6, 6))
    out = block.attn.out_proj(proxy_attention(values, features))
    y = F.normalize(visual.ln_post(out) @ visual.proj, dim=-1) @ model._text.T
    grid = tuple(features.shape[-2:])
    return F.interpolate(to_grid(y, grid), (WINDOW, WINDOW), mode="bilinear")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_map_is_that_of_the_encoder_at_its_own_size(name):
    """Equals the encoder itself on resized windows, and at a degree the encoder with `attach`."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                           (0.229, 0.224, 0.225)))  # fmt: skip
    resized = F.interpolate((windows() - mean) / std, (SIDE, SIDE), mode="bilinear")
    plain, alone = proxied(name), encoder_of(name)
    assert plain.proxy_degrees == (0,)
    features = map_of(name, alone, resized)
    assert features.shape[-2:] == (8, 8)
    torch.testing.assert_close(plain.window_logits(windows()), logits_by_hand(plain, features))

    dialed = proxied(name, reduce=td.ToMe(r=0), proxy_reduce=td.FFNMerge(r=20))
    assert dialed.proxy_degree == 20
    with td.attach(alone, td.FFNMerge(r=20)):
        merged = map_of(name, alone, resized)
    assert not torch.allclose(merged, features, atol=1e-4)
    at_20 = dialed.window_logits(windows())
    torch.testing.assert_close(at_20, logits_by_hand(dialed, merged))
    cheap = dialed.cost()
    dialed.set_proxy_degree(0)
    torch.testing.assert_close(dialed.window_logits(windows()), plain.window_logits(windows()))
    assert cheap.macs < dialed.cost().macs == plain.cost().macs
    assert cheap.tokens_per_layer[2:] == (64, 64, 64)
    again = copy.deepcopy(dialed)
    again.set_proxy_degree(20)
    torch.testing.assert_close(again.window_logits(windows()), at_20)
    assert dialed.proxy_degree == 0
    with pytest.raises(ValueError, match="degree must be"):
        dialed.set_proxy_degree(99)


@torch.no_grad()
def test_a_dial_that_is_there_is_used():
    encoder = encoder_of("SAM")
    td.attach(encoder, td.FFNMerge(r=20))
    model = td.ProxyCLIP(tiny_clip(), encoder, config=CONFIG)
    assert model.proxy_degree == 20
    model.set_proxy_degree(4)
    assert td.attached(encoder).degree == 4
    with pytest.raises(ValueError, match="proxy_reduce must be None, because proxy is wrapped"):
        td.ProxyCLIP(tiny_clip(), encoder, proxy_reduce=td.FFNMerge(r=2), config=CONFIG)


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="reduce must be FFNMerge for SamVisionEncoder"):
        proxied("SAM", proxy_reduce=td.ToMe(r=2))
