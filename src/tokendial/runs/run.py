"""Run folders: their files, who may write them, and opening the model, task and data."""

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
from tokendial.data.readers.files import resolve_paths
from tokendial.data.readers.pixels import ValueRange
from tokendial.data.splits import Splits, few_per_class, warn_of_absent_classes
from tokendial.data.transforms.clip import Clip
from tokendial.measure import Cost
from tokendial.model.dial_vit import DialViT
from tokendial.model.files import CONFIG, WEIGHTS, files_revision
from tokendial.model.loading import load
from tokendial.reduce.base import ReducerConfig
from tokendial.runs.recipe import BaseRecipe, Recipe, check_recipe, check_section
from tokendial.tasks import (
    BinaryMasks,
    Classification,
    Embeddings,
    Segmentation,
    Task,
    VideoClassification,
)
from tokendial.tasks.mask_losses import PUBLISHED

_MAY_DIFFER = ("output", "train.workers", "train.trackers")
"""Fields of a recipe that may change when a run is resumed: they do not affect the weights."""
_LOG = logging.getLogger(__name__)


class Run:
    """A run: its folder, its records, and its model, task and data.

    Example:
        >>> run = Run("runs/pets")
        >>> run.best
        PosixPath('runs/pets/best')
    """

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
        self.runtime_folder = self.folder / "runtime"
        self.cascade_file = self.folder / "cascade.json"
        self.tuned_file = self.folder / "tuned.json"
        self.best, self.last = self.folder / "best", self.folder / "last"
        if (self.folder / CONFIG).is_file():  # `tokendial fit` writes run and model into one folder
            self.best = self.folder

    def claim(
        self,
        recipe: BaseRecipe,
        classes: Sequence[str],
        *,
        multi_label: bool = False,
        dense: bool = False,
        video: bool = False,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        """Write the recipe and the classes into the folder, unless this run is there already.

        Args:
            recipe: Recipe of the run.
            classes: Names of the classes, in the order of the logits.
            multi_label: Whether an image can have several classes.
            dense: Whether the targets are masks.
            video: Whether the data are videos.
            class_weights: Weight of each class in the loss, so that the task can be built without
                the data. None weighs all classes alike.

        Raises:
            ValueError: If the folder holds another run, or files that belong to no run.
        """
        if self.has_recipe(recipe):
            return
        self._check_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.classes_file) as path:
            content: dict[str, Any] = {"classes": list(classes)}
            content |= {"multi_label": multi_label, "dense": dense, "video": video}
            content["working_folder"] = str(Path.cwd())
            if class_weights is not None:
                content["class_weights"] = list(class_weights)
            path.write_text(json.dumps(content) + "\n")
        with atomic_write(self.recipe_file) as path:
            path.write_text(recipe.to_yaml())

    @contextmanager
    def locked(self) -> Iterator[TextIO]:
        """Lock the run against writing by other processes while the block runs.

        The folder is made if it is missing. The operating system holds the lock and releases it
        when this process ends, even if it is killed; a suspended process keeps it. Processes that
        load images do not inherit it. On a disk without locks a warning is logged instead.

        Yields:
            The lock file; see `write_owner`.

        Raises:
            ValueError: If another process has the lock, or the folder holds files that belong to no
                run.
        """
        self._check_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("a", encoding="utf-8") as file:
            if _lock(file):
                self._remove_leftovers()
            yield file

    def write_owner(self, lock: TextIO) -> None:
        """Write into the lock file which process has the run, for the errors of other processes."""
        lock.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)

    def _check_free(self) -> None:
        """Raise a ValueError if the folder holds files, but no run."""
        if not self.folder.is_dir() or self.recipe_file.exists():
            return
        if not all(map(self._is_leftover, self.folder.iterdir())):
            raise ValueError(f"output: {self.folder} is not empty and holds no run.")

    def _is_leftover(self, path: Path) -> bool:
        """Whether a file was left by a process that was killed inside `claim` or `locked`."""
        name = self.classes_file.name
        left = (name, self.lock_file.name)
        return path.name in left or path.name.startswith((f".{name}.", ".recipe.yaml."))

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of processes that were killed while they wrote the run."""
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
            for leftover in leftover_files(written):
                leftover.unlink()

    def has_recipe(self, recipe: BaseRecipe) -> bool:
        """Whether the folder holds a run of this recipe. False if it holds no run yet.

        Raises:
            ValueError: If the folder holds a run of another recipe, or its data were looked up
                from another working folder.
        """
        if not self.recipe_file.exists():
            return False
        # Reading it as a recipe gives fields that were added since then their defaults.
        try:
            present = check_section(type(recipe), _parse_file(self.recipe_file, yaml.safe_load))
        except ValueError as error:
            raise ValueError(
                f"output: {self.folder} holds another run ({error}); choose another output."
            ) from None
        old, new = (dotted_fields(yaml.safe_load(some.to_yaml())) for some in (present, recipe))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and name not in _MAY_DIFFER:
                raise ValueError(
                    f"output: {self.folder} holds another run: its {name} is "
                    f"{old.get(name)}, not {new.get(name)}; choose another output."
                )
        if (started := self._working_folder()) is not None:
            theirs, ours = (resolve_paths(recipe.data, folder) for folder in (started, Path.cwd()))
            if theirs != ours and recipe.data not in (theirs, ours):
                raise ValueError(
                    f"output: {self.folder} holds another run: its data were looked up in "
                    f"{started}, not in {Path.cwd()}; choose another output."
                )
        return True

    def _working_folder(self) -> Path | None:
        """Folder that relative paths in the recipe start from. None: not recorded (old runs)."""
        if not self.classes_file.exists():
            return None
        started = json.loads(self.classes_file.read_text()).get("working_folder")
        return Path(started) if started else None

    def data(self) -> Splits:
        """Open the data set of the run.

        Relative paths start from the folder where training was started. If nothing is there, they
        start from the present working folder.

        Raises:
            ValueError: If the data set is missing, or its classes have changed since training.
        """
        recipe, started = self.recipe(), self._working_folder()
        data = recipe.data if started is None else resolve_paths(recipe.data, started)
        splits: Splits = data.build(recipe.seed)
        then, now = self.classes(), splits.classes
        if [normalize("NFC", name) for name in then] != [normalize("NFC", name) for name in now]:
            changed = set(then) ^ set(now) or {"their order"}
            raise ValueError(
                f"data: the classes are no longer those that {self.folder} was trained on "
                f"({len(then)} then, {len(now)} now; what differs: {min(changed)})."
            )
        if (count := recipe.train.images_per_class) is not None:
            splits = few_per_class(splits, count, recipe.seed)
        warn_of_absent_classes(splits)
        return splits

    @property
    def finished(self) -> bool:
        """Whether training is complete: all epochs are recorded, and the model card is written."""
        metrics = self.metrics()
        return (
            bool(metrics)
            and metrics[-1]["epoch"] == self.recipe().train.epochs
            and self.card_file.exists()
        )

    def recipe(self) -> Recipe:
        """Read the recipe of the run. Raises a ValueError if the folder holds no run."""
        self._check()
        return check_recipe(_parse_file(self.recipe_file, yaml.safe_load))

    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(_parse_file(self.classes_file, json.loads)["classes"])

    def value_range(self) -> ValueRange:
        """Pixel values that are black and white in images of more than 8 bits (`data.range`)."""
        value_range: ValueRange = getattr(self.recipe().data, "range", None)
        return value_range

    def has_videos(self) -> bool:
        """Whether the run is on videos. Raises a ValueError if the folder holds no run."""
        self._check()
        # Runs that are older than videos do not record it.
        return bool(_parse_file(self.classes_file, json.loads).get("video", False))

    def task(self) -> Task:
        """The task of the run. Raises a ValueError if the folder holds no run."""
        recipe, kind = self._recipe_with_weights(), _parse_file(self.classes_file, json.loads)
        return task_of(
            recipe,
            len(kind["classes"]),
            multi_label=kind["multi_label"],
            # Runs that are older than mask tasks do not record it.
            dense=kind.get("dense", False),
            video=self.has_videos(),
            class_weights=kind.get("class_weights"),
        )

    def _recipe_with_weights(self) -> Recipe:
        """The recipe; the weights of its backbone are looked up where training was started."""
        recipe, started = self.recipe(), self._working_folder()
        weights = recipe.model.weights
        if started is None or weights in (None, "pretrained", "shipped"):
            return recipe
        if not (started / weights).exists():
            return recipe
        section = recipe.model.model_copy(update={"weights": str(started / weights)})
        return recipe.model_copy(update={"model": section})

    def model(self, reduce: ReducerConfig | None = None) -> DialViT:
        """Load the best model of the run, ready for inference.

        Args:
            reduce: Reduction method to use in place of the one it was trained with. None keeps it.

        Raises:
            ValueError: If the folder holds no run, or no epoch is finished yet.
        """
        self._check()
        if not self.best.is_dir():
            raise ValueError(f"{self.folder} has no finished epoch yet, so there is no model.")
        return load(self.best, reduce=reduce)

    def revision(self) -> str:
        """First 12 characters of a hash of the best model's weights and configuration.

        Raises:
            ValueError: If the run has no saved model yet.
        """
        files = (self.best / CONFIG, self.best / WEIGHTS)
        if not all(path.is_file() for path in files):
            raise ValueError(f"{self.folder} has no finished epoch yet, so there is no model.")
        return files_revision(files)

    def _check(self) -> None:
        if not self.recipe_file.is_file():
            raise ValueError(f"{self.folder} is not the folder of a run: recipe.yaml is missing.")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the finished epochs: losses and scores by name."""
        if not self.metrics_file.exists():
            return []
        lines: list[dict[str, Any]] = _parse_file(
            self.metrics_file, lambda text: [json.loads(line) for line in text.splitlines()]
        )
        return lines

    def best_record(self) -> dict[str, Any]:
        """The record of the epoch whose model is in best/: highest in the main metric."""
        metrics = self.metrics()
        main = next(name for name in metrics[-1] if name.startswith("val_"))
        return max((m for m in metrics if main in m), key=lambda record: record[main])

    def cost(self) -> Cost:
        """The cost of the best model at the degree that it was trained at."""
        if not self.cost_file.exists():
            return self.model().cost()
        cost = _parse_file(self.cost_file, json.loads)
        return Cost(**cost | {"tokens_per_layer": tuple(cost["tokens_per_layer"])})

    def record(self, metrics: dict[str, Any]) -> None:
        """Add the record of an epoch. Records of this and later epochs are replaced."""
        kept = [line for line in self.metrics() if line["epoch"] < metrics["epoch"]]
        with atomic_write(self.metrics_file) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in [*kept, metrics]))


