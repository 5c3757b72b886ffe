"""Trainable parameters on ViT-B/16, the head not counted: by formula, and as papers print them."""

import pytest
import timm
import torch

import tokendial as td

D, L = 768, 12
SIZES = {
    "adaptformer 64": (td.AdaptFormer(dim=64), L * (2 * D * 64 + 64 + D), 1.19),
    "adaptformer 8": (td.AdaptFormer(dim=8), L * (2 * D * 8 + 8 + D), 0.16),
    "houlsby 64": (td.Houlsby(dim=64), L * (2 * D * 64 + 64 + D), 1.19),
    "lora 8": (td.LoRA(rank=8), 4 * L * D * 8, 0.29),
    "vpt 8": (td.VPT(prompts=8), L * 8 * D, 0.07),
    "vpt shallow 8": (td.VPT(prompts=8, deep=False), 8 * D, 0.01),
    "bitfit": (td.BitFit(), 102_912, 0.10),
    "ssf": (td.SSF(), 205_824, 0.21),
    "ssf in blocks": (td.SSF(patch_embedding=False), 205_824 - 2 * D, 0.20),
    "fact 12": (td.FacT(rank=12), 2 * D * 12 + 144 * 12 * 12, 0.04),
    "fact tucker 12": (td.FacT(rank=12, kind="tk"), 2 * D * 12 + 12**3 + 144 * 12, 0.02),
    "convpass 8": (td.ConvPass(dim=8), 2 * L * (2 * D * 8 + 9 * 64 + 2 * 8 + D), 0.33),
    "dar": (td.DARAdapter(), L * (195_722 - 9 * D - 1), 2.27),
    "linear": (td.LinearProbe(), 0, 0.0),
    "last blocks": (td.LastBlocks(blocks=2), 2 * (12 * D * D + 13 * D), 14.18),
    "full": (td.FullFineTuning(), 85_798_656, 85.80),
}


@pytest.mark.parametrize("name", SIZES)
def test_trainable_parameters_are_those_of_the_formula_and_the_paper(name):
    adapt, formula, millions = SIZES[name]
    with torch.device("meta"):
        model = td.wrap(timm.create_model("vit_base_patch16_224"), adapt=adapt)
    cost = model.cost()
    assert cost.trainable_params == formula
    assert cost.trainable_params / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("adapt", "gmacs"),
    [
        (td.Houlsby(dim=64), 17.81),
        (td.AdaptFormer(dim=8), 17.61),
        (td.VPT(prompts=8), 18.32),
        (td.ConvPass(dim=8), 17.64),
    ],
)
def test_costs_are_those_of_the_papers(adapt, gmacs):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
        model = td.wrap(vit, adapt=adapt)
    assert model.cost().gmacs == pytest.approx(gmacs, abs=0.006)
