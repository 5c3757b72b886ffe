"""What an installation of Tokendial promises, extra by extra.

tools/check_installs.py runs this file by the Python of a fresh environment:

    python installed_checks.py EXTRA FIXTURES

FIXTURES is a folder with saved models and a run. Nothing is downloaded.
"""

import os
import pkgutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

import tokendial as td

COMMAND = Path(sys.executable).with_name("tokendial")
# Packages that come with the core, because timm and huggingface_hub need them.
BROUGHT = {"h11", "numpy", "PIL", "torchvision", "yaml"}


def tiny_vit() -> Any:
    """A small ViT with random weights, the same ones each time."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()


def tiny_model(adapt: Any = None) -> td.DialViT:
    """The small ViT, wrapped."""
    return td.wrap(tiny_vit(), reduce=td.ToMe(r=1), adapt=adapt).eval()


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the `tokendial` command."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def expect_success(*arguments: object) -> str:
    """Run the `tokendial` command, and return what it prints; it has to end with 0."""
    done = run_command(*arguments)
    if done.returncode:
        raise RuntimeError(f"tokendial {arguments[0]}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def check_core(fixtures: Path) -> None:
    """Wrap, turn the dial, save, load, optimise, export; what is missing names its extra."""
    from tokendial.extras import EXTRAS, MissingPackageError

    extra = [name for name in EXTRAS if name not in BROUGHT and find_spec(name)]
    assert not extra, f"the core brings {extra}"
    images = torch.randn(2, 3, 32, 32)
    model = tiny_model(td.AdaptFormer(dim=4))
    logits = model(images)
    model.save_pretrained("saved")
    loaded = td.load("saved", vit=tiny_vit())
    assert torch.equal(loaded(images), logits)
    loaded.set_degree(0)
    assert loaded.cost(1).macs < loaded.cost(0).macs
    fitted = td.fit(tiny_model(), images, gmacs=0.9 * tiny_model().cost(0).gmacs, minutes=0.02)
    assert len(fitted.degrees) == 1
    assert td.optimize(tiny_model(), images)(images).shape == (2, 3)
    assert td.export(tiny_model(), "model.pt2").difference < 1e-3
    assert td.load(fixtures / "tome_dense_adapter").degrees[0] == 0
    message = ""
    try:
        tiny_model(td.LoRA(rank=2))
    except MissingPackageError as error:
        message = str(error)
    assert message.endswith("pip install 'tokendial[peft]'"), message
    done = run_command("--help")
    assert done.returncode == 2, done
    assert done.stderr.endswith("pip install 'tokendial[cli]'\n"), done.stderr


def check_runs(fixtures: Path) -> None:
    """Open the run of an earlier version, and predict with it."""
    from PIL import Image

    from tokendial.runs import Run
    from tokendial.runs.predict import predict

    Image.new("RGB", (48, 48), "red").save("image.png")
    (answer,) = predict(Run(fixtures / "run"), [Path("image.png")], device="cpu")
    assert not isinstance(answer, Exception), answer


def check_train(fixtures: Path) -> None:
    """Train on a few rendered scenes."""
    from tokendial.runs import read_recipe
    from tokendial.train import train

    sizes = ["data.train_size=20", "data.val_size=10", "train.epochs=1", "train.batch_size=10"]
    run = train(read_recipe("demo", [*sizes, "output=run", "train.workers=0"]), quiet=True)
    assert [line["epoch"] for line in run.metrics()] == [1]


def check_cli(fixtures: Path) -> None:
    """Print the help, and profile a model."""
    assert "profile" in expect_success("--help")
    profile = ("profile", "vit_tiny_patch16_224", "--reduce", "tome", "--degrees", "0,8")
    assert "GMACs" in expect_success(*profile)


def check_serve(fixtures: Path) -> None:
    """Start the server, ask whether it is ready, and end it."""
    command = [COMMAND, "serve", fixtures / "run", "--port", "0", "--slo-ms", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            lines = [server.stdout.readline()]
            while lines[-1] and "http://" not in lines[-1]:
                lines.append(server.stdout.readline())
            assert lines[-1], f"the server ended: {lines}"
            address = lines[-1].split()[-1]
            with urllib.request.urlopen(f"{address}/readyz", timeout=60) as answer:
                assert answer.status == 200
        finally:
            server.terminate()


def check_export(fixtures: Path) -> None:
    """Write ONNX, which the export itself runs and compares."""
    assert td.export(tiny_model(), "model.onnx", degree=1).difference < 1e-3


def check_openvino(fixtures: Path) -> None:
    """Write OpenVINO's format, and compute in OpenVINO, also in 8 bits."""
    model, images = tiny_model(), torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    assert td.export(model, "model.xml", degree=1).difference < 1e-3
    started = td.Runtime("openvino").start(model, images, degrees=[1])
    assert (started(images) - model(images)).abs().max() < 1e-3
    rounded = td.Runtime("openvino", "int8").start(model, images, degrees=[1])
    assert 0 < (rounded(images) - model(images)).abs().max() < 0.5


