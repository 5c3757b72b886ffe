import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokendial.reduce.evit import attentive_grouping
from tokendial.reduce.tome import bipartite_matching
from tokendial.tokens import Grouping, Tokens


def worked_example() -> Grouping:
    """Five tokens: 0 stays, 3 absorbs 1, 2 is dropped, 4 stays."""
    return Grouping(
        keep=torch.tensor([[0, 3, 4]]),
        src=torch.tensor([[1]]),
        dst=torch.tensor([[1]]),
        num_tokens=5,
    )


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1)


def test_merge_is_the_weighted_mean_of_the_worked_example():
    weight = torch.tensor([[1.0, 1.0, 1.0, 3.0, 1.0]])
    merged = worked_example().merge(column(10, 2, 99, 6, 7), weight)
    torch.testing.assert_close(merged, column(10, (2 + 3 * 6) / 4, 7))


def test_merge_without_weights_is_the_plain_mean():
    torch.testing.assert_close(worked_example().merge(column(10, 2, 99, 6, 7)), column(10, 4, 7))


def test_merge_can_be_a_weighted_sum():
    grouping = worked_example()
    grouping.how, grouping.weight = "sum", torch.tensor([[1.0, 0.5, 0.0, 0.25, 1.0]])
    torch.testing.assert_close(grouping.merge(column(10, 2, 99, 6, 7)), column(10, 2.5, 7))


def test_index_names_the_new_token_of_every_old_one():
    assert worked_example().index.tolist() == [[0, 1, -1, 1, 2]]


def test_unmerge_copies_groups_back_and_leaves_zeros_where_dropped():
    assert worked_example().unmerge(column(1, 2, 3)).flatten().tolist() == [1, 2, 0, 2, 3]


def test_follow_keeps_dropped_positions_dropped():
    origin = torch.tensor([[-1, 1, 2, 4, 0]])
    assert worked_example().follow(origin).tolist() == [[-1, 1, -1, 2, 0]]


def test_a_dropped_position_is_restored_to_its_value_when_it_was_dropped():
    tokens = Tokens(column(10, 2, 99, 6, 7), prefix=1, grid=(2, 2)).with_tracking()
    tokens = tokens.apply_grouping(worked_example())
    tokens.x = tokens.x + 1000
    assert tokens.restore_positions().flatten().tolist() == [1010, 1004, 99, 1004, 1007]


def test_restoring_untracked_tokens_raises():
    with pytest.raises(ValueError, match="positions are not tracked"):
        Tokens(column(1, 2), prefix=1, grid=(1, 1)).restore_positions()


def test_carried_features_follow_with_the_weights_of_the_tokens():
    tokens = Tokens(
        column(10, 2, 99, 6, 7),
        prefix=1,
        grid=(2, 2),
        size=torch.tensor([[1.0, 1.0, 1.0, 3.0, 1.0]]),
        carried={"z": column(0, 4, 5, 8, 9)},
    )
    carried = tokens.apply_grouping(worked_example()).carried["z"]
    torch.testing.assert_close(carried, column(0, (4 + 3 * 8) / 4, 9))


def test_prompts_come_and_go_in_everything_that_has_a_row_for_each_token():
    row = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    tokens = Tokens(
        column(10, 2, 99, 6, 7),
        prefix=1,
        grid=(2, 2),
        size=row + 1,
        policy=row,
        selected=row,
        carried={"z": column(0, 4, 5, 8, 9)},
    ).with_tracking()
    prompted = tokens.with_prompts(torch.tensor([[20.0], [30.0]]))
    assert prompted.x.flatten().tolist() == [10, 20, 30, 2, 99, 6, 7]
    assert prompted.origin.tolist() == [[0, 3, 4, 5, 6]]
    for rows, theirs in (
        (prompted.size - 1, [1, 0, 0, 0, 1, 0, 1]),
        (prompted.policy, [1, 1, 1, 0, 1, 0, 1]),
        (prompted.selected, [1, 1, 1, 0, 1, 0, 1]),
        (prompted.carried["z"], [0, 0, 0, 4, 5, 8, 9]),
    ):
        assert rows.flatten().tolist() == theirs
    again = prompted.without_prompts(2)
    for field in ("x", "size", "policy", "selected", "origin"):
        assert torch.equal(getattr(again, field), getattr(tokens, field))
    assert torch.equal(again.carried["z"], tokens.carried["z"])
    assert (again.prefix, prompted.prefix) == (1, 3)


@st.composite
def matched(draw: st.DrawFn) -> tuple[Grouping, int]:
    prefix = draw(st.integers(0, 5))
    num_tokens = prefix + draw(st.integers(2, 40))
    r = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**16))
    metric = torch.randn(3, num_tokens, 8, generator=torch.Generator().manual_seed(seed))
    grouping = bipartite_matching(metric, r, num_prefix_tokens=prefix)
    assert grouping is not None
    return grouping, prefix


@given(matched())
def test_sizes_sum_to_the_number_of_tokens_over_two_reductions(example):
    grouping, prefix = example
    tokens = Tokens(torch.randn(3, grouping.num_tokens, 4), prefix, (1, 1))
    tokens = tokens.apply_grouping(grouping, track_size=True)
    again = bipartite_matching(tokens.x, 3, num_prefix_tokens=prefix)
    tokens = tokens.apply_grouping(again) if again else tokens
    assert tokens.size is not None
    assert tokens.size.sum(dim=1).tolist() == [grouping.num_tokens] * 3


@given(matched())
def test_merging_what_was_unmerged_changes_nothing(example):
    grouping, _ = example
    merged = grouping.merge(torch.randn(3, grouping.num_tokens, 4))
    torch.testing.assert_close(grouping.merge(grouping.unmerge(merged)), merged)


@given(matched())
def test_prefix_tokens_stay_alone_and_in_front(example):
    grouping, prefix = example
    assert (grouping.index[:, :prefix] == torch.arange(prefix)).all()
    assert not (grouping.src < prefix).any()
    assert not (grouping.dst < prefix).any()


@given(matched())
def test_matching_drops_nothing_and_each_new_token_is_used(example):
    grouping, _ = example
    for row in grouping.index.tolist():
        assert sorted(set(row)) == list(range(grouping.keep.shape[1]))


@given(st.integers(2, 30), st.data())
def test_attentive_grouping_keeps_the_best_and_fuses_all_others(num_patches, data):
    num_kept = data.draw(st.integers(1, num_patches - 1))
    scores = torch.rand(2, num_patches, generator=torch.Generator().manual_seed(num_patches))
    grouping = attentive_grouping(scores, num_kept, num_prefix_tokens=2)
    assert grouping is not None
    kept = grouping.keep[:, 2 : 2 + num_kept] - 2
    assert torch.equal(kept.sort().values, scores.topk(num_kept).indices.sort().values)
    assert (grouping.index >= 0).all()
    assert grouping.keep.shape[1] == 2 + num_kept + 1
