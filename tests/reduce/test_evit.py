from dataclasses import replace

import pytest
import torch
from examples import golden, golden_vit, images, split, tiny_vit
from torch.utils._python_dispatch import TorchDispatchMode

import tokendial as td
from tokendial.attention import attend
from tokendial.backbones import anatomy_of
from tokendial.reduce.base import num_kept_tokens
from tokendial.reduce.evit import attentive_grouping, shrinking_keep_rate
from tokendial.tokens import Tokens

RATES = {"sched": [0.7, 0.7], "runtime": [0.5, 0.9]}
REST = {"fuse": "merge", "nofuse": "drop"}


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("rates", RATES)
@torch.no_grad()
def test_whole_model_equals_the_reference(rates, rest):
    _, tensors, vit = golden_vit("evit_vit")
    model = td.wrap(vit, reduce=td.EViT(keep_rate=RATES[rates], layers=(2, 4), rest=REST[rest]))
    expected = f"output.{rates}_{rest}."
    logits = tensors[f"{expected}logits"]
    torch.testing.assert_close(model(tensors["input"]), logits, atol=1e-4, rtol=0)
    needs = frozenset({"class_attention"})
    steps = list(model.steps(tensors["input"], needs=needs))
    counts = [step.tokens.x.shape[1] for step in steps]
    assert counts == tensors[f"{expected}tokens_per_layer"].tolist()
    for block, step in ((1, steps[1]), (3, steps[3])):
        scores = step.attended.class_attention[:, 1:]
        wanted = tensors[f"{expected}block{block}.cls_attn"]
        ordered = (scores.sort().values, wanted.sort().values)
        torch.testing.assert_close(*ordered, atol=1e-5, rtol=0)
        kept = tensors[f"{expected}block{block}.kept_idx"]
        grouping = attentive_grouping(scores, kept.shape[1], rest=REST[rest])
        mine = (grouping.keep[:, 1 : 1 + kept.shape[1]] - 1).sort().values
        # Tokens of the second selection may stand in another order where scores nearly tie.
        aligned = scores.gather(1, mine).sort().values
        torch.testing.assert_close(aligned, wanted.gather(1, kept).sort().values, atol=1e-5, rtol=0)
        if block == 1:
            assert torch.equal(mine, kept.sort().values)


@pytest.mark.parametrize("rest", REST)
@torch.no_grad()
def test_one_block_equals_the_reference(rest):
    meta, tensors = golden("evit_fused_token")
    vit = tiny_vit(depth=1)
    vit.blocks[0].load_state_dict(split(tensors, "weight."))
    anatomy, x = anatomy_of(vit), tensors["input"]
    normed = anatomy.attention_input(1, x)
    heads = anatomy.qkv(1, normed, Tokens(x, 1, (4, 8)))
    out, attended = attend(*heads, needs=frozenset({"class_attention"}))
    scores = attended.class_attention[:, 1:]
    torch.testing.assert_close(scores, tensors["output.rate.cls_attn"], atol=1e-5, rtol=0)
    num_kept = num_kept_tokens(scores.shape[1], meta["settings"]["block_keep_rate"])
    grouping = attentive_grouping(scores, num_kept, rest=REST[rest])
    assert torch.equal(grouping.keep[:, 1 : 1 + num_kept] - 1, tensors["output.rate.kept_idx"])
    after = x + anatomy.attention_branch(1, out, normed)
    tokens = Tokens(after, 1, (4, 8)).apply_grouping(grouping)
    before = tensors[f"output.rate_{rest}.tokens_before_mlp"]
    torch.testing.assert_close(tokens.x, before, atol=1e-5, rtol=0)
    out = tokens.x + anatomy.ffn_branch(1, anatomy.ffn_input(1, tokens.x))
    torch.testing.assert_close(out, tensors[f"output.rate_{rest}.out"], atol=1e-5, rtol=0)