def check_peft(fixtures: Path) -> None:
    """Build LoRA by PEFT."""
    assert tiny_model(td.LoRA(rank=2))(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def check_transformers(fixtures: Path) -> None:
    """Wrap a model of transformers."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
    args = sizes | {"intermediate_size": 48, "num_labels": 3}
    name = "transformers.ViTForImageClassification"
    vit = td.Backbone(name=name, weights=None, args=args).create()
    assert td.wrap(vit, reduce=td.ToMe(r=1))(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def check_openclip(fixtures: Path) -> None:
    """Find classes by names with a model of open_clip."""
    import open_clip

    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"layers": 1, "width": 16, "heads": 2}
    clip = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()
    proxy = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    config = td.ProxyCLIPConfig(shortest_side=32, window=32, stride=16, multiple=1)
    model = td.ProxyCLIP(clip, proxy, reduce=td.ToMe(r=2), config=config)
    model.set_classes(["cat", "dog"], prompts=["{}"])
    assert model.predict(torch.rand(1, 3, 32, 40)).shape == (1, 32, 40)


def check_video(fixtures: Path) -> None:
    """Encode a clip, and decode it."""
    import av
    import numpy as np

    from tokendial.data.readers.video import VideoFile

    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 64, 48
        for level in (0, 80, 160):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), level, np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = VideoFile("clip.mp4")
    assert len(video) == 3
    assert video.frames([0, 2]).shape[0] == 2


def check_matlab(fixtures: Path) -> None:
    """Read SVHN's files."""
    import numpy as np
    from scipy.io import savemat

    for split in ("train", "test"):
        savemat(f"{split}_32x32.mat", {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": [1, 2, 3, 10]})
    splits = data_set({"name": "svhn", "root": ".", "check": False})
    assert len(splits.train) == 4


def check_hf(fixtures: Path) -> None:
    """Read a data set that the datasets library has saved."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageColumn
    from PIL import Image

    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [0, 1]}
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=["a", "b"])})
    part = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": part, "validation": part}).save_to_disk("set")
    assert len(data_set({"name": "hf", "path": "set"}).train) == 2


def data_set(settings: dict[str, Any]) -> Any:
    """Open a data set by its settings in a recipe."""
    import tokendial.data  # registers the data sets
    from tokendial.methods import from_json

    assert tokendial.data
    return from_json("data", settings).build(0)


def check_masks(fixtures: Path) -> None:
    """Compute the measures of a binary mask."""
    from tokendial.tasks.metrics import MaskMetrics

    mask = torch.zeros(8, 8, dtype=torch.long)
    mask[2:5, 2:5] = 1
    metrics = MaskMetrics()
    metrics.update(20.0 * (2 * mask[None, None] - 1), [mask])
    assert all(value.isfinite() for value in metrics.compute().values())


def check_real(fixtures: Path) -> None:
    """Read the solar cells of the installed package, whose list and pictures are checked."""
    splits = data_set({"name": "elpv"})
    assert (len(splits.train) + len(splits.val), splits.train[0][0].size) == (2624, (300, 300))
    assert find_spec("onnx")


def check_ray(fixtures: Path) -> None:
    """Predict on a Ray cluster of this machine."""
    from PIL import Image

    Image.new("RGB", (48, 48), "red").save("image.png")
    assert "image.png" in expect_success("predict", fixtures / "run", "image.png", "--ray")


def check_all(fixtures: Path) -> None:
    """Import every module."""
    for module in pkgutil.walk_packages(td.__path__, "tokendial."):
        if module.name.endswith("__main__") or module.name == "tokendial.kernels.programs":
            continue  # starts the command line; needs Triton
        import_module(module.name)


CHECKS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("check_"): check
    for name, check in globals().items()
    if name.startswith("check_")
}


if __name__ == "__main__":
    name, fixtures = sys.argv[1], Path(sys.argv[2]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        CHECKS[name](fixtures)
