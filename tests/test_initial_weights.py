"""Weights start as the authors' code draws them: deviations of everything that methods bring.

SSF is the exception: the authors draw its scales and shifts with a deviation of 0.02, here that is
an option. By default every adapter but prompts and NOAH starts as the identity.
"""

import re

import pytest
import torch
from examples import tiny_vit

import tokendial as td

D, PATCH = 192, 4


def uniform(bound):
    """Standard deviation of a uniform distribution on [-bound, bound]."""
    return bound / 3**0.5


def inputs(count):
    """Standard deviation of PyTorch's default weights for a layer with `count` inputs."""
    return uniform(count**-0.5)


BOTTLENECKS = {r"down\.\d+\.weight": inputs(D), r"(down.*bias|up.*)": 0.0}
# For each method: regular expressions of parameter names, and the standard deviations they have.
ADAPTERS = {
    "adaptformer": (td.AdaptFormer(dim=32), BOTTLENECKS),
    "adaptformer experts": (
        td.AdaptFormer(dim=32, experts=2),
        {
            **{rf"experts\.\d\.{name}": std for name, std in BOTTLENECKS.items()},
            r"routers.*": inputs(D),
        },
    ),
    "houlsby": (td.Houlsby(dim=32), BOTTLENECKS),
    "dense adapter": (
        td.DenseAdapter(dim=32, start=3),
        {r"layers\.\d\.down.*weight": inputs(D), r"layers\.\d\.(down.*bias|up.*)": 0.0},
    ),
    "dar": (
        td.DARAdapter(dims=(32, 16)),
        {
            r"down\.\d+\.weight": uniform((6 / 32) ** 0.5),
            r"(down.*bias|up.*)": 0.0,
            r"compensators\.\d\.down\.weight": uniform((6 / 16) ** 0.5),
            r"compensators\.\d\.depthwise.*": inputs(9),
            r"compensators\.\d\.pointwise.*": inputs(16),
            r"compensators\.\d\.(down\.bias|up.*)": 0.0,
            r"scales.*": 0.0,
        },
    ),
    "vpt": (td.VPT(prompts=8), {"prompts": uniform((6 / (3 * PATCH**2 + D)) ** 0.5)}),
    "ssf": (td.SSF(), {".*": 0.0}),
    "synqt": (
        td.SynQT(queries=8),
        {
            r"vectors": uniform(1.0),
            r".*(scale|norm.*)": 0.0,
            r".*attention\..*\.down.*": inputs(D),
            r".*attention\..*\.up.*": inputs(8),
            r".*(down|gates).*": inputs(D),
            r".*up.*": inputs(48),
        },
    ),
    "ssf as published": (td.SSF(init_std=0.02), {r".*scale": 0.02, r".*shift": 0.02}),
    "fact": (
        td.FacT(rank=12),
        # Of 12 cores in each block the last four, of the FFN's second layer, read four inputs.
        {
            r"left\.weight": inputs(D),
            r"right\.weight": 0.0,
            "cores": ((8 * inputs(12) ** 2 + 4 * inputs(48) ** 2) / 12) ** 0.5,
        },
    ),
    "fact tucker": (
        td.FacT(rank=12, kind="tk"),
        {
            r"left\.weight": inputs(D),
            r"right\.weight": 0.0,
            "cores": uniform((6 / (2 * 12 * 12)) ** 0.5),
            "mix": uniform((6 / (12 + 24)) ** 0.5),
        },
    ),
    "noah": (
        td.NOAH(prompts=20, rank=8, dim=8),
        # The authors draw 100 prompts in each block, and use the first ones.
        {
            r"prompts.*": uniform((6 / (101 * D)) ** 0.5),
            r".*weight": 0.02,
            r".*bias": 0.0,
        },
    ),
    "convpass": (
        td.ConvPass(dim=8),
        {
            r".*down\.weight": uniform((6 / (D + 8)) ** 0.5),
            # The identity: 8 ones among 9 * 8 * 8 numbers.
            r".*conv\.weight": ((1 / 72) * (71 / 72)) ** 0.5,
            r".*(bias|up\.weight)": 0.0,
        },
    ),
}
REDUCERS = {
    "dyt": (td.DyT(), {r".*weight": 0.02, ".*bias": 0.0}),
    "dar": (td.DAR(), {r".*(weight|bias)": inputs(9 * D)}),
    "dynamicvit": (
        td.DynamicViT(layers=(1, 2)),
        {r"predictors\.\d\.inside\.0.*": 0.0, r".*weight": 0.02, r".*bias": 0.0},
    ),
}
DECODERS = {
    "dar": (
        td.DARDecoder(channels=64, num_classes=4),
        {
            r"(reduce|fuse)\.conv\.weight": (2 / 64) ** 0.5,
            r".*norm.*": 0.0,
            r"predict.*": inputs(64),
        },
    ),
    "linear": (td.LinearDecoder(num_classes=4), {"weight": 0.02, "bias": 0.0}),
    "upconv": (
        td.UpConvDecoder(channels=(64, 32), num_classes=4),
        {
            r"stages\.0\.up\.weight": (2 / (4 * D)) ** 0.5,
            r"stages\.1\.up\.weight": (2 / (4 * 64)) ** 0.5,
            r".*norm.*|.*up\.bias": 0.0,
            r"predict.*": inputs(32),
        },
    ),
    "mask transformer": (
        td.MaskTransformer(num_classes=4, depth=1),
        {
            r".*norm.*|.*bias": 0.0,
            r"project_(patches|classes)\.weight": D**-0.5,
            r"classes|project\.weight|blocks.*weight": 0.02,
        },
    ),
}


def vit(**kwargs):
    return tiny_vit(embed_dim=D, depth=2, patch_size=PATCH, **kwargs)


def check(module, expected):
    """Check the deviation of each parameter by the first pattern that matches its name."""
    found = {pattern: [] for pattern in expected}
    for name, parameter in module.named_parameters():
        pattern = next(pattern for pattern in expected if re.fullmatch(pattern, name))
        found[pattern].append(parameter.detach().flatten())
    for pattern, std in expected.items():
        if std:
            assert torch.cat(found[pattern]).std().item() == pytest.approx(std, rel=0.1), pattern
        else:
            assert all((part == part[0]).all() for part in found[pattern]), pattern


@pytest.mark.parametrize("name", ADAPTERS)
def test_of_adapters(name):
    adapt, expected = ADAPTERS[name]
    check(td.wrap(vit(), adapt=adapt).adapter, expected)


@pytest.mark.parametrize("name", REDUCERS)
def test_of_reducers(name):
    reduce, expected = REDUCERS[name]
    check(td.wrap(vit(), reduce=reduce).reducer, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_of_decoders(name):
    decode, expected = DECODERS[name]
    check(td.wrap(vit(num_classes=0), decode=decode).decoder, expected)


def test_of_lora():
    model = td.wrap(vit(), adapt=td.LoRA(rank=8))
    check(
        torch.nn.ParameterDict(
            {n.replace(".", "-"): p for n, p in model.vit.named_parameters() if "lora" in n}
        ),
        {".*lora_A.*": inputs(D), ".*lora_B.*": 0.0},
    )


def test_cores_of_fact_start_by_the_inputs_that_each_layer_has():
    blocks = td.wrap(vit(), adapt=td.FacT(rank=12)).adapter.cores.detach().unflatten(0, (2, 12))
    assert blocks[:, :8].std().item() == pytest.approx(0.167, rel=0.05)
    assert blocks[:, 8:].std().item() == pytest.approx(0.083, rel=0.05)
