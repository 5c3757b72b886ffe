"""The folder of a run: what lies where, and that no two runs or processes share one."""

import errno
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from unicodedata import normalize

import yaml

from tokendial.atomic import atomic_write, leftover_files
from tokendial.data.readers.files import found_from
from tokendial.data.readers.pixels import ValueRange
from tokendial.data.splits import Splits, warn_of_absent_classes
from tokendial.data.transforms.clip import Clip
from tokendial.measure import Cost
from tokendial.model.dial_vit import DialViT
from tokendial.model.files import CONFIG, WEIGHTS
from tokendial.model.loading import load
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.recipe import BaseRecipe, Recipe, check_recipe, check_section
from tokendial.tasks import BinaryMasks, Classification, Segmentation, Task, VideoClassification

_FREE = ("output", "train.workers", "train.trackers")
"""Fields of a recipe that may change while a run goes on: they do not change what is learnt."""
_LOG = logging.getLogger(__name__)


class Run:
    """Paths and records of a run folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.recipe_file = self.folder / "recipe.yaml"
        self.classes_file = self.folder / "classes.json"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.card_file = self.folder / "README.md"
        self.cost_file = self.folder / "cost.json"
        self.versions_file = self.folder / "versions.json"
        self.lock_file = self.folder / ".lock"
        self.checkpoints = self.folder / "checkpoints"
        self.best, self.last = self.folder / "best", self.folder / "last"
        if (self.folder / CONFIG).is_file():  # what a fit writes is a saved model itself
            self.best = self.folder

    def claim(
        self,
        recipe: BaseRecipe,
        classes: Sequence[str],
        *,
        multi_label: bool = False,
        dense: bool = False,
        video: bool = False,
    ) -> None:
        """Make the folder this recipe's, or find that it is already.

        Args:
            recipe: Of the run.
            classes: Names of the classes, in the order of the logits.
            multi_label: Whether any number of them can be right at once.
            dense: Whether the run learns masks.
            video: Whether it learns from videos.

        Raises:
            ValueError: If another run is in it, or files that are not a run's.
        """
        if self.holds(recipe):
            return
        self._check_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.classes_file) as path:
            kind = {"multi_label": multi_label, "dense": dense, "video": video}
            told = {"classes": list(classes)} | kind | {"working_folder": str(Path.cwd())}
            path.write_text(json.dumps(told) + "\n")
        with atomic_write(self.recipe_file) as path:
            path.write_text(recipe.to_yaml())

    @contextmanager
    def alone(self) -> Iterator[TextIO]:
        """Keep other processes from writing this run while the block runs; make the folder.

        The operating system holds the lock, and lets go of it when this process dies, however it
        dies; processes that load images do not inherit it. One that is suspended keeps it. On a
        disk that takes no locks a warning is logged instead.

        Yields:
            The locked file. What is written into it tells others whose the run is.

        Raises:
            ValueError: If another process has the run, or the folder holds files that are not a
                run's.
        """
        self._check_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("a", encoding="utf-8") as file:
            if _lock(file):
                self._remove_leftovers()
            yield file

    def sign(self, lock: TextIO) -> None:
        """Say in the locked file which process has the run."""
        lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)

    def _check_free(self) -> None:
        """See that the folder holds a run, or nothing of value."""
        if not self.folder.is_dir() or self.recipe_file.exists():
            return
        if any(map(self._precious, self.folder.iterdir())):
            raise ValueError(f"output: {self.folder} is not empty and holds no run.")

    def _precious(self, path: Path) -> bool:
        """Whether a file is more than what a process left that was killed while it claimed."""
        name = self.classes_file.name
        mine = (name, self.lock_file.name)
        return path.name not in mine and not path.name.startswith((f".{name}.", ".recipe.yaml."))

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed while they had the run."""
        models = [folder / name for folder in (self.best, self.last) for name in (CONFIG, WEIGHTS)]
        for written in (
            self.recipe_file,
            self.classes_file,
            self.metrics_file,
            self.card_file,
            self.cost_file,
            self.versions_file,
            self.checkpoints / "update-*.pt",
            *models,
        ):
            for left in leftover_files(written):
                left.unlink()

    def holds(self, recipe: BaseRecipe) -> bool:
        """Whether the folder is already this recipe's.

        Raises:
            ValueError: If another run is in it.
        """
        if not self.recipe_file.exists():
            return False
        # Read as a recipe, so that fields that are younger than the run have their defaults.
        try:
            there = check_section(type(recipe), _parsed(self.recipe_file, yaml.safe_load))
        except ValueError as error:
            raise ValueError(
                f"output: {self.folder} holds another run ({error}); choose another output."
            ) from None
        old, new = (flat(yaml.safe_load(some.to_yaml())) for some in (there, recipe))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and name not in _FREE:
                raise ValueError(
                    f"output: {self.folder} holds another run: its {name} is "
                    f"{old.get(name)}, not {new.get(name)}; choose another output."
                )
        if (started := self._working_folder()) is not None:
            theirs, ours = (found_from(recipe.data, folder) for folder in (started, Path.cwd()))
            if theirs != ours and recipe.data not in (theirs, ours):
                raise ValueError(
                    f"output: {self.folder} holds another run: its data were looked up in "
                    f"{started}, not in {Path.cwd()}; choose another output."
                )
        return True

    def _working_folder(self) -> Path | None:
        """Where relative paths of the recipe start from; None: older runs do not say it."""
        if not self.classes_file.exists():
            return None
        started = json.loads(self.classes_file.read_text()).get("working_folder")
        return Path(started) if started else None

    def data(self) -> Splits:
        """The data set of the run; a ValueError if it is not there, or has other classes by now.

        Relative paths start from the folder in which the training was started; from the present
        one where nothing is there.
        """
        recipe, started = self.recipe(), self._working_folder()
        data = recipe.data if started is None else found_from(recipe.data, started)
        splits: Splits = data.build(recipe.seed)
        then, now = self.classes(), splits.classes
        if [normalize("NFC", name) for name in then] != [normalize("NFC", name) for name in now]:
            changed = set(then) ^ set(now) or {"their order"}
            raise ValueError(
                f"data: the classes are no longer those that {self.folder} was trained on "
                f"({len(then)} then, {len(now)} now; what differs: {min(changed)})."
            )
        warn_of_absent_classes(splits)
        return splits

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: every epoch is recorded, and the card, written last."""
        metrics = self.metrics()
        return (
            bool(metrics)
            and metrics[-1]["epoch"] == self.recipe().train.epochs
            and self.card_file.exists()
        )

    def recipe(self) -> Recipe:
        """The recipe of the run; a ValueError if the folder holds none."""
        self._check()
        return check_recipe(_parsed(self.recipe_file, yaml.safe_load))

    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits."""
        return tuple(_parsed(self.classes_file, json.loads)["classes"])

    def value_range(self) -> ValueRange:
        """What is black and white in images of more than 8 bits, as its data set says."""
        found: ValueRange = getattr(self.recipe().data, "range", None)
        return found

    def on_videos(self) -> bool:
        """Whether it learns from videos; a ValueError if the folder holds no run."""
        self._check()
        # Runs from before there were videos do not say it.
        return bool(_parsed(self.classes_file, json.loads).get("video", False))

    def task(self) -> Task:
        """What the run learns; a ValueError if the folder holds none."""
        recipe, told = self.recipe(), _parsed(self.classes_file, json.loads)
        return task_of(
            recipe,
            len(told["classes"]),
            multi_label=told["multi_label"],
            # Runs from before there were dense tasks do not say it.
            dense=told.get("dense", False),
            video=self.on_videos(),
        )

    def model(self, reduce: ReducerConfig | None = None) -> DialViT:
        """The best model of the run, ready for inference.

        Args:
            reduce: Another reduction method than it was trained with; None: its own.
        """
        self._check()
        if not self.best.is_dir():
            raise ValueError(f"{self.folder} has no finished epoch yet, so there is no model.")
        return load(self.best, reduce=reduce)

    def _check(self) -> None:
        if not self.recipe_file.is_file():
            raise ValueError(f"{self.folder} is not the folder of a run: recipe.yaml is missing.")

    def metrics(self) -> list[dict[str, Any]]:
        """One record per finished epoch."""
        if not self.metrics_file.exists():
            return []
        lines: list[dict[str, Any]] = _parsed(
            self.metrics_file, lambda text: [json.loads(line) for line in text.splitlines()]
        )
        return lines

    def best_record(self) -> dict[str, Any]:
        """The record of the epoch whose model is in best/."""
        metrics = self.metrics()
        judged = next(name for name in metrics[-1] if name.startswith("val_"))
        return max((m for m in metrics if judged in m), key=lambda record: record[judged])

    def cost(self) -> Cost:
        """What the best model costs at the degree that it was trained at."""
        if not self.cost_file.exists():
            return self.model().cost()
        cost = _parsed(self.cost_file, json.loads)
        return Cost(**cost | {"tokens_per_layer": tuple(cost["tokens_per_layer"])})

    def record(self, metrics: dict[str, Any]) -> None:
        """Add the record of an epoch, in place of what may stand from this epoch on."""
        kept = [line for line in self.metrics() if line["epoch"] < metrics["epoch"]]
        with atomic_write(self.metrics_file) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, metrics]))


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    """What a file of a run holds; a ValueError in one line if it is damaged."""
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}.") from None


