"""`tokendial embed` with models in folders of transformers and open_clip."""

import json

import numpy as np
import pytest
import torch
import transformers
from model_folders import write_open_clip_folder, write_transformers_folder
from PIL import Image
from safetensors.torch import load_file

import tokendial as td
from tokendial.data import read_image
from tokendial.runs.image_model import open_image_model


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four images of noise, one of them upright, and a file that is none."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(4):
        size = (96, 72, 3) if number == 2 else (72, 96, 3)
        Image.fromarray(random.integers(0, 255, size, dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    (folder / "1b.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_transformers_folder("CLIP", tmp_path_factory.mktemp("clip"))


def embedded(cli, folder, photos, out, *options):
    """The embeddings that the command writes, and the images that they are of."""
    code, _, err = cli("embed", folder, photos, "--out", out, "--batch-size", 3, *options)
    assert (code, err.count("error: ")) == (1, 1), err  # the file that is no image
    facts = json.loads(out.with_suffix(".json").read_text())
    return load_file(out)["embeddings"], [read_image(name) for name in facts["files"]]


@torch.no_grad()
def test_clip_gives_what_its_own_call_gives(cli, clip, photos, tmp_path):
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    process = transformers.AutoImageProcessor.from_pretrained(clip)
    found, images = embedded(cli, clip, photos, tmp_path / "plain.safetensors")
    inputs = torch.cat([process(image, return_tensors="pt").pixel_values for image in images])
    expected = model.get_image_features(pixel_values=inputs).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    reduced, _ = embedded(
        cli, clip, photos, tmp_path / "r.safetensors", "--reduce", "tome", "--degree", 4
    )
    with td.attach(model, reduce=td.ToMe(), towers=["vision_model"]) as dial:
        dial.set_degree(4)
        expected = model.get_image_features(pixel_values=inputs).pooler_output
    torch.testing.assert_close(reduced, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(reduced, found, atol=1e-3)


@torch.no_grad()
def test_images_of_several_sizes_keep_their_order(cli, photos, tmp_path):
    folder = write_transformers_folder("DINOv2 features", tmp_path)
    transformers.BitImageProcessor(do_resize=False, do_center_crop=False).save_pretrained(folder)
    found, images = embedded(cli, folder, photos, tmp_path / "out.safetensors")
    source = open_image_model(folder)
    assert len({image.size for image in images}) == 2
    for embedding, image in zip(found, images, strict=True):
        (expected,) = (o.values for o in source.outputs(source.run(source.prepare(image)))[:1])
        torch.testing.assert_close(embedding, expected[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_open_clip_gives_what_encode_image_gives(cli, photos, tmp_path):
    source = open_image_model(write_open_clip_folder(tmp_path))
    found, images = embedded(cli, tmp_path, photos, tmp_path / "out.safetensors")
    expected = [source.model.encode_image(**source.prepare(image)) for image in images]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--degree", 4], "degree needs reduce, because "),
        (["--features", "map"], "features must be pooled for a model of transformers or open_clip"),
        (["--runtime", "onnxruntime"], "runtime must be torch for a model of transformers or op"),
        (["--img-size", 64], "img_size must be left out for a model of transformers or open_clip"),
        (["--reduce", "dyt", "--degree", 1], "reduce must be a method without weights of its own"),
        (["--reduce", "tome", "--degree", 999], "degree must be an integer in [0, "),
    ],
)
def test_what_does_not_fit_is_one_line(cli, clip, photos, tmp_path, options, message):
    code, _, err = cli("embed", clip, photos, "--out", tmp_path / "x.safetensors", *options)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_model_without_embeddings_and_other_commands_say_so(cli, photos, tmp_path):
    folder = write_transformers_folder("Depth Anything", tmp_path)
    code, _, err = cli("embed", folder, photos, "--out", tmp_path / "x.safetensors")
    assert (code, "gives no embeddings of images; it gives predicted_depth." in err) == (2, True)
    code, _, err = cli("eval", folder, "--images", photos)
    assert (code, "`tokendial attach` compares its degrees" in err) == (2, True)
