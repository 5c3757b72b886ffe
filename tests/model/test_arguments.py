"""Wrong arguments of `wrap` are answered by one line that says what to pass instead."""

import pytest
import torch
from examples import images, tiny_vit

import tokendial as td


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduce": "tome"}, r"got the string 'tome': pass td\.ToMe\(\.\.\.\)\.$"),
        ({"adapt": "lora"}, r"got the string 'lora': pass td\.LoRA\(\.\.\.\)\.$"),
        (
            {"reduce": "tomm"},
            r"reduce must be a reduction method such as .*, got 'tomm'",
        ),
        ({"reduce": td.ToMe}, r"reduce must be an instance, got the class ToMe: pass td\.ToMe\("),
        ({"adapt": td.LoRA}, r"adapt must be an instance, got the class LoRA: pass td\.LoRA\("),
        ({"reduce": td.LoRA()}, r"LoRA is a fine-tuning method: pass it as adapt=\.$"),
        ({"reduce": td.LoRA}, r"LoRA is a fine-tuning method: pass it as adapt=\.$"),
        ({"adapt": td.ToMe()}, r"ToMe is a reduction method: pass it as reduce=\.$"),
        ({"adapt": td.DARDecoder(num_classes=3)}, r"DARDecoder is a decoder: pass it as decode="),
        ({"decode": td.DAR()}, r"DAR is a reduction method: pass it as reduce="),
        ({"reduce": 8}, r"reduce must be a reduction method such as td\.ToMe\(r=8\), got 8\.$"),
    ],
)
def test_a_method_of_another_kind(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        td.wrap(tiny_vit(), **arguments)
    assert "\n" not in str(error.value)


def test_an_adapter_that_is_no_adapter():
    with pytest.raises(ValueError, match="ToMe is a reduction method: pass it as reduce="):
        td.wrap(tiny_vit()).add_adapter("pets", td.ToMe())


def test_a_model_that_is_wrapped_already():
    model = td.wrap(tiny_vit())
    with pytest.raises(ValueError, match=r"vit is a DialViT already: .*unwrap\(\)\.$"):
        td.wrap(model)


def test_the_name_of_a_model():
    with pytest.raises(ValueError, match=r"vit must be a model such as .*got 'vit_tiny"):
        td.wrap("vit_tiny_patch16_224")


@torch.no_grad()
def test_a_model_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    tuned = peft.get_peft_model(tiny_vit(), config).eval()
    with pytest.raises(ValueError, match=r"vit is a PeftModel of PEFT: pass vit\.get_base_model"):
        td.wrap(tuned)
    model = td.wrap(tuned.get_base_model(), reduce=td.ToMe(r=4)).eval()
    model.set_degree(0)
    assert torch.equal(model(images()), tuned(images()))
