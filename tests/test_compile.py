"""Every method compiles as one graph that equals the eager model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples import images, perturbed, tiny_vit
from zoo import backbone

import tokendial as td

ONE_GRAPH = {
    "tome": td.ToMe(r=8),
    "tome random": td.ToMe(r=8, matching="random"),
    "tome stride": td.ToMe(r=8, stride=4),
    "evit": td.EViT(r=[[8], [8, 16]]),
    "evit mean": td.EViT(keep_rate=0.5, layers=(1, 2), score="mean"),
    "dynamicvit": td.DynamicViT(keep_rate=0.5, layers=(1, 2)),
    "dyt": td.DyT(),
    "dar": td.DAR(),
    "dyt topk": td.DyT(selection="topk"),
    "dar topk": td.DAR(selection="topk"),
    "ffn_merge": td.FFNMerge(r=8),
    "tome similarity": td.ToMe(r=8, sizes="similarity"),
    "evit shift": td.EViT(r=8, score="shift"),
    "pitome": td.PiToMe(keep_ratio=0.9),
    "prune_merge": td.PruneMerge(r=8),
    "learnt_metric": td.LearntMetric(r=8, dim=8),
    "pyra": td.PYRA(r=8),
    "in_windows": td.InWindows(reduce=td.ToMe(r=2)),
    "stack": td.Stack(methods=[td.ToMe(r=8), td.FFNMerge(r=8)]),
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
    degrees = (model.degree, model.degrees[-1])
    compare(model, images(), degrees=degrees, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", ["vit", "rope mixed"])
@torch.no_grad()
def test_queries_that_read_the_blocks_are_in_the_graph(name):
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.ToMe(r=3), adapt=td.SynQT(queries=2, dim=4))
    compare(model, images(2, *size), degrees=(0, 3), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "name",
    [
        "dinov3",
        "naflex map",
        "naflex rope mixed",
        "hf vit",
        "hf dinov3",
        "hf siglip2",
        "hf yolos mid positions",
        "torchvision",
    ],
)
@torch.no_grad()
def test_other_kinds_of_backbones_are_one_graph(name):
    vit, size = backbone(name)
    model = td.wrap(vit, reduce=td.ToMe(r=3))
    compare(model, images(2, *size), degrees=(0, 3), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "adapt",
    [td.NOAH(prompts=[2, 0], rank=[0, 2], dim=3), td.NOAHSupernet(depths=(1,))],
    ids=["noah", "noah_supernet"],
)
@torch.no_grad()
def test_adapters_whose_widths_differ_by_block_are_one_graph(adapt):
    model = perturbed(td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8), adapt=adapt))
    compare(model, images(), degrees=(0, 8), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("reduce", [td.ToMe(r=8), td.DyT()], ids=["tome", "dyt"])
@torch.no_grad()
def test_the_default_compiler_equals_eager(reduce):
    compare(td.wrap(tiny_vit(depth=1), reduce=reduce), images(), fullgraph=True)


@torch.no_grad()
def test_compiled_models_notice_adapters_and_compensators():
    """Both may act by hooks, which the compiler does not look at."""
    torch._dynamo.reset()
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=4)).eval()
    for name in ("pets", "cars"):
        model.add_adapter(name, td.SSF())
        model.set_adapter(name)
        perturbed(model.adapter)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = []

    def compare_hooks():
        seen.append(compiled(images()))
        assert torch.equal(seen[-1], model(images()))

    for name in ("default", "pets", "cars"):
        model.set_adapter(name)
        compare_hooks()
    for seed in (0, 1):
        torch.manual_seed(seed)
        plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=0.5)), 0.3)
        plugin.attach(model, merge=False)
        compare_hooks()
        plugin.detach(model)
    assert len({logits.sum().item() for logits in seen}) == 5


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_compiled_models_notice_what_is_merged(merge):
    torch._dynamo.reset()
    model = perturbed(td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=4), adapt=td.SSF()))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=0.5)), 0.3)
    for change in (lambda: plugin.attach(model, merge=merge), model.merge_adapters):
        compiled(images())
        change()
        assert torch.equal(compiled(images()), model(images()))


WITHOUT_ASSERTS = """
import torch
from examples import images, perturbed, tiny_vit
import tokendial as td

with torch.no_grad():
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=4)).eval()
    plugin = perturbed(td.Compensator.for_model(model, td.ToCom(scale=0.5)), 0.3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for change in (lambda: None, lambda: plugin.attach(model, merge=False)):
        change()
        print(torch.equal(compiled(images()), model(images())))
"""


def test_compiled_models_notice_hooks_in_python_without_asserts():
    """`python -O` leaves asserts out, and what they read."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'src'}"}
    command = [sys.executable, "-O", "-c", WITHOUT_ASSERTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