def _parse_file(path: Path, parse: Callable[[str], Any]) -> Any:
    """Read and parse a file of a run. Raises a ValueError in one line if it is damaged."""
    try:
        return parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}.") from None


def _lock(file: TextIO) -> bool:
    """Lock a file for this process. Returns False if the system or the disk has no locks.

    Raises:
        ValueError: If another process has locked the file.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        return False
    try:
        # Not flock: processes that load images would inherit it, and keep it after we are killed.
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
    recipe: Recipe,
    num_classes: int,
    *,
    multi_label: bool,
    dense: bool,
    video: bool,
    class_weights: Sequence[float] | None = None,
) -> Task:
    """The task of a recipe.

    Args:
        recipe: The recipe.
        num_classes: Number of classes in the data; 0 for images without labels.
        multi_label: Whether an image can have several classes.
        dense: Whether the targets are masks.
        video: Whether the data are videos.
        class_weights: Weight of each class in the loss. None weighs all classes alike.

    Raises:
        ValueError: If the recipe does not fit the data.
    """
    if num_classes == 0 and (dense or video):
        raise ValueError(
            f"data: {type(recipe.data).__name__} must have classes; only images can be without."
        )
    if dense != (recipe.decode is not None):
        needed, have = ("a decoder", "") if dense else ("null", "no ")
        raise ValueError(
            f"decode must be {needed} for the data {type(recipe.data).__name__}, "
            f"which have {have}masks."
        )
    if video:
        return VideoClassification(
            num_classes,
            augment=recipe.augment,
            clip=recipe.clip,
            metrics=recipe.metrics,
            class_weights=class_weights,
        )
    if recipe.clip != Clip():
        raise ValueError(f"clip is for videos, but the data {type(recipe.data).__name__} are not.")
    if num_classes == 0:
        return _embeddings_task(recipe)
    if not dense:
        return Classification(
            num_classes,
            multi_label=multi_label,
            augment=recipe.augment,
            metrics=recipe.metrics,
            class_weights=class_weights,
        )
    if num_classes == 1:
        return BinaryMasks(
            recipe.dense, recipe.mask_losses or PUBLISHED, recipe.mask_measures or "pysodmetrics"
        )
    for name in ("mask_losses", "mask_measures"):
        if getattr(recipe, name) is not None:
            raise ValueError(
                f"{name} is for masks of one class, but the data {type(recipe.data).__name__} have "
                f"{num_classes} classes."
            )
    return Segmentation(num_classes, recipe.dense)


def _embeddings_task(recipe: Recipe) -> Embeddings:
    """The task of images without labels; a ValueError about a field that has no meaning for it."""
    why = (
        f"for the data {type(recipe.data).__name__}, which have no labels: the model learns to "
        "keep its embeddings when tokens are reduced"
    )
    if recipe.reduce is None:
        raise ValueError(f"reduce must be a reduction method {why}; got null.")
    if recipe.model.weights is None:
        raise ValueError(f"model.weights must name pre-trained weights {why}; got null.")
    for name, value in (
        ("metrics", recipe.metrics),
        ("train.class_weights", recipe.train.class_weights),
        ("train.images_per_class", recipe.train.images_per_class),
        ("train.teacher", recipe.train.teacher),
    ):
        if value is not None:
            raise ValueError(f"{name} must be null {why}; got {value!r}.")
    return Embeddings(recipe.model.backbone(0), recipe.augment)


def dotted_fields(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted names: {"a": {"b": 1}} gives {"a.b": 1}."""
    dotted: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            dotted |= dotted_fields(value, f"{prefix}{name}.")
        else:
            dotted[prefix + name] = value
    return dotted
