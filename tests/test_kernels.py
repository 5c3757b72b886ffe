"""When fused kernels run, that they compile for GPUs, and that they give what PyTorch gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples import images, tiny_vit

import tokendial as td
from tokendial.kernels import (
    find_most_similar_fused,
    fused_kernels_available,
    launch,
    merge_fused,
    should_fuse,
    use_fused_kernels,
)
from tokendial.tokens import Grouping
from tokendial.tune import optimized_vit

pytest.importorskip("triton")
# The first of three tokens absorbs the last.
KEEP, SRC, DST = torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[0]])


def test_kernels_give_what_pytorch_gives():
    """On the GPU; where there is none, in Triton's interpreter."""
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    tests = Path(__file__).with_name("kernels_beside_pytorch.py")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", tests]
    done = subprocess.run(
        command,
        cwd=tests.parents[1],
        env=os.environ | interpreted,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    """Names of the kernels that would have started if this processor were a GPU."""
    names = []
    monkeypatch.setattr(launch, "fused_kernels_available", lambda device: True)
    monkeypatch.setattr(launch, "_start", lambda kernel, *_, **__: names.append(kernel.__name__))
    return names


def test_kernels_run_if_asked_and_in_inference_alone(recorded):
    model, x = td.wrap(tiny_vit(depth=1), reduce=td.ToMe(r=4)), images()
    with torch.no_grad():
        model(x)
        with use_fused_kernels(), use_fused_kernels(False):
            model(x)
        assert recorded == []
        with use_fused_kernels():
            assert not should_fuse(x.double())
            model(x)
        assert recorded == ["most_similar_program", "merge_program", "merge_program"]


def test_what_trains_is_merged_as_ever(recorded):
    grouping = Grouping(KEEP, SRC, DST, 3)
    with use_fused_kernels():
        grouping.merge(torch.randn(1, 3, 4, requires_grad=True)).sum().backward()
    assert recorded == []


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_and_exported_models_are_plain(recorded):
    model, x = td.wrap(tiny_vit(depth=1), reduce=td.ToMe(r=4)).eval(), images()
    with torch.no_grad():
        plain = model(x)
        with use_fused_kernels():
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), plain)
            exported = torch.export.export(model, (x,)).module()
            torch.testing.assert_close(exported(x), plain)
    assert recorded == []


def test_without_triton_everything_is_plain(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(launch, "_has_triton", launch._has_triton.__wrapped__)
    assert not fused_kernels_available(torch.device("cuda"))
    assert not fused_kernels_available(torch.device("cpu"))


@torch.no_grad()
def test_kernels_that_fail_are_left_out(monkeypatch):
    for module in (launch, optimized_vit):
        monkeypatch.setattr(module, "fused_kernels_available", lambda device: True)
    model = td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=4)).eval()
    fast = td.optimize(model, images())
    assert str(fast.trials[-1]).startswith("fused reduction: not supported here (")
    torch.testing.assert_close(fast(images()), model(images()), atol=1e-5, rtol=0)


@pytest.fixture
def compiled(monkeypatch, tmp_path) -> list[str]:
    """PTX of the kernels that would have started; they are compiled for a GPU that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import mangle_type

    found = []

    def start(kernel, grid, *arguments, **blocks):
        types = [mangle_type(argument) for argument in arguments] + ["constexpr"] * len(blocks)
        source = ASTSource(kernel, dict(zip(kernel.arg_names, types, strict=True)), blocks)
        options = {"enable_fp_fusion": True}
        done = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert done.asm["cubin"]
        found.append(done.asm["ptx"])

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "_start", start)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_merging_compiles_for_a_gpu(compiled, dtype, how):
    merge_fused(torch.zeros(1, 3, 192, dtype=dtype), KEEP, SRC, DST, None, how)
    (ptx,) = compiled
    assert "atom" not in ptx


def test_matching_compiles_for_a_gpu(compiled):
    find_most_similar_fused(torch.zeros(1, 3, 64), KEEP[0], SRC[0])
    (ptx,) = compiled
    assert "fma.rn.f32" in ptx
    assert "mma" not in ptx  # which multiplies in TF32
