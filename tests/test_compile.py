"""Every method compiles as one graph that equals the eager model."""

import pytest
import torch
from examples import images, tiny_vit
from zoo import backbone

import tokendial as td

ONE_GRAPH = {
    "tome": td.ToMe(r=8),
    "tome random": td.ToMe(r=8, matching="random"),
    "tome stride": td.ToMe(r=8, stride=4),
    "evit": td.EViT(r=8),
    "evit mean": td.EViT(keep_rate=0.5, layers=(1, 2), score="mean"),
    "dynamicvit": td.DynamicViT(keep_rate=0.5, layers=(1, 2)),
    "dyt": td.DyT(),
    "dar": td.DAR(),
    "dyt topk": td.DyT(selection="topk"),
    "dar topk": td.DAR(selection="topk"),
    "ffn_merge": td.FFNMerge(r=8),
}
# The compiler's own warnings, of the machine and of Python, are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")


def compare(model, pictures, *, degrees=None, **options):
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), **options)
    for degree in degrees or (model.degree,):
        model.set_degree(degree)
        torch.testing.assert_close(compiled(pictures), model(pictures), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduce", ONE_GRAPH.values(), ids=ONE_GRAPH)
@torch.no_grad()
def test_methods_are_one_graph_at_every_degree(reduce):
    model = td.wrap(tiny_vit(depth=2), reduce=reduce)
    degrees = (0, model.degree, model.degrees[-1])
    compare(model, images(), degrees=degrees, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", ["dinov3", "hf vit"])
@torch.no_grad()
def test_other_kinds_of_backbones_are_one_graph(name):
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.ToMe(r=3))
    compare(model, images(2, *size), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("reduce", [td.ToMe(r=8), td.DyT()], ids=["tome", "dyt"])
@torch.no_grad()
def test_the_default_compiler_equals_eager(reduce):
    compare(td.wrap(tiny_vit(depth=1), reduce=reduce), images(), fullgraph=True)
