"""Models in processes of their own: loaded, exchanged, lost."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from processes import model_processes
from served_runs import alone, pictures, write_run
from serving import at_once, until

import tokendial as td
from tokendial.model.files import CONFIG
from tokendial.runs import Run
from tokendial.runtimes import Runtime
from tokendial.serve.scheduling.controller import ControllerRules
from tokendial.serve.scheduling.engine import WorkerLostError
from tokendial.serve.scheduling.requests import RequestRefusedError
from tokendial.serve.settings import Settings
from tokendial.serve.starting import measure_batch_times
from tokendial.serve.workers.served_runs import ServedRuns

# With more threads than one: what is forked has to make its own.
SETTINGS = Settings(max_batch=3, threads=2)


def processes() -> list[psutil.Process]:
    """Of models: the one that holds them, and those that compute."""
    return model_processes(os.getpid())


def computing() -> psutil.Process:
    (_, process) = processes()
    return process


def other_weights(run: Run, folder: Path, seed: int) -> None:
    model = write_run(folder / str(seed), list(run.classes()), seed=seed).model()
    model.save_pretrained(run.best)


@pytest.fixture(scope="module")
def runs(pets, cars, tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        name: Run(shutil.copytree(run.folder, folder / name))
        for name, run in (("pets", pets), ("cars", cars))
    }


@pytest.fixture(scope="module")
def served(runs):
    """Two runs, loaded once: it takes seconds."""
    served = ServedRuns(runs, SETTINGS)
    yield served
    served.close()
    assert not processes()


@pytest.fixture
def right(served, runs):
    """Whether an image gets the logits that it has alone."""
    (image,) = pictures(1)

    def check(name: str = "pets", degree: int = 1) -> None:
        (found,) = served.supervisor.run(
            name, degree, [served.supervisor.catalog.models[name].transform(image)]
        )
        torch.testing.assert_close(found, alone(runs[name], image, degree))

    return check


def test_images_come_back_as_the_logits_they_have_alone(served, runs):
    images = pictures(3)
    for name, run in runs.items():
        ready = [served.supervisor.catalog.models[name].transform(image) for image in images]
        for degree in (4, 0):
            for some in (ready, ready[:1]):  # what an earlier batch has left does not count
                for logits, image in zip(
                    served.supervisor.run(name, degree, some), images, strict=False
                ):
                    torch.testing.assert_close(logits, alone(run, image, degree))
    with pytest.raises(ValueError, match="degree must be"):
        served.supervisor.run("pets", 99, ready)
    with pytest.raises(RuntimeError, match="KeyError: 'dogs'"):
        served.supervisor.run("dogs", 0, ready)
    torch.testing.assert_close(
        served.supervisor.run("cars", 0, ready)[0], alone(runs["cars"], images[0], 0)
    )


def test_every_degree_and_size_is_measured(served):
    degrees = served.supervisor.catalog.degrees[:2]
    costs = measure_batch_times(
        served.supervisor, ControllerRules(60.0, degrees, max_batch=2), degrees
    )
    assert set(costs.points) == {(name, d) for name in ("pets", "cars") for d in degrees}
    assert all(costs.seconds(*point, 2) >= costs.seconds(*point, 1) > 0 for point in costs.points)


def test_model_processes_share_the_weights(served, right):
    right()
    holding = processes()[0]
    assert holding.num_threads() == 1  # else it could not be forked
    info = computing().memory_full_info()
    assert info.uss < info.rss / 4


def test_a_lost_process_is_replaced(served, right, caplog):
    os.kill(computing().pid, signal.SIGTERM)  # that is for the server to obey
    right()
    process = computing()
    process.kill()  # without a batch
    until(lambda: not served.supervisor.missing_s and len({*processes()} - {process}) == 2)
    right()
    process = computing()
    process.suspend()  # with one
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(right)
        until(lambda: served.supervisor._current._call)
        process.kill()
        with pytest.raises(WorkerLostError):
            asked.result()
    right()
    assert "has ended (-9)" in caplog.text


def test_a_process_that_stands_still_is_replaced(served, right):
    first = computing()
    first.suspend()  # while nobody asks
    until(lambda: len({*processes()} - {first}) == 2)
    second = computing()
    right()
    second.suspend()  # with a batch
    with pytest.raises(WorkerLostError):
        right()
    right()


def test_a_batch_that_takes_too_long_is_given_up(served, right):
    ready = served.supervisor.catalog.models["pets"].transform(pictures(1)[0])

    def ask_until_looked_at() -> None:
        while True:
            served.supervisor.run("pets", 0, [ready], limit_s=0.0)

    with pytest.raises(WorkerLostError):
        ask_until_looked_at()
    until(
        lambda: not served.supervisor.missing_s
    )  # others were lost shortly before: it may take a second
    right()


def test_runs_that_changed_on_disk_replace_the_old_ones(served, right, runs, tmp_path):
    before, old = served.supervisor.catalog.models["cars"].revision, processes()
    assert served.reload(at_once) == []
    other_weights(runs["cars"], tmp_path, seed=3)
    with ThreadPoolExecutor(8) as pool:  # of all who ask, one reads
        found = list(pool.map(lambda _: served.reload(at_once), range(8)))
    assert sorted(found) == [[]] * 7 + [["cars"]]
    assert served.supervisor.catalog.models["cars"].revision != before
    until(lambda: len(processes()) == 2 and not set(old) & set(processes()))
    right("cars", 2)
    right("pets", 2)


def test_a_run_that_became_another_kind_of_model_is_not_loaded(served, right, runs, cars, tmp_path):
    kept = shutil.copytree(runs["pets"].folder, tmp_path / "kept")
    old = set(processes())
    shutil.copytree(cars.folder, runs["pets"].folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="stages of a cascade now: restart the server"):
        served.reload(at_once)
    config = json.loads((runs["pets"].best / CONFIG).read_text())
    del config["backbone"]
    (runs["pets"].best / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{runs['pets'].folder}.*backbone") as caught:
        served.reload(at_once)
    assert "\n" not in str(caught.value)
    assert set(processes()) == old
    shutil.copytree(kept, runs["pets"].folder, dirs_exist_ok=True)
    right()


def test_models_are_loaded_again_when_their_folders_are_gone(served, runs, tmp_path, caplog):
    (image,) = pictures(1)
    wanted = alone(runs["cars"], image, 1)
    ready, revision = (
        served.supervisor.catalog.models["cars"].transform(image),
        served.supervisor.catalog.models["cars"].revision,
    )
    for run in runs.values():
        shutil.rmtree(run.folder)
    for process in processes():
        process.kill()

    def answer() -> torch.Tensor | None:
        try:
            return served.supervisor.run("cars", 1, [ready])[0]
        except (WorkerLostError, RequestRefusedError):
            return None

    found: list[torch.Tensor] = []
    until(lambda: (one := answer()) is not None and not found.append(one))
    torch.testing.assert_close(found[0], wanted)
    assert served.supervisor.catalog.models["cars"].revision == revision
    assert "the models are loaded again" in caplog.text


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_only_the_first_process_measures_which_runtime_is_the_fastest(pets, tmp_path, capfd):
    run = Run(shutil.copytree(pets.folder, tmp_path / "pets"))
    # Two degrees, because the export of each takes seconds.
    td.load(run.best, reduce=td.ToMe(r=[[4]])).save_pretrained(run.best)
    served = ServedRuns({"pets": run}, Settings(max_batch=2, threads=1, runtime=Runtime("auto")))
    supervisor, (image,) = served.supervisor, pictures(1)
    prepared = supervisor.catalog.models["pets"].transform(image)
    try:
        found = [supervisor.run("pets", 0, [prepared])]
        served.keep_spare()
        until(lambda: supervisor._spare)
        first = supervisor._current
        first.kill()
        until(lambda: supervisor._current is not first)
        found += [supervisor.run("pets", 0, [prepared])]
    finally:
        served.close()
    torch.testing.assert_close(*found)
    assert capfd.readouterr().err.count("(chosen)") == 1