def schedule_rows() -> list[dict]:
    return golden("evit_keep_rate_schedule")[0]["rows"]


@pytest.mark.parametrize("row", schedule_rows())
def test_the_shrinking_keep_rate_equals_the_reference(row):
    arguments = row["args"]
    rate = shrinking_keep_rate(
        arguments["base_keep_rate"],
        step=arguments["iters"],
        steps_per_epoch=arguments["ITERS_PER_EPOCH"],
        start_epoch=arguments["warmup_epochs"],
        end_epoch=arguments["total_epochs"],
    )
    assert rate == pytest.approx(row["result"], abs=1e-9)


def fused(fuse_weights: str) -> list[float]:
    """Four one-dimensional patches after a class token; patches 2 and 4 are kept."""
    scores = torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    grouping = attentive_grouping(scores, 2, fuse_weights=fuse_weights)
    return (
        grouping.merge(torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0]]).unsqueeze(-1)).flatten().tolist()
    )


def test_the_worked_example_sums_the_others_with_raw_weights():
    assert fused("raw") == pytest.approx([9.0, 4.0, 2.0, 0.1 * 1 + 0.2 * 3])


def test_the_worked_example_averages_the_others_with_normalised_weights():
    assert fused("normalised") == pytest.approx([9.0, 4.0, 2.0, (0.1 * 1 + 0.2 * 3) / 0.3])


def test_argmax_appends_the_best_of_the_others():
    grouping = attentive_grouping(torch.tensor([[0.1, 0.3, 0.2, 0.4]]), 2, rest="argmax")
    assert grouping.keep.tolist() == [[0, 4, 2, 3]]
    assert grouping.index.tolist() == [[0, -1, 2, 3, 1]]


def test_keeping_all_is_no_reduction():
    assert attentive_grouping(torch.rand(1, 4), 4) is None
    assert attentive_grouping(torch.rand(1, 4), 3, rest="argmax") is None


def test_token_count_ignores_binary_rounding():
    assert 0.07 * 100 > 7
    assert num_kept_tokens(100, 0.07) == 7


@pytest.mark.parametrize("rest", ["merge", "argmax", "drop"])
def test_r_tokens_go_in_every_layer(rest):
    model = td.wrap(tiny_vit(), reduce=td.EViT(r=9, rest=rest))
    assert model.cost().tokens_per_layer == (56, 47, 38, 29)


@pytest.mark.parametrize("rest", ["merge", "argmax", "drop"])
def test_at_least_one_patch_token_stays(rest):
    model = td.wrap(tiny_vit(), reduce=td.EViT(r=32, rest=rest))
    assert model.cost().tokens_per_layer[-1] >= 2
    assert model(images()).isfinite().all()


def test_degrees_of_a_keep_rate_are_tenths():
    model = td.wrap(tiny_vit(), reduce=td.EViT(keep_rate=0.7, layers=(2,)))
    assert (model.degree, model.degrees) == (3, tuple(range(10)))
    model.set_degree(5)
    assert model.cost().tokens_per_layer[1] == 1 + 32 + 1


def test_a_keep_rate_between_the_tenths_is_sorted_in():
    model = td.wrap(tiny_vit(), reduce=td.EViT(keep_rate=0.75, layers=(2,)))
    assert (model.degree, model.degrees) == (3, tuple(range(11)))
    assert model.cost().tokens_per_layer[1] == 1 + 48 + 1


def test_a_layer_that_the_model_has_not_raises(vit):
    with pytest.raises(ValueError, match=r"layers must lie in \[1, 4\] .*, got 7"):
        td.wrap(vit, reduce=td.EViT())


def test_a_backbone_without_class_token_raises():
    vit = tiny_vit(class_token=False, global_pool="avg")
    with pytest.raises(
        ValueError,
        match="EViT with score='class' needs a backbone with a class token, .*: use score='mean'",
    ):
        td.wrap(vit, reduce=td.EViT(r=2))


