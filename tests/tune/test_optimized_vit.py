"""Optimised models give the logits of the model, whatever treatments were kept."""

from functools import partial

import pytest
import torch
from examples import REDUCERS, images, perturbed, tiny_vit
from torch import nn

import tokendial as td
from tokendial.tune import treatments

# The compiler's own warnings, of the machine and of Python, are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def keep_everything(monkeypatch):
    """Treatments stay if they work, faster or not."""
    monkeypatch.setattr(treatments, "_MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(treatments, "_TURNS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def same_logits(fast, model, degrees, **tolerance):
    for degree in degrees:
        fast.set_degree(degree)
        model.set_degree(degree)
        for count in (0, 1, 2, 5):
            given, wanted = fast(images(count)), model(images(count))
            torch.testing.assert_close(given, wanted, **({"atol": 1e-5, "rtol": 0} | tolerance))


IMAGE_REDUCERS = {name: config for name, config in REDUCERS.items() if name != "frame_by_frame"}


@pytest.mark.parametrize("reduce", IMAGE_REDUCERS.values(), ids=IMAGE_REDUCERS)
@torch.no_grad()
def test_every_method_gives_the_logits_of_the_model(reduce, keep_everything):
    model = td.wrap(tiny_vit(), reduce=reduce).eval()
    degrees = (0, model.degree, model.degrees[-1])
    fast = td.optimize(model, images(4), degrees=degrees)
    assert [trial.name for trial in fast.trials if trial.kept] == [
        "packed weights",
        "unfused attention",
        "padded keys",
        "split batch",
    ]
    same_logits(fast, model, degrees)


@torch.no_grad()
def test_decoders_run_too(keep_everything):
    vit = tiny_vit(num_classes=0)
    parts = {"reduce": td.DAR(), "adapt": td.DARAdapter(dims=(6, 4))}
    model = td.wrap(vit, **parts, decode=td.DARDecoder()).eval()
    same_logits(td.optimize(model, images(2)), model, (0, 5))


@torch.no_grad()
def test_the_compiled_model_takes_batches_of_any_size(monkeypatch, keep_everything):
    # The default compiler takes a minute here, and has a test of its own.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = td.wrap(tiny_vit(depth=1), reduce=td.ToMe(r=4)).eval()
    torch._dynamo.reset()
    fast = td.optimize(model, images(2), compile=True)
    assert fast.trials[-1].name == "compiled"
    assert fast.trials[-1].kept
    assert fast.degrees == (0, 4)
    same_logits(fast, model, fast.degrees)


@torch.no_grad()
def test_the_model_stays_as_it_is_and_shares_its_weights(keep_everything):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    fast = td.optimize(model, images())
    fast.set_degree(0)
    assert (model.degree, model.training) == (4, True)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in fast.parameters()}


@torch.no_grad()
def test_a_compensator_turns_with_the_dial(keep_everything):
    torch.manual_seed(0)
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).eval()
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=0.5)), 0.3)
    plugin.attach(model)
    fast = td.optimize(model, images())
    apart = [p for p, q in zip(model.parameters(), fast.parameters(), strict=True) if p is q]
    assert not apart
    same_logits(fast, model, (0, 2, 4, 0))


@torch.no_grad()
def test_layers_with_more_to_do_are_left_alone(keep_everything):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4), adapt=td.LoRA(rank=2)).eval()
    perturbed(model.adapter)
    same_logits(td.optimize(model, images()), model, (0, 4))


@torch.no_grad()
def test_half_precision_runs_where_there_are_instructions_for_it(monkeypatch, keep_everything):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).eval()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    emulated = td.optimize(model, images(), dtype=torch.bfloat16)
    assert emulated.notes == [
        "this processor has no instructions for bfloat16: running in float32."
    ]
    same_logits(emulated, model, (0, 4))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    half = td.optimize(model, images(), dtype=torch.bfloat16)
    assert half(images()).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    half.set_degree(0)
    model.set_degree(0)
    torch.testing.assert_close(half(images()).float(), model(images()), atol=0.1, rtol=0)


