"""Properties that every method has; a new method joins by its example in examples.py.

The models have three prefix tokens and an odd number of patches, on a grid that is not square, and
tests use several images that differ. Each docstring lists defects that the test catches; each of
them was put into the code once to see the test fail.
"""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
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
LABELS = torch.tensor([1, 4, 0])
# Names of the backbone's parameters that train; with all other adapters only those of the head.
TRAINED_IN_BACKBONE = {
    td.FullFineTuning: ".*",
    td.BitFit: r".*bias|head.*",
    td.LastBlocks: r"blocks\.[23]\..*|head.*",
    td.LoRA: r".*lora_[AB].*|head.*",
    td.Combined: r".*lora_[AB].*|head.*",
    td.PEFT: r".*hada_w.*|head.*",
    td.SynQT: r"norm\..*|head.*",
}
NOAHS = td.NOAH | td.NOAHSupernet
# New prompts, queries, NOAH's matrices, and adapters that add up whole tokens change the outputs
# from the start.
CHANGING = td.VPT | NOAHS | td.ResTuning | td.ReleasedDenseAdapter | td.SynQT
NEUTRAL = {
    name: (reduce, adapt)
    for name, (reduce, adapt) in PAIRS.items()
    if not isinstance(adapt, CHANGING)
}
each_neutral_pair = pytest.mark.parametrize(("reduce", "adapt"), NEUTRAL.values(), ids=NEUTRAL)
SHAPE = {"img_size": (36, 28), "reg_tokens": 2}  # 9 x 7 patches of 4 pixels
each_adapter = pytest.mark.parametrize("adapt", ADAPTERS.values(), ids=ADAPTERS)


def small_vit(**kwargs):
    """A ViT with 3 prefix tokens and 9 x 7 patches."""
    return tiny_vit(**(SHAPE | kwargs))


def pictures(count=3):
    """Different images that fit `small_vit`."""
    return images(count, *SHAPE["img_size"])


def randomised(reduce=None, adapt=None, **kwargs):
    """A wrapped model with random trainable weights, so that its adapter changes the output."""
    torch.manual_seed(1)
    model = td.wrap(small_vit(**kwargs), reduce=reduce, adapt=adapt)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


@each_reducer
@torch.no_grad()
def test_degree_0_is_the_identity(reduce):
    """Catches: a hook that runs at degree 0; a norm left out; scaled attention logits."""
    vit = small_vit()
    model = td.wrap(vit, reduce=reduce)
    model.set_degree(0)
    assert torch.equal(model(pictures()), vit(pictures()))


@each_reducer
@torch.no_grad()
def test_the_configured_degree_changes_the_logits(reduce):
    """Catches: a method that groups no tokens, so that all other tests run without it."""
    vit = small_vit()
    change = (td.wrap(vit, reduce=reduce).eval()(pictures()) - vit(pictures())).abs().amax(dim=1)
    assert (change > 1e-3).all()


@each_pair
@torch.no_grad()
def test_skipping_what_the_head_does_not_read_changes_nothing(reduce, adapt):
    """Catches: patches that are no keys of the last block; patches skipped one block too early."""
    model = randomised(reduce, adapt)
    whole = model(pictures())
    model.skip_unread_patches = True
    torch.testing.assert_close(model(pictures()), whole, atol=1e-5, rtol=0)


@each_reducer
def test_a_higher_degree_costs_less(reduce):
    """Catches: rates in rising order; a degree that is ignored; a dial with two costs only."""
    model = td.wrap(small_vit(), reduce=reduce)
    degrees = sorted({*model.degrees[::3], model.degree, model.degrees[-1]})
    macs = [model.cost(degree).macs for degree in degrees]
    assert macs == sorted(macs, reverse=True)
    assert model.cost(0).macs > model.cost(model.degree).macs
    assert len({*macs}) > 2


