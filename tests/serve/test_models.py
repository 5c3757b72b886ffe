"""Runs in memory: what they answer is what they answer alone."""

import shutil
from concurrent.futures import Future
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from served_runs import write_run

import tokendial as td
from tokendial.serve import Rules
from tokendial.serve.models import Classes, Mask, load_served
from tokendial.speed import Speed
from tokendial.train import Run


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)
    ]


def at_once(work) -> Future:
    """What an engine that has nothing else to do makes of a call."""
    future = Future()
    future.set_result(work())
    return future


@torch.no_grad()
def alone(run: Run, image: Image.Image, degree: int) -> torch.Tensor:
    model = run.model()
    model.set_degree(degree)
    return model(run.task().image_transform(model.anatomy)(image).unsqueeze(0))[0]


def test_runs_share_a_backbone_and_answer_as_they_do_alone(pets, cars):
    served = load_served({"pets": pets, "cars": cars})
    assert served.names == ("pets", "cars")
    assert served.degrees == pets.model().degrees
    images = pictures(3)
    for name, run in (("cars", cars), ("pets", pets), ("cars", cars)):
        for degree in (4, 0, 2):
            logits = served.run(name, degree, [served.prepare(name, image) for image in images])
            for own, image in zip(logits, images, strict=True):
                torch.testing.assert_close(own, alone(run, image, degree))
    own = sum(p.numel() for p in pets.model().vit.patch_embed.parameters())
    kept = sum(p.numel() for p in served.model.vit.patch_embed.parameters())
    assert own == kept


def test_classes_are_named_most_probable_first(pets):
    served = load_served({"pets": pets})
    (image,) = pictures(1)
    answer = served.answer("pets", alone(pets, image, 2), (40, 50), top=9)
    assert isinstance(answer, Classes)
    assert sorted(answer.names) == ["cat", "dog", "hamster"]
    assert sorted(answer.probabilities, reverse=True) == list(answer.probabilities)
    assert sum(answer.probabilities) == pytest.approx(1)
    assert len(served.answer("pets", alone(pets, image, 2), (40, 50), top=1).names) == 1


def test_a_mask_has_the_size_of_the_image(masks):
    served = load_served({"masks": masks})
    (image,) = pictures(1)
    (logits,) = served.run("masks", 4, [served.prepare("masks", image)])
    answer = served.answer("masks", logits, (40, 50))
    assert isinstance(answer, Mask)
    mask = np.asarray(Image.open(BytesIO(answer.png)))
    assert mask.shape == (40, 50)
    assert answer.share == (mask > 127).mean()
    assert served.kind("masks") == "masks"


def test_an_optimised_copy_answers_the_same(pets):
    served = load_served({"pets": pets}, speed=Speed.measured, batch=2)
    (image,) = pictures(1)
    for degree in (0, 4):
        (logits,) = served.run("pets", degree, [served.prepare("pets", image)])
        torch.testing.assert_close(logits, alone(pets, image, degree), rtol=1e-4, atol=1e-4)


def test_a_compensator_turns_with_the_dial(pets, tmp_path):
    model = pets.model()
    plugin = td.Compensator.for_model(pets.model(), td.ToCom(rank=2), steps=4)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    plugin.save_pretrained(tmp_path)
    served = load_served({"pets": pets}, compensator=tmp_path)
    assert served.degrees == (0, 1, 2, 3, 4)  # as far as it reaches
    plugin.eval().attach(model, source=2)
    (image,) = pictures(1)
    for degree in (0, 2, 4):
        model.set_degree(degree)
        ready = served.prepare("pets", image)
        with torch.no_grad():
            expected = model(ready.unsqueeze(0))[0]
        torch.testing.assert_close(served.run("pets", degree, [ready])[0], expected)


def test_every_degree_and_size_is_measured(pets, cars):
    served = load_served({"pets": pets, "cars": cars})
    costs = served.measured(Rules(60.0, served.degrees, max_batch=3), served.degrees)
    assert set(costs.points) == {(name, d) for name in ("pets", "cars") for d in served.degrees}
    assert all(costs.seconds(*point, 3) >= costs.seconds(*point, 1) > 0 for point in costs.points)


def test_the_ladder_ends_at_the_floor_of_accuracy(pets, tmp_path):
    run = Run(shutil.copytree(pets.folder, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"min_accuracy needs the accuracy of pets at degree 0"):
        load_served({"pets": run}).ladder(None, 0.5)
    table = run.folder / "eval" / "degrees.csv"
    table.parent.mkdir()
    rows = [f"{degree},{0.9 - 0.1 * degree:.1f},1.0,9.0,5,\n" for degree in range(9)]
    table.write_text("degree,accuracy,gmacs,images_per_s,tokens,share\n" + "".join(rows))
    served = load_served({"pets": run})
    assert served.accuracy("pets", 1) == pytest.approx(0.8)
    assert served.ladder(None, 0.65) == (0, 1, 2)
    assert served.ladder(1, 0.65) == (0, 1)
    assert served.ladder(None, None) == served.degrees
    with pytest.raises(ValueError, match="no degree reaches 0.95"):
        served.ladder(None, 0.95)
    with pytest.raises(ValueError, match=r"max_degree must lie in \[0, \d\], got 99"):
        served.ladder(99, None)


def test_runs_that_changed_on_disk_take_the_place_of_the_old_ones(pets, cars, tmp_path):
    run = Run(shutil.copytree(cars.folder, tmp_path / "cars"))
    served = load_served({"pets": pets, "cars": run})
    (image,) = pictures(1)
    ready, before = served.prepare("cars", image), served.revision("cars")
    assert served.reload(at_once) == []
    write_run(tmp_path / "newer", ["bus", "car", "tram", "van"], seed=3).model().save_pretrained(
        run.best
    )
    assert served.reload(at_once) == ["cars"]
    assert served.revision("cars") != before
    torch.testing.assert_close(served.run("cars", 2, [ready])[0], alone(run, image, 2))
    torch.testing.assert_close(served.run("pets", 2, [ready])[0], alone(pets, image, 2))


def test_a_run_that_became_something_else_is_not_taken(pets, cars, tmp_path):
    run = Run(shutil.copytree(pets.folder, tmp_path / "pets"))
    served = load_served({"pets": run})
    before = served.model
    shutil.copytree(cars.folder, run.folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="another kind of model now: restart the server"):
        served.reload(at_once)
    (run.best / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        served.reload(at_once)
    assert served.model is before


def test_runs_that_cannot_be_served_together_are_named(pets, masks, tmp_path):
    with pytest.raises(ValueError, match="runs must name at least one"):
        load_served({})
    with pytest.raises(ValueError, match="are for one run"):
        load_served({"a": pets, "b": pets}, speed=Speed.measured)
    with pytest.raises(ValueError, match="num_classes|decoder|backbone"):
        load_served({"pets": pets, "masks": masks})
    with pytest.raises(ValueError, match="is not the folder of a run"):
        load_served({"pets": Run(tmp_path)})