def _lock(file: TextIO) -> bool:
    """Lock a file for this process; False where that is not possible.

    Raises:
        ValueError: If another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return False
    try:
        # Not flock: a process that loads images would keep that one when its parent is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        folder = Path(file.name).parent
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            _LOG.warning(
                "%s takes no locks (%s): see that no other process trains this run", folder, error
            )
            return False
        owner = Path(file.name).read_text(encoding="utf-8").strip() or "another process"
        raise ValueError(
            f"output: {folder} is in use by {owner}, which may be suspended; end it first."
        ) from None
    return True


def task_of(
    recipe: Recipe, num_classes: int, *, multi_label: bool, dense: bool, video: bool
) -> Task:
    """The task of a recipe on data of that kind.

    Raises:
        ValueError: If the recipe does not fit the data.
    """
    if dense != (recipe.decode is not None):
        needed, have = ("a decoder", "") if dense else ("null", "no ")
        raise ValueError(
            f"decode must be {needed} for the data {type(recipe.data).__name__}, "
            f"which have {have}masks."
        )
    if video:
        return VideoClassification(num_classes, augment=recipe.augment, clip=recipe.clip)
    if recipe.clip != Clip():
        raise ValueError(f"clip is for videos, but the data {type(recipe.data).__name__} are not.")
    if not dense:
        return Classification(num_classes, multi_label=multi_label, augment=recipe.augment)
    if num_classes == 1:
        return BinaryMasks(recipe.dense)
    return Segmentation(num_classes, recipe.dense)


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
