import torch
from examples import images

import tokendial as td
from benchmarks.memory import mark_reduction, peak_of


def test_the_peak_is_what_is_held_at_a_time():
    def call() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(500, dtype=torch.float32)
        del first
        third = torch.empty(250, dtype=torch.float32)
        del second, third

    peak = peak_of(call)
    assert 6000 <= peak.whole < 6400  # allocations are rounded up
    assert peak.reducing == 0


@torch.no_grad()
def test_the_memory_of_a_reduction_is_its_own(vit):
    x = images()
    whole, tome = td.wrap(vit), td.wrap(vit, reduce=td.ToMe(r=16))

    def own(model: td.DialViT) -> int:
        with mark_reduction(model):
            return peak_of(lambda: model(x)).reducing

    assert own(whole) == 0
    merged_tokens = 2 * (65 - 16) * 48 * 4
    assert merged_tokens < own(tome) < 10 * merged_tokens
    tome.set_degree(0)
    assert own(tome) == 0


@torch.no_grad()
def test_the_ffn_that_a_reducer_runs_is_not_its_own_memory(vit):
    x = images(8)
    model = td.wrap(vit, reduce=td.DyT(selection="topk")).eval()
    with mark_reduction(model):
        reducing = peak_of(lambda: model(x)).reducing
    hidden = 8 * 33 * 4 * 48 * 4
    chosen = 8 * 33 * 48 * 4
    assert chosen <= reducing < chosen + 2 * hidden


def test_a_model_is_as_before_after_its_work_was_marked(vit):
    model = td.wrap(vit, reduce=td.DyT()).eval()
    before = dict(vars(model.reducer))
    apply_grouping = td.tokens.Tokens.apply_grouping
    with mark_reduction(model):
        pass
    assert vars(model.reducer) == before
    assert td.tokens.Tokens.apply_grouping is apply_grouping
