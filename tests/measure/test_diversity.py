import pytest
import torch
from examples import images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st

import tokendial as td
from tokendial.measure.diversity import attention_diversity, effective_rank, row_distance


def test_equal_rows_have_no_diversity():
    attention = torch.rand(1, 1, 1, 5).softmax(-1).expand(2, 3, 5, 5)
    assert row_distance(attention).abs().max() < 1e-6
    torch.testing.assert_close(effective_rank(attention), torch.ones(2, 3))


def test_rows_that_share_nothing_have_the_largest():
    attention = torch.eye(5).expand(2, 3, 5, 5)
    torch.testing.assert_close(row_distance(attention), torch.ones(2, 3))
    torch.testing.assert_close(effective_rank(attention), torch.full((2, 3), 5.0))


@given(count=st.integers(1, 9), seed=st.integers(0, 99))
def test_both_measures_stay_in_their_range_and_ignore_the_order(count, seed):
    generator = torch.Generator().manual_seed(seed)
    attention = (3 * torch.randn(1, 2, count, count, generator=generator)).softmax(-1)
    order = torch.randperm(count, generator=generator)
    for measure, low, high in ((row_distance, 0, 1), (effective_rank, 1, count)):
        value = measure(attention)
        assert (value >= low - 1e-4).all()
        assert (value <= high + 1e-4).all()
        torch.testing.assert_close(measure(attention[:, :, order][..., order]), value)


@pytest.mark.parametrize("reduce", [None, td.ToMe(r=8), td.DAR()], ids=["none", "tome", "dar"])
def test_every_layer_of_a_model_is_measured(reduce):
    model = td.wrap(tiny_vit(), reduce=reduce).train()
    layers = attention_diversity(model, images())
    assert [layer.layer for layer in layers] == [1, 2, 3, 4]
    # Attention comes before the reduction of its layer.
    counts = (65, *model.cost().tokens_per_layer[:-1])
    assert tuple(layer.num_tokens for layer in layers) == counts
    assert all(1 < layer.effective_rank <= layer.num_tokens for layer in layers)
    assert model.training
