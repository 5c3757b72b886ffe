"""Trackers, the time that training waits for images, and memory over many epochs."""

import json
from pathlib import Path

import psutil
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from tokendial.runs import read_recipe
from tokendial.train import train
from tokendial.train.batches import TimedBatches
from tokendial.train.fine_tuning import FineTuning


class LinesTracker(GeneralTracker):
    """A tracker like those of packages. Each call writes a line to a file."""

    name = "lines"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: Path) -> None:
        super().__init__()
        self.file = Path(logging_dir) / f"{run_name}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    @property
    def tracker(self) -> Path:
        return self.file

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.log(values)

    def log(self, values: dict[str, object], step: int | None = None) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps([step, values]) + "\n")


def test_any_tracker_gets_the_recipe_and_the_metrics(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "lines", LinesTracker)
    both = "train.trackers=[lines, tensorboard]"
    recipe = read_recipe(recipe_file, [f"output={tmp_path / 'run'}", "train.epochs=1", both])
    run = train(recipe, quiet=True)
    assert list((run.folder / "logs").rglob("events*"))
    lines = (run.folder / "logs" / "tokendial.jsonl").read_text().splitlines()
    (_, told), *logged = map(json.loads, lines)
    assert told["train.lr"] == 0.003
    assert told["reduce.name"] == "tome"
    (record,) = run.metrics()
    del record["epoch"]
    assert logged[-1] == [12, record]


def test_a_run_without_trackers_has_no_logs(recipe_file, tmp_path):
    settings = [f"output={tmp_path / 'run'}", "train.epochs=1", "train.trackers=[]"]
    assert not (train(read_recipe(recipe_file, settings), quiet=True).folder / "logs").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights", r"train.trackers: must be some of aim, .*tensorboard, .*got 'weights'"),
        ("clearml", r"train.trackers: clearml needs `pip install clearml`"),
    ],
)
def test_an_unknown_or_missing_tracker_is_named(recipe_file, tmp_path, name, message):
    settings = [f"output={tmp_path / 'run'}", f"train.trackers=[{name}]"]
    with pytest.raises(ValueError, match=message):
        train(read_recipe(recipe_file, settings), quiet=True)


def test_the_wait_fraction_counts_the_time_in_the_loader(monkeypatch):
    clock = iter([0, 2, 2, 3, 10])  # two seconds to start, one for the batch, ten in all
    monkeypatch.setattr("tokendial.train.batches.time.perf_counter", lambda: next(clock))
    batches = TimedBatches(["batch"])
    assert next(batches) == "batch"
    assert batches.wait_fraction == 0.3


def test_waiting_for_images_is_reported_once_per_epoch_with_the_remedy(
    recipe_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(TimedBatches, "wait_fraction", 0.34)
    recipe = read_recipe(recipe_file, [f"output={tmp_path / 'run'}", "train.epochs=1"])
    run = train(recipe)
    said = "training waited for images 34% of this epoch: raise train.workers (0)"
    assert said in capsys.readouterr().out
    assert run.metrics()[0]["data_wait"] == 0.34


def test_memory_does_not_grow_from_epoch_to_epoch(recipe_file, tmp_path, monkeypatch):
    held: list[int] = []
    before_update = FineTuning.before_update

    def note_memory(job, update, updates_per_epoch):
        if update % updates_per_epoch == 0:
            held.append(psutil.Process().memory_info().rss)
        before_update(job, update, updates_per_epoch)

    monkeypatch.setattr(FineTuning, "before_update", note_memory)
    train(read_recipe(recipe_file, [f"output={tmp_path / 'run'}"]), quiet=True)
    assert len(held) == 8
    # A leak of the images of one epoch, 240 times 12 KiB, would add 17 MiB.
    assert held[-1] - held[2] < 12 * 2**20