def test_the_keep_rate_of_training_shrinks_and_that_of_inference_does_not():
    model = td.wrap(tiny_vit(), reduce=td.EViT(keep_rate=0.5, layers=(2,), shrink=(1, 3)))

    def tokens_in_training(step):
        model.train()
        model.reducer.at_step(step, steps_per_epoch=10)
        *_, last = model.steps(images())
        return last.tokens.x.shape[1] - 2

    counts = [tokens_in_training(step) for step in (0, 9, 15, 20, 25, 30, 50)]
    assert counts[:2] == [63, 63]  # nothing is reduced yet, there is no fused token
    assert counts == sorted(counts, reverse=True)
    assert counts[3] == 64 * 0.75
    assert counts[-2:] == [32, 32]
    model.reducer.at_step(0, steps_per_epoch=10)
    model.eval()
    assert model.cost().tokens_per_layer[-1] == 1 + 32 + 1


def test_without_class_token_the_mean_attention_can_rank():
    vit = tiny_vit(class_token=False, global_pool="avg")
    model = td.wrap(vit, reduce=td.EViT(keep_rate=0.5, layers=(2,), score="mean", rest="drop"))
    needs = frozenset({"attention"})
    steps = list(model.steps(images(), track=True, needs=needs))
    received = steps[1].attended.attention.mean((1, 2))
    kept = (steps[-1].tokens.origin >= 0).nonzero()[:, 1].reshape(2, 32)
    assert torch.equal(received.topk(32).indices.sort().values, kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrink": (5, 5)}, r"shrink must be two rising epochs, got \(5, 5\)"),
        ({"shrink": (5,)}, "shrink must be two rising epochs"),
        ({"shrink": (0, 5), "r": 8}, "shrink must be None where r is set"),
        ({"score": "max"}, "score must be one of class, mean, shift, got 'max'"),
    ],
)
def test_bad_schedules_and_scores_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        td.EViT(**settings)


class SquareMaps(TorchDispatchMode):
    """Counts the tensors that compare each of N tokens with each."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.count = num_tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        if isinstance(found, torch.Tensor):
            self.count += found.shape[-2:] == (self.num_tokens, self.num_tokens)
        return found


@pytest.mark.parametrize(("score", "maps"), [("shift", False), ("class", False), ("mean", True)])
@torch.no_grad()
def test_only_the_mean_needs_attention_maps(score, maps):
    model = td.wrap(tiny_vit(), reduce=td.EViT(layers=(2,), score=score)).eval()
    model.attention_kernel = replace(model.attention_kernel, fused=True)
    with SquareMaps(65) as made:
        model(images())
    assert (made.count > 0) == maps


@torch.no_grad()
def test_tokens_that_attention_changes_most_stay_by_shift():
    """No class token is needed, and every weight of the fused token is a share."""
    vit = tiny_vit(depth=1, class_token=False, global_pool="avg")
    model = td.wrap(vit, reduce=td.EViT(keep_rate=0.5, layers=(1,), score="shift")).eval()
    block, entered = vit.blocks[0], model.anatomy.embed(images()).x
    change = block.attn(block.norm1(entered))
    order = change.norm(dim=-1).argsort(dim=1, descending=True)
    (step,) = model.steps(images(), track=True, dropped="own")
    for image in range(2):
        kept = (step.tokens.origin[image] >= 0).nonzero().flatten()
        assert set(kept.tolist()) == set(order[image, :32].tolist())
    weights = change.norm(dim=-1)
    fused = torch.stack(
        [
            (weights[i, rest, None] * (entered + change)[i, rest]).sum(0) / weights[i, rest].sum()
            for i, rest in enumerate(order[:, 32:])
        ]
    )
    expected = fused + block.mlp(block.norm2(fused))
    torch.testing.assert_close(step.tokens.x[:, -1], expected, atol=1e-5, rtol=1e-5)
