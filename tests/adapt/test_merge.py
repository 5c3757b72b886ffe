import copy

import peft
import pytest
import torch
from examples import images, perturbed, tiny_vit
from zoo import backbone

import tokendial as td

LINEAR = {
    "lora": td.LoRA(rank=2, target_modules=("qkv", "fc1")),
    "loha": td.PEFT(method="loha", options={"r": 2}),
    "ssf": td.SSF(),
    "fact": td.FacT(rank=3),
    "fact_tk": td.FacT(rank=3, kind="tk", scale=0.5),
}


def trained(adapt):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), adapt=adapt)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("adapt", LINEAR.values(), ids=LINEAR)
@torch.no_grad()
def test_merging_leaves_the_outputs_and_is_undone_to_the_bit(adapt):
    model = trained(adapt)
    model.set_degree(0)
    before, weights = model(images()), copy.deepcopy(model.state_dict())
    model.merge_adapters()
    torch.testing.assert_close(model(images()), before, atol=1e-5, rtol=1e-5)
    assert model.cost().macs < td.wrap(tiny_vit(), adapt=adapt).cost().macs or adapt == td.SSF()
    model.unmerge_adapters()
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("adapt", LINEAR.values(), ids=LINEAR)
@torch.no_grad()
def test_a_copy_of_a_merged_model_is_a_model_of_its_own(adapt):
    model = trained(adapt)
    model.merge_adapters()
    clone = copy.deepcopy(model)
    clone.unmerge_adapters()
    assert model.adapter.merged
    torch.testing.assert_close(clone(images()), model(images()), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_merged_says_so(tmp_path):
    with pytest.raises(
        ValueError, match="cannot be merged into the backbone's weights: only LoRA, SSF, FacT"
    ):
        td.wrap(tiny_vit(), adapt=td.AdaptFormer(dim=4)).merge_adapters()
    with pytest.raises(ValueError, match="the adapters are not merged"):
        td.wrap(tiny_vit(), adapt=td.LoRA(rank=2)).unmerge_adapters()
    model = td.wrap(tiny_vit(), adapt=td.LoRA(rank=2))
    model.merge_adapters()
    with pytest.raises(ValueError, match="the adapters are merged already"):
        model.merge_adapters()
    with pytest.raises(ValueError, match="merged adapters cannot be saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="SSF cannot be merged: a Linear of the backbone has no bias"
    ):
        td.wrap(backbone("eva02")[0], adapt=td.SSF()).merge_adapters()


@torch.no_grad()
def test_a_checkpoint_of_peft_goes_into_the_wrapped_model_and_back(tmp_path):
    adapt = td.LoRA(rank=2)
    bare = peft.get_peft_model(tiny_vit(), adapt.peft_config())
    for name, parameter in bare.named_parameters():
        if "lora_" in name:
            parameter += 0.1 * torch.randn(parameter.shape)
    bare.eval().save_pretrained(tmp_path / "bare")

    model = td.wrap(tiny_vit(), adapt=adapt).eval()
    state = peft.load_peft_weights(tmp_path / "bare", device="cpu")
    peft.set_peft_model_state_dict(model.vit, state)
    torch.testing.assert_close(model(images()), bare(images()))

    perturbed(model, std=0.05)
    again = peft.get_peft_model(tiny_vit(), adapt.peft_config()).eval()
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(model.vit))
    again.base_model.model.load_state_dict(model.vit.state_dict())
    torch.testing.assert_close(again(images()), model(images()))
