"""Properties that every method has; a new method joins by its example in examples.py."""

import copy

import pytest
import torch
from examples import ADAPTERS, REDUCERS, images, perturbed, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendial as td

each_reducer = pytest.mark.parametrize("reduce", REDUCERS.values(), ids=REDUCERS)
each_adapter = pytest.mark.parametrize("adapt", ADAPTERS.values(), ids=ADAPTERS)


def noisy(reduce=None, adapt=None, **kwargs):
    """A wrapped model whose adapter is not the identity any more."""
    model = td.wrap(tiny_vit(**kwargs), reduce=reduce, adapt=adapt)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


@each_reducer
@torch.no_grad()
def test_degree_0_is_the_identity(reduce):
    vit = tiny_vit()
    model = td.wrap(vit, reduce=reduce)
    model.set_degree(0)
    assert torch.equal(model(images()), vit(images()))


@each_reducer
def test_a_higher_degree_costs_less(reduce):
    model = td.wrap(tiny_vit(), reduce=reduce)
    macs = [model.cost(degree).macs for degree in model.degrees[::3]]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] < macs[0]


@each_reducer
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_permuting_the_images_permutes_the_logits(reduce, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(4, 3, 32, 32, generator=generator)
    order = torch.randperm(4, generator=generator)
    model = td.wrap(tiny_vit(), reduce=reduce)
    with torch.no_grad():
        torch.testing.assert_close(model(pictures[order]), model(pictures)[order])


@each_reducer
@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(reduce):
    model = td.wrap(tiny_vit(), reduce=reduce)
    torch.testing.assert_close(model(images(3)[1:2]), model(images(3))[1:2])


@each_reducer
@torch.no_grad()
def test_every_position_is_somewhere_or_dropped(reduce):
    model = td.wrap(tiny_vit(reg_tokens=2), reduce=reduce)
    for step in model.steps(images(), track=True):
        tokens = step.tokens
        assert torch.equal(tokens.origin[:, :3], torch.arange(3).expand(2, -1))
        held = tokens.origin[tokens.origin >= 0]
        assert held.max() == tokens.x.shape[1] - 1


@each_reducer
def test_gradients_reach_the_image(reduce):
    pictures = images().requires_grad_()
    td.wrap(tiny_vit(), reduce=reduce)(pictures).sum().backward()
    assert (pictures.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


@each_reducer
@torch.no_grad()
def test_half_precision_stays_as_close_as_plain_timm(reduce):
    vit = tiny_vit()
    model = td.wrap(vit, reduce=reduce)
    with torch.autocast("cpu", torch.bfloat16):
        half, plain_half = model(images()).float(), vit(images()).float()
    plain_error = (plain_half - vit(images())).abs().max()
    assert (half - model(images())).abs().max() <= 4 * plain_error + 1e-3


@each_adapter
@each_reducer
@torch.no_grad()
def test_a_fresh_adapter_is_the_identity(reduce, adapt):
    without = td.wrap(tiny_vit(), reduce=reduce)(images())
    assert torch.equal(td.wrap(tiny_vit(), reduce=reduce, adapt=adapt)(images()), without)


@each_adapter
@each_reducer
def test_gradients_reach_what_trains_and_nothing_else(reduce, adapt):
    model = noisy(reduce, adapt)
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@each_adapter
def test_a_step_of_training_lowers_the_loss(adapt):
    model = noisy(REDUCERS["evit"], adapt)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(images()), torch.tensor([1, 4]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@each_adapter
@torch.no_grad()
def test_a_copy_is_independent_and_equal(adapt):
    model = noisy(REDUCERS["tome"], adapt)
    clone = copy.deepcopy(model)
    perturbed(model)
    assert not torch.equal(clone(images()), model(images()))
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone(images()), model(images()))
