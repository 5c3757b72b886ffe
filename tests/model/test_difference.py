"""The difference of two fine-tuned models, added to a third."""

import pytest
import torch
from examples import images, perturbed, tiny_vit

import tokendial as td

SETTINGS = {"reduce": td.ToMe(r=4), "adapt": td.AdaptFormer(dim=4)}


def tuned(seed, **settings):
    """A model whose trained weights, head included, are random."""
    model = td.wrap(tiny_vit(), **(SETTINGS | settings)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize(
    "adapt", [td.AdaptFormer(dim=4), td.LoRA(rank=2), td.BitFit(), td.FullFineTuning()]
)
@torch.no_grad()
def test_it_leads_from_one_model_to_the_other_but_for_the_head(adapt):
    base, model = tuned(0, adapt=adapt), tuned(1, adapt=adapt)
    other = tuned(0, adapt=adapt)
    td.difference(model, base).add_to(other)
    torch.testing.assert_close(
        other.forward_features(images()), model.forward_features(images()), atol=1e-5, rtol=1e-4
    )
    assert torch.equal(other.vit.head.weight, base.vit.head.weight)
    td.difference(model, base).add_to(other, factor=-1)
    torch.testing.assert_close(other(images()), base(images()), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_model_of_other_classes_gets_it():
    gap = td.difference(tuned(1), tuned(0))
    other = td.wrap(tiny_vit(num_classes=3), **SETTINGS).eval()
    before = other(images())
    gap.add_to(other, factor=0.5)
    assert other(images()).shape == (2, 3)
    assert not torch.equal(other(images()), before)


@torch.no_grad()
def test_it_is_saved_and_read(tmp_path):
    gap = td.difference(tuned(1), tuned(0))
    gap.save_pretrained(tmp_path)
    read = td.Difference.from_pretrained(tmp_path)
    assert read.tensors.keys() == gap.tensors.keys()
    assert all(torch.equal(read.tensors[name], value) for name, value in gap.tensors.items())
    with pytest.raises(ValueError, match="holds a difference, not a compensator"):
        td.Compensator.from_pretrained(tmp_path)


def test_what_does_not_fit_is_named_and_changes_nothing():
    with pytest.raises(ValueError, match=r"of adapter\.\S+ model has \[.*\] and base has \[.*\]"):
        td.difference(tuned(0), tuned(0, adapt=td.AdaptFormer(dim=8)))
    with pytest.raises(ValueError, match=r"of adapter\.\S+ .*has none"):
        td.difference(tuned(0), tuned(0, adapt=td.LoRA(rank=2)))
    other = tuned(0, adapt=td.AdaptFormer(dim=8))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="trained weights must be the same"):
        td.difference(tuned(1), tuned(0)).add_to(other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_a_compensator_has_to_be_detached_first():
    model = tuned(0)
    compensator = td.Compensator(td.ToCom(rank=1), 4, 48, 8)
    perturbed(compensator)
    compensator.attach(model, source=0)
    with pytest.raises(ValueError, match="without a compensator: detach it first"):
        td.difference(model, tuned(1))