@each_reducer
@given(seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_permuting_the_images_permutes_the_logits(reduce, seed):
    """Catches: matching, scores or selection of all images by those of the first one."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(4, 3, *SHAPE["img_size"], generator=generator)
    order = torch.randperm(4, generator=generator)
    model = td.wrap(small_vit(), reduce=reduce).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch[order]), model(batch)[order])


@each_reducer
@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(reduce):
    """Catches: matching by the mean of the batch; selection by a threshold of the whole batch."""
    model = td.wrap(small_vit(), reduce=reduce).eval()
    torch.testing.assert_close(model(pictures()[1:2]), model(pictures())[1:2])


@each_pair
@torch.no_grad()
def test_an_empty_batch_gives_the_logits_of_no_image(reduce, adapt):
    """Catches: a maximum over the values of all images, of which there are none."""
    model = td.wrap(small_vit(), reduce=reduce, adapt=adapt).eval()
    assert model(pictures(0)).shape == (0, 7)
    assert model.feature_map(pictures(0)).shape == (0, 48, 9, 7)
    assert model.forward_at(pictures(0), []).shape == (0, 7)


@each_reducer
@torch.no_grad()
def test_every_token_stands_for_positions_and_prefix_tokens_for_themselves(reduce):
    """Catches: merged prefix tokens; a map to tokens that is not updated; sizes that are not added
    up.
    """
    model = td.wrap(small_vit(), reduce=reduce).eval()
    for step in model.steps(pictures(), track=True):
        tokens = step.tokens
        assert torch.equal(tokens.origin[:, :3], torch.arange(3).expand(3, -1))
        for number, origin in enumerate(tokens.origin):
            held, counts = origin[origin >= 0].unique(return_counts=True)
            assert torch.equal(held, torch.arange(tokens.x.shape[1]))
            if isinstance(reduce, td.PruneMerge):  # what it merges counts by its similarity
                assert (tokens.size[number] >= 1).all()
                assert (tokens.size[number] <= counts + 1e-5).all()
            elif tokens.size is not None:
                assert torch.equal(tokens.size[number], counts.float())


@each_reducer
def test_gradients_reach_the_image(reduce):
    """Catches: features that are merged without gradient in training."""
    batch = pictures().requires_grad_()
    td.wrap(small_vit(), reduce=reduce)(batch).sum().backward()
    assert (batch.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


@each_reducer
def test_the_gradient_is_the_slope_of_the_logits(reduce):
    """Catches: an FFN or merged features without gradient, which the gradient of the residual hides
    from a test for zero.
    """
    model = td.wrap(small_vit(), reduce=reduce).double().eval()
    batch = pictures().double().requires_grad_()
    model(batch).square().sum().backward()
    direction = batch.grad / batch.grad.norm()
    with torch.no_grad():
        ahead, behind = (model(batch + step * direction).square().sum() for step in (1e-3, -1e-3))
    torch.testing.assert_close((ahead - behind) / 2e-3, batch.grad.norm(), rtol=1e-3, atol=0)


def replay_choices(monkeypatch, model):
    """Let the second pass choose tokens by what the first one computed.

    In half precision a near tie may fall the other way, and then another token is merged. This is a
    discontinuity of the method, not an error of the computation. So keys and scores must be close
    to those of the first pass, and are then replaced by them. Everything else, such as the output
    of attention, is computed by the second pass.
    """
    seen = {}

    def same(key, now):
        first = seen.setdefault(key, now)
        # Relative to how much tokens differ, not to the mean of all tokens.
        differences = first - first.mean(dim=1, keepdim=True)
        assert (now.float() - first).norm() <= 0.1 * differences.norm(), key
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
    scorers = [*getattr(model.reducer, "predictors", ()), *getattr(model.reducer, "metrics", ())]
    for number, predictor in enumerate(scorers):
        scores = predictor.forward
        monkeypatch.setattr(
            predictor, "forward", lambda *a, n=number, f=scores: same(("scores", n), f(*a))
        )


@each_reducer
@torch.no_grad()
def test_half_precision_stays_as_close_as_plain_timm(reduce, monkeypatch):
    """Catches, each in half precision only: attention that is replaced by a constant or by its mean
    over tokens; an FFN that is left out; wrong keys or scores; similarities that are computed in
    half precision; token sizes that are ignored.
    """
    vit = small_vit()
    model = td.wrap(vit, reduce=reduce).eval()
    perturbed(model.reducer, std=0.3)  # fresh dispatchers and predictors score all tokens alike
    replay_choices(monkeypatch, model)
    exact, plain = model(pictures(16)), vit(pictures(16))
    with torch.autocast("cpu", torch.bfloat16):
        error = (model(pictures(16)).float() - exact).abs().mean()
        plain_error = (vit(pictures(16)).float() - plain).abs().mean()
    assert error <= 1.5 * plain_error


@each_neutral_pair
@torch.no_grad()
def test_a_fresh_adapter_is_the_identity(reduce, adapt):
    """Catches: an adapter whose last layer does not start at zero. VPT is exempt: attention reads
    its prompts from the start.
    """
    without = td.wrap(small_vit(), reduce=reduce).eval()
    model = td.wrap(small_vit(), reduce=reduce, adapt=adapt).eval()
    model.reducer.load_state_dict(without.reducer.state_dict())
    assert torch.equal(model(pictures()), without(pictures()))


def objective(model):
    """The loss of a training step on three images, with the same noise every time."""
    torch.manual_seed(3)
    loss, _ = Objective(model, Classification(7, multi_label=False, augment=Augment()))(
        pictures(), LABELS
    )
    return loss


@each_pair
def test_gradients_reach_what_trains_and_nothing_else(reduce, adapt):
    """Catches: a weight that is not used or is detached; a backbone that is not frozen."""
    # Average pooling also reads the patch tokens of the last layer, on which some adapters act.
    pooling = "token" if isinstance(adapt, td.SynQT) else "avg"
    model = randomised(reduce, adapt, global_pool=pooling).train()
    objective(model).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    pattern = TRAINED_IN_BACKBONE.get(type(adapt), "head.*")
    for name, parameter in model.vit.named_parameters():
        assert parameter.requires_grad == bool(re.fullmatch(pattern, name)), name


@pytest.mark.parametrize("name", ["dynamicvit", "dyt", "dar"])
def test_losses_of_the_method_are_added_to_that_of_the_task(name):
    """Catches: losses of the method that are left out or subtracted."""
    without = dataclasses.replace(REDUCERS[name], ratio_weight=0.0)
    task, whole = (objective(randomised(reduce).train()) for reduce in (without, REDUCERS[name]))
    assert whole > task


@each_pair
def test_steps_of_training_lower_the_loss(reduce, adapt):
    """Catches: a loss of the task with the wrong sign."""
    model = randomised(reduce, adapt).train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = objective(model)
        torch.manual_seed(3)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(pictures()), LABELS).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@each_reducer
def test_gradients_are_the_same_when_activations_are_recomputed(reduce):
    """Catches: noise that is drawn anew when activations are recomputed."""
    model = randomised(reduce, ADAPTERS["adaptformer"]).train()
    gradients = []
    for recompute in (False, True):
        model.checkpoint_activations = recompute
        model.zero_grad()
        objective(model).backward()
        gradients.append([p.grad.clone() for p in model.trainable_parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept)


def test_a_method_of_training_that_learns_from_no_teacher_refuses_one(vit):
    """Catches: a teacher that is accepted and has no effect."""
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
    """Catches: a copy whose hooks call the layers of the original."""
    model = randomised(REDUCERS["ffn_merge"], adapt)
    before = model(pictures())
    clone = copy.deepcopy(model)
    perturbed(model)
    assert torch.equal(clone(pictures()), before)
    clone.load_state_dict(model.state_dict())
    assert torch.equal(clone(pictures()), model(pictures()))
