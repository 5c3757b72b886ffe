"""Models in onnxruntime and OpenVINO: the same answers, files that are kept, the fastest one."""

import os
import shutil
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from examples import images, tiny_vit
from zoo import backbone

import tokendial as td
from tokendial.runtimes import PLAIN, config

# The exporter's own warnings are no concern of these tests.
pytestmark = pytest.mark.filterwarnings("ignore")
DEGREES = (0, 8)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder that keeps exported files from test to test."""
    return tmp_path_factory.mktemp("kept")


def new_model():
    return td.wrap(tiny_vit(depth=2), reduce=td.ToMe(r=8)).eval()


def start(folder, *runtime, model=None, count=4, degrees=DEGREES):
    model = model or new_model()
    return td.Runtime(*runtime).start(model, images(count), degrees=degrees, folder=folder)


@torch.no_grad()
def largest_difference(model, started, count):
    """Of logits and embeddings, relative to the spread of each, over the degrees."""
    found = 0.0
    for degree in DEGREES:
        model.set_degree(degree)
        started.set_degree(degree)
        pairs = zip(
            started.logits_and_embeddings(images(count)),
            model.logits_and_embeddings(images(count)),
            strict=True,
        )
        found = max(found, *(float((a - b).abs().max() / b.std()) for a, b in pairs))
    return found


@pytest.mark.parametrize("count", [4, 1, 3])
@pytest.mark.parametrize(
    ("name", "precision", "within"),
    [
        ("onnxruntime", "fp32", 1e-4),
        ("openvino", "fp32", 1e-4),
        ("openvino", "bf16", 0.2),
        ("onnxruntime", "int8", 0.5),
        ("openvino", "int8", 0.2),
    ],
)
def test_a_runtime_gives_the_models_answers_for_any_batch(name, precision, within, count, kept):
    started = start(kept, name, precision)
    difference = largest_difference(new_model(), started, count)
    assert difference < within
    if precision != "fp32":
        assert difference > 1e-4  # it does compute in another precision
    assert (started.degrees, started.device.type) == (DEGREES, "cpu")


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@torch.no_grad()
def test_later_calls_are_as_right_as_the_first(name, tmp_path):
    """OpenVINO would add to its constant token sizes where the first layer merges half of them."""
    model = td.wrap(tiny_vit(depth=2, img_size=32), reduce=td.ToMe(r=32)).eval()
    started = start(tmp_path, name, model=model, count=4, degrees=[32])
    for seed in range(3):
        batch = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(started(batch), model(batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_models_that_openvino_computes_otherwise_are_refused(precision, tmp_path):
    vit, size = backbone("naflex", depth=1)
    model = td.wrap(vit.eval(), reduce=td.ToMe(r=2))
    model.set_degree(2)
    with pytest.raises(ValueError, match="openvino computes this model otherwise than torch"):
        td.Runtime("openvino", precision).start(
            model, torch.zeros(1, 3, *size), degrees=[0], folder=tmp_path
        )
    assert model.degree == 2


def test_openvino_calibrates_once_on_the_images_that_it_is_given(tmp_path, monkeypatch, capsys):
    model, asked = new_model(), []

    def ten_images(asked_for):
        asked.append(asked_for)
        return images(10)

    def int8(calibration=None):
        runtime = td.Runtime("openvino", "int8")
        zeros = torch.zeros_like(images(2))  # what a server starts with
        return runtime.start(
            model, zeros, degrees=DEGREES, folder=tmp_path, calibration=calibration
        )

    with pytest.raises(ValueError, match="calibrated on images .* whose values are all 0"):
        int8()
    with monkeypatch.context() as without:
        without.setattr("tokendial.extras.find_spec", lambda name: None if name == "nncf" else name)
        with pytest.raises(ValueError, match=r"int8 in openvino needs nncf, .*tokendial\[openvino"):
            int8(ten_images)
    started = int8(ten_images)
    printed = capsys.readouterr()
    assert (asked, printed.out) == ([model], "")  # for both degrees
    assert "calibrating degree_8 in 8 bits on 10 images" in printed.err
    again = int8()  # the files are there: neither images nor NNCF are needed
    assert "calibrating" not in capsys.readouterr().err
    assert torch.equal(again(images(2)), started(images(2)))


def test_only_linear_layers_of_openvino_are_in_8_bits(kept):
    openvino = pytest.importorskip("openvino")
    start(kept, "openvino", "int8")
    graph = openvino.Core().read_model(next(kept.glob("*/degree_8.int8.xml")))

    def first_input(node, place):
        """What a product reads, behind the steps that turn stored 8-bit numbers into floats."""
        node = node.input_value(place).get_node()
        while node.get_type_name() in ("Convert", "Multiply", "Subtract") and place:
            node = node.input_value(0).get_node()
        return node

    products = [node for node in graph.get_ops() if node.get_type_name() == "MatMul"]
    linear = [n for n in products if first_input(n, 1).get_type_name() == "Constant"]
    # Queries, keys, values, projection and FFN of two blocks, and the head.
    assert len(linear) == 2 * 6 + 1
    assert {first_input(n, 1).get_element_type().to_string() for n in linear} == {"i8"}
    rounded = [node for node in graph.get_ops() if node.get_type_name() == "FakeQuantize"]
    readers = {
        reader.get_node().get_friendly_name()
        for node in rounded
        for reader in node.output(0).get_target_inputs()
    }
    # Nothing else reads rounded values: not attention, not the comparison of tokens, not gathers.
    assert readers == {node.get_friendly_name() for node in linear}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_batches_of_many_sizes_give_the_same(kept, name):
    model = new_model()
    started = td.Runtime(name).start(
        model, images(4), degrees=DEGREES, folder=kept, mixed_sizes=True
    )
    for count in (1, 4, 3, 6):
        assert largest_difference(model, started, count) < 1e-4


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinities")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtimes_leave_the_choice_of_cores_to_the_system(kept, name):
    """A thread that may use one core only waits there while others idle."""
    before = os.sched_getaffinity(0)
    if len(before) == 1:
        pytest.skip("this process may use one core only")
    # Threads of other tests' libraries may be pinned, such as those of OpenVINO's calibration.
    others = set(os.listdir("/proc/self/task"))
    started, found = start(kept, name), set()
    running = threading.Thread(target=lambda: [started(images(4)) for _ in range(100)])
    running.start()
    while running.is_alive():
        for thread in {*os.listdir("/proc/self/task")} - others:
            with suppress(ProcessLookupError):  # it has just ended
                found.add(frozenset(os.sched_getaffinity(int(thread))))
    assert found == {frozenset(before)}


@torch.no_grad()
def test_masks_come_from_a_runtime_too(tmp_path):
    torch.manual_seed(0)
    model = td.wrap(
        tiny_vit(depth=2, num_classes=0),
        reduce=td.ToMe(r=8),
        decode=td.LinearDecoder(num_classes=3),
    )
    started = start(tmp_path, "openvino", model=model.eval(), degrees=[8])
    torch.testing.assert_close(started(images(2)), model(images(2)), atol=1e-4, rtol=0)


def test_files_are_kept_until_the_weights_change(tmp_path, capsys):
    def times_exported():
        return capsys.readouterr().err.count("exporting")

    for name in ("killed", "running"):
        (tmp_path / f".{name}" / "bundle").mkdir(parents=True)
    os.utime(tmp_path / ".killed" / "bundle", (0, 0))
    model = new_model()
    start(tmp_path, "openvino", model=model)
    assert times_exported() == 1
    assert not (tmp_path / ".killed").exists()
    shutil.rmtree(tmp_path / ".running")  # raises an error if it is gone
    start(tmp_path, "onnxruntime", model=model, degrees=[8])  # the other runtime, fewer degrees
    assert times_exported() == 0
    (bundle,) = tmp_path.iterdir()
    assert {path.name for path in bundle.iterdir()} == {
        "bundle.json",
        "degree_0.onnx",
        "degree_8.onnx",
        "weights.bin",
    }
    with torch.no_grad():
        model.vit.head.bias.add_(1.0)
    started = start(tmp_path, "openvino", model=model)
    assert times_exported() == 1
    assert largest_difference(model, started, 2) < 1e-4
    (other,) = tmp_path.iterdir()
    assert other.name != bundle.name


def test_files_are_deleted_if_no_folder_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    started = start(None, "openvino", degrees=[8])
    assert list(tmp_path.iterdir()) == []
    # A batch of another size is compiled only now, without the file.
    assert started(images(3)).shape == (3, 7)


def test_the_fastest_runtime_is_chosen(kept, capsys):
    started = start(kept, "auto")
    told = capsys.readouterr().err
    times = {
        line.split()[0]: float(line.split()[2])
        for line in told.splitlines()
        if " ms" in line and "fp32" in line
    }
    assert set(times) == {"torch", "onnxruntime", "openvino"}
    (chosen,) = (line.split()[0] for line in told.splitlines() if "(chosen)" in line)
    assert times[chosen] == min(times.values())
    assert isinstance(started, td.OptimizedViT) == (chosen == "torch")
    assert largest_difference(new_model(), started, 4) < 1e-3


@pytest.mark.parametrize("fastest", ["torch", "onnxruntime", "openvino"])
def test_the_chosen_runtime_has_all_degrees(kept, fastest, monkeypatch):
    """Times are given here, so that each is chosen once. Only the ends of the dial are tried."""
    tried = set()

    def times(turns, *_, **__):
        tried.update(degree for _, degree in turns)
        return [SimpleNamespace(seconds=1.0 + (name != fastest)) for name, _ in turns]

    monkeypatch.setattr(config, "time_in_rounds", times)
    model = new_model()
    runtime, started = td.Runtime("auto").choose_and_start(
        model, images(4), degrees=(0, 4, 8), folder=kept
    )
    assert runtime == td.Runtime(fastest, optimize=fastest == "torch")
    assert tried == {0, 8}
    for degree in (4, 0, 8):
        for each in (model, started):
            each.set_degree(degree)
        with torch.no_grad():
            torch.testing.assert_close(started(images(4)), model(images(4)), rtol=1e-3, atol=1e-3)


def test_nothing_to_do_leaves_the_model_as_it_is():
    model = new_model()
    assert PLAIN.start(model, images(1)) is model
    assert not PLAIN
    assert td.Runtime("onnxruntime")


def test_a_compensator_is_in_the_exported_files(tmp_path):
    model = new_model()
    compensator = td.Compensator(td.ToCom(rank=2), depth=2, embed_dim=model.embed_dim, steps=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in compensator.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    plain = start(tmp_path, "onnxruntime", model=model)
    compensator.attach(model, 0)
    started = start(tmp_path, "onnxruntime", model=model)
    # Files without the compensator are not taken for those with it, nor those of another factor.
    assert largest_difference(model, started, 4) < 1e-4
    assert largest_difference(model, plain, 4) > 1e-2
    model.set_degree(0)
    compensator.scale *= 2
    assert largest_difference(model, start(tmp_path, "onnxruntime", model=model), 4) < 1e-4


def test_mistakes_are_told(kept):
    with pytest.raises(ValueError, match="runtime must be one of torch, onnxruntime, openvino"):
        td.Runtime("tensorrt")
    with pytest.raises(ValueError, match="precision in onnxruntime must be .* int8, got 'bf16'"):
        td.Runtime("onnxruntime", "bf16")
    with pytest.raises(ValueError, match="precision in openvino must be .* int8, got 'fp16'"):
        td.Runtime("openvino", "fp16")
    with pytest.raises(ValueError, match="optimize and compile are for torch, got .* openvino"):
        td.Runtime("openvino", optimize=True)
    started = start(kept, "onnxruntime")
    with pytest.raises(ValueError, match="degree must be an integer in .*, got 4"):
        started.set_degree(4)
    with pytest.raises(ValueError, match="feature_map is not among the outputs .*: logits, embe"):
        started.feature_map(images(4))
