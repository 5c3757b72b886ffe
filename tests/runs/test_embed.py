"""`tokendial embed`: embeddings of images in files, by runs and by models without a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tokendial as td
from tokendial.data import ImageError, read_image
from tokendial.runs import embedding_files
from tokendial.runs.embed import EmbedSettings, embed
from tokendial.runs.embedding_files import embed_to_file
from tokendial.runs.model_source import ModelSource
from tokendial.runs.predict_ray import predict_on_ray

SHIPPED = ModelSource(name="scenes_vit", weights="shipped")


@torch.no_grad()
def by_hand(model, transform, files, degree=None):
    """Pooled features and feature maps of images, one image at a time."""
    if degree is not None:
        model.set_degree(degree)
    inputs = [transform(read_image(file)).unsqueeze(0) for file in files]
    pooled = [model.vit.forward_head(model.forward_features(x), pre_logits=True) for x in inputs]
    return torch.cat(pooled), torch.cat([model.feature_map(x) for x in inputs])


def test_a_run_gives_what_its_head_reads(cli, run, digits, tmp_path):
    out, folder = tmp_path / "features.safetensors", digits / "val" / "digit 1"
    code, printed, err = cli("embed", run.folder, folder, "--out", out, "--degree", 0)
    assert (code, err) == (0, "")
    assert printed == f"wrote {out}: 20 embeddings of 32 numbers\n"
    facts = json.loads(out.with_suffix(".json").read_text())
    files = [Path(name) for name in facts["files"]]
    assert files == sorted(folder.iterdir())
    model = run.model()
    expected, _ = by_hand(model, run.task().image_transform(model.anatomy), files, 0)
    torch.testing.assert_close(load_file(out)["embeddings"], expected)
    assert (facts["degree"], facts["features"], facts["name"]) == (0, "pooled", str(run.folder))
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["tokendial"])["revision"] == facts["revision"]
    assert {path.name for path in tmp_path.iterdir()} == {"features.safetensors", "features.json"}


@pytest.mark.parametrize("features", ["pooled", "mean", "map"])
def test_a_saved_model_and_a_backbone_give_the_same(digits, tmp_path, features):
    files = sorted(digits.glob("val/*/*.png"))[:5]
    settings = EmbedSettings(degree=8, reduce=td.ToMe(), features=features, batch_size=2)
    found = torch.stack([row.values for row in embed(SHIPPED, files, settings)])
    opened = SHIPPED.open(td.ToMe())
    _, maps = by_hand(opened.model, opened.transform, files, 8)
    if features == "pooled":
        # Pooling weighs merged tokens by size: so the head does, too.
        with torch.no_grad():
            images = torch.stack([opened.transform(read_image(file)) for file in files])
            logits = opened.model.vit.head(found)
            torch.testing.assert_close(logits, opened.model(images), rtol=1e-4, atol=1e-4)
    else:
        expected = maps.mean(dim=(2, 3)) if features == "mean" else maps
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    opened.model.save_pretrained(tmp_path / "saved")
    saved = ModelSource(name=str(tmp_path / "saved"))
    again = EmbedSettings(degree=8, features=features, batch_size=2)
    assert torch.equal(torch.stack([row.values for row in embed(saved, files, again)]), found)


def test_parquet_holds_the_names_beside_the_features(cli, digits, tmp_path):
    model = ("scenes_vit", "--weights", "shipped")
    folder = digits / "val" / "digit 2"
    for out in (tmp_path / "f.parquet", tmp_path / "f.safetensors"):
        assert cli("embed", *model, folder, "--out", out, "--features", "map")[0] == 0
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["file"].to_pylist() == [str(path) for path in sorted(folder.iterdir())]
    facts = json.loads(table.schema.metadata[b"tokendial"])
    values = torch.tensor(table["embedding"].to_pylist()).unflatten(1, facts["shape"])
    assert torch.equal(values, load_file(tmp_path / "f.safetensors")["embeddings"])


def test_images_that_cannot_be_read_are_left_out(cli, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_files, "PART", 2)
    files = sorted(digits.glob("val/*/*.png"))[:3]
    # The second part has no image at all.
    broken = [tmp_path / f"broken{number}.png" for number in range(3)]
    for path in broken:
        path.write_text("no image")
    out = tmp_path / "f.safetensors"
    paths = [files[0], *broken, *files[1:]]
    model = ("scenes_vit", "--weights", "shipped")
    code, _, err = cli("embed", *model, *paths, "--out", out)
    assert code == 1
    assert err.count("error: ") == 3
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["files"] == list(map(str, files))
    assert len(facts["unreadable"]) == 3
    expected = [row.values for row in embed(SHIPPED, files)]
    torch.testing.assert_close(load_file(out)["embeddings"], torch.stack(expected))
    code, _, err = cli("embed", *model, *broken, "--out", tmp_path / "none.safetensors")
    assert code == 2
    assert err.startswith("error: no image can be read; the first error: ")


# `tokendial embed` with small parts.
KILLED = """
import tokendial.runs.embedding_files
tokendial.runs.embedding_files.PART = 4
from tokendial.cli import main
main()
"""


def test_a_killed_command_continues_to_the_same_bits(cli, digits, tmp_path, monkeypatch):
    out = tmp_path / "f.safetensors"
    arguments = ["embed", "scenes_vit", str(digits / "train"), "--weights", "shipped"]
    arguments += ["--batch-size", "4", "--out"]
    environment = os.environ | {"PYTHONPATH": str(Path(td.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments, str(out)], env=environment
    )
    parts = tmp_path / "f.safetensors.parts"
    deadline = time.monotonic() + 120
    while not (parts / "part-000003.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    # As a process that dies inside of a write leaves it.
    (parts / ".part-000059.safetensors.abcdefgh").write_text("half")
    monkeypatch.setattr(embedding_files, "PART", 4)
    # Other settings are refused, and leave the work as it is.
    code, _, err = cli(*arguments, out, "--reduce", "tome")
    assert (code, "holds unfinished work whose reduce is None, not" in err) == (2, True)
    assert {path: path.stat().st_mtime_ns for path in parts.glob("part-*")} == done
    removed = []
    monkeypatch.setattr(embedding_files.shutil, "rmtree", removed.append)
    code, _, err = cli(*arguments, out)
    assert code == 0
    assert f"{len(done) * 4} of 240 images are done already" in err
    assert removed == [parts]
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(parts.glob(".*"))
    alone = tmp_path / "alone.safetensors"
    assert cli(*arguments, alone)[0] == 0
    assert load_file(out)["embeddings"].shape == (240, 96)
    assert out.read_bytes() == alone.read_bytes()
    assert out.with_suffix(".json").read_bytes() == alone.with_suffix(".json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "f.npy"], "out must end in .safetensors or .parquet, got f.npy"),
        (["--out", "no/f.parquet"], "out: no such folder: no"),
        (["--degree", "5", "--out", "f.parquet"], "degree must "),
        (["--reduce", "best", "--out", "f.parquet"], "reduce.name must be one of"),
    ],
)
def test_mistakes_are_one_line_and_code_2(cli, digits, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("embed", "scenes_vit", digits / "val", "--weights", "shipped", *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["f.safetensors", "f.json"])
def test_files_that_exist_are_never_replaced(cli, digits, tmp_path, name):
    out, mine = tmp_path / "f.safetensors", tmp_path / name
    mine.write_text("mine")
    code, _, err = cli("embed", "scenes_vit", digits / "val", "--weights", "shipped", "--out", out)
    assert (code, err) == (2, f"error: out: {mine} exists; remove it or choose another out.\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_parquet_without_its_package_names_the_extra(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("tokendial.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow, .* pip install 'tokendial\[hf\]'"):
        embed_to_file(SHIPPED, [], tmp_path / "f.parquet")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_embeddings_of_one_process_in_their_order(digits, tmp_path):
    files = sorted(digits.glob("val/*/*.png"))[:7]
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    sources = [*files[:3], broken, *files[3:]]
    settings = EmbedSettings(batch_size=3)
    plain, answers = (list(embed(SHIPPED, sources, settings, ray=ray)) for ray in (False, True))
    assert len(answers) == len(plain) == 8
    for ours, theirs in zip(answers, plain, strict=True):
        if isinstance(theirs, ImageError):
            assert str(ours) == str(theirs)
            continue
        assert ours.path == theirs.path
        torch.testing.assert_close(ours.values, theirs.values)


def test_mistakes_are_reported_before_ray_starts(run, digits):
    files = sorted(digits.glob("val/*/*.png"))
    with pytest.raises(ValueError, match=r"degree"):
        list(embed(SHIPPED, files, EmbedSettings(degree=3), ray=True))
    with pytest.raises(ValueError, match=r"top must lie in \[1, 4\] \(classes\), got 5"):
        list(predict_on_ray(run, files, top=5))


@pytest.mark.parametrize("name", ["openvino", "auto"])
def test_eight_bits_in_openvino_need_the_images_of_a_run(name):
    settings = EmbedSettings(runtime=name, precision="int8")
    with pytest.raises(ValueError, match=f"int8 in {name} needs a run, on whose training images"):
        list(embed(SHIPPED, [], settings))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_other_runtimes_give_the_same_embeddings(cli, run, digits, tmp_path):
    folder, found = digits / "val" / "digit 1", {}
    for name, flags in {
        "torch": [],
        "openvino": ["--runtime", "openvino"],
        "int8": ["--runtime", "onnxruntime", "--precision", "int8"],
        "map": ["--features", "map"],
        "openvino map": ["--runtime", "openvino", "--features", "map"],
    }.items():
        out = tmp_path / f"{name}.safetensors"
        assert cli("embed", run.folder, folder, "--out", out, "--degree", 8, *flags)[0] == 0
        found[name] = load_file(out)["embeddings"]
    for ours, theirs in (("torch", "openvino"), ("map", "openvino map")):
        torch.testing.assert_close(found[theirs], found[ours], atol=1e-4, rtol=0)
    cosine = torch.cosine_similarity(found["int8"], found["torch"])
    assert 0.95 < cosine.min() < 1.0
    with pytest.raises(ValueError, match="precision in torch must be one of .*, got 'int8'"):
        EmbedSettings(precision="int8")
