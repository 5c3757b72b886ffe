"""The share of decisions about tokens that rounding changes."""

import pytest
import torch
from examples import images, tiny_vit

import tokendial as td
from benchmarks.merges import changed_decisions, origins

FIRST = [0, 0, 1, 1, 1, 2]  # three merges
CASES = {
    "other numbers for the same tokens": (FIRST, [2, 2, 0, 0, 0, 1], 0.0),
    "one patch merges into another token": (FIRST, [0, 0, 1, 1, 0, 2], 1 / 3),
    "a token of two patches does": ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2], 1 / 3),
    "no merge is the same": ([0, 0, 1, 1], [0, 1, 0, 1], 1.0),
    "one of two drops is another one": ([0, -1, 1, -1], [-1, 0, 1, -1], 1 / 2),
    "a patch is dropped instead of merged": ([0, 0, 1, 2], [0, -1, 1, 2], 1.0),
    "nothing was decided": ([0, 1, 2, 3], [0, 1, 2, 3], 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_changed_decisions_are_counted(name):
    first, found, share = CASES[name]
    assert changed_decisions(torch.tensor([found]), torch.tensor([first])) == share
    # In a batch, every decision counts alike: the other image takes as many, all of them again.
    pair = torch.tensor([first, first])
    assert changed_decisions(torch.tensor([found, first]), pair) == share / 2


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_a_runtime_in_float32_decides_as_pytorch_and_other_weights_do_not(tmp_path):
    def decided(model, runtime):
        model.set_degree(8)
        return origins(model, images(4), td.Runtime(runtime), tmp_path, lambda model: images(4))

    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8)).eval()
    first, exported = decided(model, "torch"), decided(model, "onnxruntime")
    assert changed_decisions(exported, first) == 0
    torch.manual_seed(0)
    with torch.no_grad():
        weight = model.vit.blocks[0].attn.qkv.weight
        weight += 0.05 * torch.randn_like(weight)
    assert 0.1 < changed_decisions(decided(model, "torch"), first) < 1
    # The file of the model as it was stands for a runtime that decides otherwise.
    assert changed_decisions(decided(model, "onnxruntime"), first) == 0