@torch.no_grad()
def test_what_fails_or_is_slower_is_left_out(monkeypatch):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).eval()

    class Broken(nn.Linear):
        def __init__(self, linear, gelu):
            super().__init__(linear.in_features, linear.out_features)

        def forward(self, x):
            raise RuntimeError("not here\nin many lines")

    monkeypatch.setattr(treatments, "PackedLinear", Broken)
    monkeypatch.setattr(treatments, "_MIN_SPEEDUP", float("inf"))
    fast = td.optimize(model, images())
    assert str(fast.trials[0]) == "packed weights: not supported here (not here)"
    assert str(fast.trials[1]).endswith("x, left out")
    model.skip_unread_patches = True  # the one thing that is always done
    assert torch.equal(fast(images()), model(images()))


@torch.no_grad()
def test_what_computes_something_else_is_left_out(monkeypatch, keep_everything):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).eval()

    class Forgetful(nn.Linear):
        def __init__(self, linear, gelu):
            super().__init__(linear.in_features, linear.out_features)

        def forward(self, x):
            return torch.full((*x.shape[:-1], self.out_features), torch.nan)

    monkeypatch.setattr(treatments, "PackedLinear", Forgetful)
    fast = td.optimize(model, images())
    assert str(fast.trials[0]) == "packed weights: not supported here (its logits differ by nan%)"
    same_logits(fast, model, (4,))


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1.01), (torch.float32, 1.15), (torch.bfloat16, 1.1)],
)
@torch.no_grad()
def test_what_gives_larger_logits_is_left_out(dtype, factor, monkeypatch, keep_everything):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).eval().to(dtype)
    fast = td.optimize(model, images(4))

    def use(on):
        fast.run = (lambda x: factor * fast.model(x)) if on else None

    treatments._try("louder", fast, images(4).to(dtype), use)
    assert str(fast.trials[-1]).startswith("louder: not supported here (its logits differ by ")
    assert fast.run is None


def test_logits_are_the_same_up_to_rounding_and_few_near_ties():
    wanted = images(20).flatten(1)[:, :10].unsqueeze(-1)
    generator = torch.Generator().manual_seed(0)
    rounded = wanted + 1e-4 * torch.randn(wanted.shape, generator=generator)
    treatments._check_same(rounded, wanted, 0.005)
    # Of one image or two a tie fell the other way; of four it is no chance.
    rounded[:2] = wanted[:2].roll(1, dims=1)
    treatments._check_same(rounded, wanted, 0.005)
    rounded[:4] = wanted[:4].roll(1, dims=1)
    with pytest.raises(ArithmeticError, match="its top class differs in 20% of the images"):
        treatments._check_same(rounded, wanted, 0.005)


@torch.no_grad()
def test_sizes_in_keys_give_the_logits_of_the_model(keep_everything):
    model = td.wrap(tiny_vit(), reduce=td.ToMe(r=4)).eval()
    fast = td.optimize(model, images())
    treatments.try_sizes_in_keys(fast, images())
    assert fast.trials[-1].name == "sizes in keys"
    assert fast.trials[-1].kept
    same_logits(fast, model, (0, 4))
    pruned = td.optimize(td.wrap(tiny_vit(), reduce=td.EViT(r=4)), images())
    treatments.try_sizes_in_keys(pruned, images())
    assert pruned.trials[-1].name != "sizes in keys"


def test_settings_that_are_not_allowed():
    model = td.wrap(tiny_vit(depth=1), reduce=td.ToMe(r=4))
    with pytest.raises(ValueError, match=r"degrees must lie in \[0, 32\], got 40"):
        td.optimize(model, images(), degrees=[40])
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16"):
        td.optimize(model, images(), dtype=torch.int8)
    with pytest.raises(ValueError, match="images must be 32x32"):
        td.optimize(model, torch.zeros(2, 3, 16, 16))
    fast = td.optimize(model, images(), degrees=[0, 2])
    with pytest.raises(ValueError, match=r"made ready \(0, 2, 4\), got 3"):
        fast.set_degree(3)
