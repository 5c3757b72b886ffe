"""ProxyCLIP: the authors' attention, an independent numpy run of small models, the dial."""

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from examples import golden, perturbed
from proxy_clip_numpy import name_embedding, picture_logits, weights_of, window_logits
from torch import nn

import tokendial as td
from tokendial.open_vocabulary import proxy_attention
from tokendial.open_vocabulary.class_lists import imagenet_prompts
from tokendial.tokens import to_grid

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
