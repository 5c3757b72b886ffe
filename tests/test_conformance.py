"""Properties that every method has; a new method joins by its example in examples.py."""

import copy

import pytest
import torch
from examples import ADAPTERS, PAIRS, REDUCERS, images, perturbed, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendial as td
import tokendial.model.blocks
from tokendial.data.transforms.image import Augment
from tokendial.tasks.classification import Classification
from tokendial.train.objective import Objective

each_reducer = pytest.mark.parametrize("reduce", REDUCERS.values(), ids=REDUCERS)
each_pair = pytest.mark.parametrize(("reduce", "adapt"), PAIRS.values(), ids=PAIRS)
each_adapter = pytest.mark.parametrize("adapt", ADAPTERS.values(), ids=ADAPTERS)


def noisy(reduce=None, adapt=None, vit=None):
    """A wrapped model whose adapter is not the identity any more."""
    torch.manual_seed(1)
    model = td.wrap(vit or tiny_vit(), reduce=reduce, adapt=adapt)
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


@each_pair
@torch.no_grad()
def test_skipping_what_the_head_does_not_read_changes_nothing(reduce, adapt):
    model = noisy(reduce, adapt)
    whole = model(images())
    model.skips_unread = True
    torch.testing.assert_close(model(images()), whole, atol=1e-5, rtol=0)


@each_reducer
def test_a_higher_degree_costs_less(reduce):
    model = td.wrap(tiny_vit(), reduce=reduce)
    degrees = sorted({*model.degrees[::3], model.degrees[-1]})
    macs = [model.cost(degree).macs for degree in degrees]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] < macs[0]


@each_reducer
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_permuting_the_images_permutes_the_logits(reduce, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(4, 3, 32, 32, generator=generator)
    order = torch.randperm(4, generator=generator)
    model = td.wrap(tiny_vit(), reduce=reduce).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pictures[order]), model(pictures)[order])


@each_reducer
@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(reduce):
    model = td.wrap(tiny_vit(), reduce=reduce).eval()
    torch.testing.assert_close(model(images(3)[1:2]), model(images(3))[1:2])


@each_pair
@torch.no_grad()
def test_an_empty_batch_gives_the_logits_of_no_image(reduce, adapt):
    model = td.wrap(tiny_vit(), reduce=reduce, adapt=adapt).eval()
    assert model(images()[:0]).shape == (0, 7)
    assert model.feature_map(images()[:0]).shape == (0, 48, 8, 8)
    assert model.forward_at(images()[:0], []).shape == (0, 7)


@each_reducer
@torch.no_grad()
def test_every_position_is_somewhere_or_dropped(reduce):
    model = td.wrap(tiny_vit(reg_tokens=2), reduce=reduce).eval()
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


def replay_choices(monkeypatch, model):
    """Let the second pass choose tokens by what the first one computed.

    In half precision a near tie may fall the other way, and then another token is merged: that is
    the method's own discontinuity, and says nothing of how exactly it is computed. What the choices
    are made by has to be close; all else, the output of attention first of all, is the pass's own.
    """
    seen = {}

    def same(key, now):
        first = seen.setdefault(key, now)
        assert (now.float() - first).norm() <= 0.1 * first.norm(), key
        return first

    attend, calls = tokendial.model.blocks.attend, iter(range(10**6))

    def attended(*args, **kwargs):
        out, attended = attend(*args, **kwargs)
        layer = next(calls) % model.anatomy.shape.depth
        for name in ("mean_keys", "class_attention"):
            if (values := getattr(attended, name)) is not None:
                setattr(attended, name, same((name, layer), values))
        return out, attended

    monkeypatch.setattr(tokendial.model.blocks, "attend", attended)
    if hasattr(model.reducer, "logits"):
        logits = model.reducer.logits
        monkeypatch.setattr(model.reducer, "logits", lambda n, x: same(("logits", n), logits(n, x)))
    for number, predictor in enumerate(getattr(model.reducer, "predictors", ())):
        scores = predictor.forward
        monkeypatch.setattr(
            predictor, "forward", lambda *a, n=number, f=scores: same(("scores", n), f(*a))
        )


@each_reducer
@torch.no_grad()
def test_half_precision_stays_as_close_as_plain_timm(reduce, monkeypatch):
    """Sees attention of half precision that is replaced by a constant, keys or scores that are not
    those of full precision, and matching by products of half precision.
    """
    vit = tiny_vit()
    model = td.wrap(vit, reduce=reduce).eval()
    replay_choices(monkeypatch, model)
    exact, plain = model(images(16)), vit(images(16))
    with torch.autocast("cpu", torch.bfloat16):
        error = (model(images(16)).float() - exact).abs().mean()
        plain_error = (vit(images(16)).float() - plain).abs().mean()
    assert error <= 1.5 * plain_error


@each_pair
@torch.no_grad()
def test_a_fresh_adapter_is_the_identity(reduce, adapt):
    if isinstance(adapt, td.VPT):
        pytest.skip("attention sees the prompts from the start")
    without = td.wrap(tiny_vit(), reduce=reduce).eval()
    model = td.wrap(tiny_vit(), reduce=reduce, adapt=adapt).eval()
    model.reducer.load_state_dict(without.reducer.state_dict())
    assert torch.equal(model(images()), without(images()))


def objective(model):
    """The loss of a training step on two images, the same noise every time."""
    torch.manual_seed(3)
    loss, _ = Objective(model, Classification(7, multi_label=False, augment=Augment()))(
        images(), torch.tensor([1, 4])
    )
    return loss


@each_pair
def test_gradients_reach_what_trains_and_nothing_else(reduce, adapt):
    # Average pooling reads the patch tokens of the last layer too, which some adapters act on.
    model = noisy(reduce, adapt, vit=tiny_vit(global_pool="avg")).train()
    objective(model).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@each_pair
def test_steps_of_training_lower_the_loss(reduce, adapt):
    model = noisy(reduce, adapt).train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = objective(model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@each_reducer
def test_gradients_are_the_same_when_activations_are_recomputed(reduce):
    model = noisy(reduce, ADAPTERS["adaptformer"]).train()
    gradients = []
    for recompute in (False, True):
        model.checkpoint_activations = recompute
        model.zero_grad()
        objective(model).backward()
        gradients.append([p.grad.clone() for p in model.trainable_parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_a_method_of_training_that_learns_from_no_teacher_refuses_one(vit):
    teacher = td.wrap(tiny_vit())
    with pytest.raises(ValueError, match=r"train\.teacher: only DynamicViT learns from a teacher"):
        Objective(
            td.wrap(vit, reduce=td.ToMe()),
            Classification(7, multi_label=False, augment=Augment()),
            teacher,
        )


@each_adapter
@torch.no_grad()
def test_a_copy_is_independent_and_equal(adapt):
    model = noisy(REDUCERS["ffn_merge"], adapt)
    clone = copy.deepcopy(model)
    perturbed(model)
    assert not torch.equal(clone(images()), model(images()))
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone(images()), model(images()))
