"""`attach`: models that hold a ViT run under the dial, and everything around it stays as it was."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from whole_models import SIDE, VISION, WHOLE, whole_model

import tokendial as td
from tokendial.backbones import anatomy_of

METHODS: dict[str, td.ReducerConfig] = {
    "tome": td.ToMe(r=6),
    "evit": td.EViT(r=6),
    "ffn_merge": td.FFNMerge(r=20),
}
CASES = [
    (name, method)
    for name, kind in WHOLE.items()
    for method in METHODS
    if kind.has_class_token or method != "evit"
]


def answers(name: str, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """What a model of `WHOLE` answers."""
    with torch.no_grad():
        return WHOLE[name].answer(model, images)


def assert_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], atol: float = 0.0) -> None:
    """Compare all outputs of a model."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


def composed(
    name: str, model: nn.Module, images: Tensor, tower: str, reduce: td.ReducerConfig
) -> tuple[Tensor, ...]:
    """What a model answers whose blocks return what a wrapped copy of its ViT gives.

    This needs nothing of `attach`: PyTorch's hooks put the features of every position, which the
    wrapped ViT restores after each block, in place of what the blocks return.
    """
    vit = model.get_submodule(tower)
    wrapped = td.wrap(copy.deepcopy(vit), reduce=reduce)
    with torch.no_grad():
        steps = wrapped.steps(images, track=True, dropped="own")
        restored = [step.tokens.restore_positions() for step in steps]
    if name == "YOLOS":  # the wrapped one has its six detection tokens before the patches
        restored = [torch.cat([x[:, :1], x[:, 7:], x[:, 1:7]], dim=1) for x in restored]
    hooks = [
        block.register_forward_hook(lambda _module, _args, _out, x=x: x)
        for block, x in zip(anatomy_of(vit).blocks, restored, strict=True)
    ]
    found = answers(name, model, images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_model_runs_under_the_dial_and_is_as_before_without(name, method):
    model, images = whole_model(name)
    before = answers(name, model, images)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]

    dial = td.attach(model, METHODS[method])
    (tower,) = dial.towers
    reduced = answers(name, model, images)
    assert all(isinstance(m, own) for m, own in zip(model.modules(), classes, strict=True))
    assert model.state_dict().keys() == weights.keys()
    dial.set_degree(0)
    assert_equal(answers(name, model, images), before)
    dial.set_degree(tower.degrees[-1])
    assert all(x.isfinite().all() for x in answers(name, model, images))

    dial.detach()
    assert_equal(answers(name, model, images), before)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key])

    assert [x.shape for x in reduced] == [x.shape for x in before]
    assert any((x - y).abs().max() > 1e-4 for x, y in zip(reduced, before, strict=True))
    by_hand = composed(name, model, images, tower.name, METHODS[method])
    scale = max(float(x.abs().max()) for x in by_hand)
    assert_equal(reduced, by_hand, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("name", WHOLE)
def test_a_compiled_model_answers_the_same_at_each_degree(name):
    model, images = whole_model(name)
    with td.attach(model, td.ToMe(r=6)) as dial:
        compiled = torch.compile(WHOLE[name].answer, backend="eager", dynamic=False)
        for degree in (6, 0, 3):
            dial.set_degree(degree)
            with torch.no_grad():
                found = compiled(model, images)
            assert_equal(found, answers(name, model, images), atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_in_half_precision_stays_in_it(name):
    model, images = whole_model(name)
    before = answers(name, model, images)
    with td.attach(model, td.ToMe(r=6)):
        model.bfloat16()
        found = answers(name, model, images.bfloat16())
    assert [x.shape for x in found] == [x.shape for x in before]
    assert all(x.isfinite().all() for x in found)
    assert found[0].dtype == torch.bfloat16
