"""Fits of runs: token schedules that meet budgets, searched for a run's best model and saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.atomic import atomic_write
from tokendial.data.readers.images import list_images, read_image
from tokendial.methods import from_json
from tokendial.model.dial_vit import DialViT
from tokendial.runs.device import default_device
from tokendial.runs.run import Run
from tokendial.tasks import Classification, VideoClassification
from tokendial.tune import DTYPES, FitResult, Precision, fit

FIT_FILE = "fit.json"
"""File that records the search beside a fitted model. A fit may replace folders that hold it."""


def fit_run(
    run: Run,
    out: Path,
    budgets: dict[str, list[float]],
    *,
    reduce: str | None = None,
    calibration: Path | None = None,
    images: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    precision: Precision = "fp32",
    device: str | None = None,
    minutes: float = 5.0,
    note: Callable[[str], None] = lambda text: None,
) -> FitResult:
    """Search token schedules for the best model of a run, and save the model with them.

    Args:
        run: A run of image classification.
        out: Folder for the fitted model, made if it is missing. It can be used like a run.
        budgets: One of the keys speedup, latency_ms and gmacs, with its values; see
            `tokendial.fit`.
        reduce: Name of the reduction method, "tome" or "evit". None means the run's method, or tome
            if it has none.
        calibration: Folder of images that schedules are compared on. None means the run's training
            images, without augmentation.
        images: Number of images that schedules are compared on, at most.
        seed: Seed of the random choice of images.
        batch_size: Images per batch.
        precision: Floating-point format of weights and activations.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        minutes: Time limit of the whole search.
        note: Called with a line of text when a stage of the search begins.

    Returns:
        The result of the search, as `tokendial.fit` gives it.

    Raises:
        ValueError: If the run has another task, there are no images, `out` holds other files, or
            `tokendial.fit` raises one.
    """
    task = run.task()
    if not isinstance(task, Classification) or isinstance(task, VideoClassification):
        raise ValueError(f"{run.folder} must be a run of image classification to be fitted.")
    if out.exists() and not (out / FIT_FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and holds no fit.")
    model = run.model().to(device or default_device(), DTYPES[precision])
    sample = _sample_images(run, task, model, calibration, images, seed)
    result = fit(
        model,
        sample,
        speedup=budgets.get("speedup"),
        latency_ms=budgets.get("latency_ms"),
        gmacs=budgets.get("gmacs"),
        reduce=from_json("reduce", {"name": reduce}) if reduce else None,
        multi_label=task.multi_label,
        batch_size=batch_size,
        minutes=minutes,
        note=note,
    )
    _write(run, result, out)
    return result


def _sample_images(
    run: Run, task: Classification, model: DialViT, folder: Path | None, count: int, seed: int
) -> Tensor:
    """At most `count` random images [N, 3, H, W], prepared without augmentation."""
    if count < 1:
        raise ValueError(f"images must be at least 1, got {count}.")
    transform = task.image_transform(model.anatomy)
    generator = torch.Generator().manual_seed(seed)

    def sample(total: int) -> list[int]:
        return torch.randperm(total, generator=generator)[:count].tolist()

    if folder is not None:
        if not folder.is_dir():
            raise ValueError(f"calibration: no such folder: {folder}.")
        files = list_images(folder)
        if not files:
            raise ValueError(f"calibration: {folder} holds no images.")
        value_range = run.value_range()
        images = [read_image(files[index], value_range) for index in sample(len(files))]
        return torch.stack([transform(image) for image in images])
    try:
        train: Any = run.data().train
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} Other images can be given by calibration.") from None
    return torch.stack([transform(train[index][0]) for index in sample(len(train))])


def _write(run: Run, result: FitResult, out: Path) -> None:
    """Save the fitted model, with the recipe and the classes that make its folder a run."""
    model = run.model(result.reduce)
    recipe, written = run.recipe(), Run(out)
    train = recipe.train.model_copy(update={"degree": None})
    changed = {"reduce": result.reduce, "output": str(out), "train": train}
    out.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (out / FIT_FILE, json.dumps(result.to_json(), indent=2) + "\n"),
        (written.classes_file, run.classes_file.read_text()),
        (written.recipe_file, recipe.model_copy(update=changed).to_yaml()),
    ):
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    model.save_pretrained(out)
