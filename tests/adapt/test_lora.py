import peft
import pytest
import timm
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td


def test_parameters_equal_pairs_on_query_and_value():
    with torch.device("meta"):
        model = td.wrap(timm.create_model("vit_base_patch16_224"), adapt=td.LoRA(rank=8))
    assert model.cost().trainable_params == 4 * 12 * 768 * 8


@torch.no_grad()
def test_it_is_peft_on_the_bare_model():
    config = td.LoRA(rank=3, alpha=6, target_modules=("qkv", "fc1"))
    model = td.wrap(tiny_vit(), adapt=config)
    perturbed(model, std=0.1)
    bare = tiny_vit()
    peft.inject_adapter_in_model(config.peft_config(), bare)
    bare.load_state_dict(model.vit.state_dict())
    torch.testing.assert_close(model(images()), bare(images()))


def test_a_layer_that_does_not_exist_raises(vit):
    with pytest.raises(ValueError, match=r"target_modules must name linear layers .*, got 'query'"):
        td.wrap(vit, adapt=td.LoRA(target_modules=("query",)))
