"""Models in a process of their own: loaded, exchanged, lost."""

import shutil
from concurrent.futures import Future
from threading import Timer

import psutil
import pytest
import torch
from served_runs import alone, pictures, write_run

from tokendial.serve import Rules
from tokendial.serve.served import Served
from tokendial.serve.settings import Settings
from tokendial.train import Run

SETTINGS = Settings(max_batch=3, threads=1)


def at_once(work) -> Future:
    """What an engine that has nothing else to do makes of a call."""
    future = Future()
    future.set_result(work())
    return future


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "tokendial.serve.worker" in p.cmdline()]


@pytest.fixture
def serve():
    """Makes what is served, and ends it."""
    made = []

    def make(**runs: Run) -> Served:
        made.append(Served(runs, SETTINGS))
        return made[-1]

    yield make
    for served in made:
        served.close()
    assert not children()


def test_images_come_back_as_the_logits_they_have_alone(serve, pets):
    served, images = serve(pets=pets), pictures(3)
    ready = [served.facts.prepare("pets", image) for image in images]
    for degree in (4, 0):
        for some in (ready, ready[:1]):  # what an earlier batch has left does not count
            for logits, image in zip(served.run("pets", degree, some), images, strict=False):
                torch.testing.assert_close(logits, alone(pets, image, degree))
    with pytest.raises(ValueError, match="degree must be"):
        served.run("pets", 99, ready)
    with pytest.raises(RuntimeError, match="KeyError: 'dogs'"):
        served.run("dogs", 0, ready)
    torch.testing.assert_close(served.run("pets", 0, ready)[0], alone(pets, images[0], 0))


def test_every_degree_and_size_is_measured(serve, masks):
    served = serve(masks=masks)
    degrees = served.facts.degrees
    costs = served.measured(Rules(60.0, degrees, max_batch=3), degrees)
    assert set(costs.points) == {("masks", degree) for degree in degrees}
    assert all(costs.seconds(*point, 3) >= costs.seconds(*point, 1) > 0 for point in costs.points)


def test_what_cannot_be_loaded_is_told(serve, tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        serve(pets=Run(tmp_path))
    assert not children()


def test_a_process_that_is_lost_is_replaced(serve, pets, caplog):
    served = serve(pets=pets)
    (image,) = pictures(1)
    ready = served.facts.prepare("pets", image)
    (process,) = children()
    process.terminate()  # that is for the server to obey
    torch.testing.assert_close(served.run("pets", 1, [ready])[0], alone(pets, image, 1))
    process.suspend()  # with a batch
    Timer(0.2, process.kill).start()
    torch.testing.assert_close(served.run("pets", 1, [ready])[0], alone(pets, image, 1))
    assert "the process of the models ended with -9" in caplog.text
    (process,) = children()
    process.kill()  # without one
    torch.testing.assert_close(served.run("pets", 2, [ready])[0], alone(pets, image, 2))


def test_runs_that_changed_on_disk_take_the_place_of_the_old_ones(serve, pets, cars, tmp_path):
    run = Run(shutil.copytree(cars.folder, tmp_path / "cars"))
    served = serve(pets=pets, cars=run)
    (image,) = pictures(1)
    ready, before = served.facts.prepare("cars", image), served.facts.revision("cars")
    assert served.reload(at_once) == []
    write_run(tmp_path / "newer", ["bus", "car", "tram", "van"], seed=3).model().save_pretrained(
        run.best
    )
    assert served.reload(at_once) == ["cars"]
    assert served.facts.revision("cars") != before
    torch.testing.assert_close(served.run("cars", 2, [ready])[0], alone(run, image, 2))
    torch.testing.assert_close(served.run("pets", 2, [ready])[0], alone(pets, image, 2))


def test_a_run_that_became_something_else_is_not_taken(serve, pets, cars, tmp_path):
    run = Run(shutil.copytree(pets.folder, tmp_path / "pets"))
    served = serve(pets=run)
    (process,) = children()
    shutil.copytree(cars.folder, run.folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="another kind of model now: restart the server"):
        served.reload(at_once)
    (run.best / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        served.reload(at_once)
    assert children() == [process]
