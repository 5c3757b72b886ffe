"""Runs in memory: what they answer is what they answer alone."""

import dataclasses
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from served_runs import alone, pictures

import tokendial as td
from tokendial.runs import Run
from tokendial.runtimes import Runtime
from tokendial.serve.workers.decoder import render_mask
from tokendial.serve.workers.models import LoadedModels, load_models


def logits(models: LoadedModels, name: str, degree: int, images: list[Image.Image]) -> torch.Tensor:
    """What models make of images."""
    return models.run(
        name, degree, torch.stack([models.catalog.models[name].transform(i) for i in images])
    )


def test_runs_share_a_backbone_and_answer_as_they_do_alone(pets, cars):
    models = load_models({"pets": pets, "cars": cars})
    assert models.catalog.names == ("pets", "cars")
    assert models.catalog.degrees == pets.model().degrees
    images = pictures(3)
    for name, run in (("cars", cars), ("pets", pets), ("cars", cars)):
        for degree in (4, 0, 2):
            found = logits(models, name, degree, images)
            for own, image in zip(found, images, strict=True):
                torch.testing.assert_close(own, alone(run, image, degree))
    own = sum(p.numel() for p in pets.model().vit.patch_embed.parameters())
    kept = sum(p.numel() for p in models.model.vit.patch_embed.parameters())
    assert own == kept


def test_classes_are_named_most_probable_first(pets):
    models = load_models({"pets": pets})
    (image,) = pictures(1)
    likely = models.catalog.likely_classes("pets", alone(pets, image, 2), top=9)
    assert sorted(name for name, _ in likely) == ["cat", "dog", "hamster"]
    probabilities = [probability for _, probability in likely]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    assert models.catalog.likely_classes("pets", alone(pets, image, 2), top=1) == likely[:1]


def test_a_mask_has_the_size_of_the_image(masks):
    models = load_models({"masks": masks})
    (image,) = pictures(1)
    (found,) = logits(models, "masks", 4, [image])
    png, share = render_mask(models.catalog.models["masks"], found, (40, 50))
    mask = np.asarray(Image.open(BytesIO(png)))
    assert mask.shape == (40, 50)
    assert share == (mask > 127).mean()
    assert models.catalog.kind("masks") == "masks"


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("runtime", [Runtime(optimize=True), Runtime("openvino")], ids=str)
def test_an_optimised_copy_and_another_runtime_answer_the_same(pets, runtime, tmp_path):
    models = load_models({"pets": pets})
    models.catalog = dataclasses.replace(models.catalog, degrees=(0, 4))
    models.prepare(runtime, batch=2, folder=tmp_path)
    (image,) = pictures(1)
    for degree in (0, 4):
        (found,) = logits(models, "pets", degree, [image])
        torch.testing.assert_close(found, alone(pets, image, degree), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("runtime", [td.Runtime(), td.Runtime("onnxruntime")])
def test_a_compensator_follows_the_degree(runtime, pets, tmp_path):
    model = pets.model()
    plugin = td.Compensator.for_model(pets.model(), td.ToCom(rank=2), steps=4)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    plugin.save_pretrained(tmp_path)
    models = load_models({"pets": pets}, compensator=tmp_path)
    assert models.catalog.degrees == (0, 1, 2, 3, 4)  # as far as it reaches
    models.catalog = dataclasses.replace(models.catalog, degrees=(0, 2, 4))
    models.prepare(runtime, batch=1)
    plugin.eval().attach(model, source=2)
    (image,) = pictures(1)
    for degree in (0, 2, 4):
        model.set_degree(degree)
        ready = models.catalog.models["pets"].transform(image)
        with torch.no_grad():
            expected = model(ready.unsqueeze(0))
        given = logits(models, "pets", degree, [image])
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_the_allowed_degrees_end_at_the_lowest_accuracy(pets, tmp_path):
    run = Run(shutil.copytree(pets.folder, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"min_accuracy needs the accuracy of pets at degree 0"):
        load_models({"pets": run}).catalog.allowed_degrees(None, 0.5)
    table = run.folder / "eval" / "degrees.csv"
    table.parent.mkdir()
    rows = [f"{degree},{0.9 - 0.1 * degree:.1f},1.0,9.0,5,\n" for degree in range(9)]
    table.write_text("degree,accuracy,gmacs,images_per_s,tokens,share\n" + "".join(rows))
    models = load_models({"pets": run})
    assert models.catalog.accuracy("pets", 1) == pytest.approx(0.8)
    assert models.catalog.allowed_degrees(None, 0.65) == (0, 1, 2)
    assert models.catalog.allowed_degrees(1, 0.65) == (0, 1)
    assert models.catalog.allowed_degrees(None, None) == models.catalog.degrees
    with pytest.raises(ValueError, match="no degree reaches 0.95"):
        models.catalog.allowed_degrees(None, 0.95)
    with pytest.raises(ValueError, match=r"max_degree must lie in \[0, \d\], got 99"):
        models.catalog.allowed_degrees(99, None)


def test_runs_that_cannot_be_served_together_are_named(pets, masks, tmp_path):
    with pytest.raises(ValueError, match="runs must name at least one"):
        load_models({})
    with pytest.raises(ValueError, match="are for one run"):
        load_models({"a": pets, "b": pets}).prepare(Runtime(precision="bf16"))
    with pytest.raises(ValueError, match="num_classes|decoder|backbone"):
        load_models({"pets": pets, "masks": masks})
    with pytest.raises(ValueError, match="is not the folder of a run"):
        load_models({"pets": Run(tmp_path)})
