"""Fits of runs and other models: token schedules that meet budgets, searched and saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendial.data.readers.images import list_images, read_image
from tokendial.data.readers.video import VideoFile, list_videos
from tokendial.methods import from_json
from tokendial.model.dial_vit import DialViT
from tokendial.reduce.presets import all_presets, preset
from tokendial.reduce.schedules import ScheduledConfig
from tokendial.runs.derived_run import write_derived_run
from tokendial.runs.device import default_device
from tokendial.runs.model_source import ModelSource, OpenedModel
from tokendial.runs.run import Run
from tokendial.runs.training_images import fixed_size_transform, training_images
from tokendial.runtimes import Runtime
from tokendial.runtimes.config import PLAIN
from tokendial.tasks import Classification
from tokendial.tune import DTYPES, AgreeBy, FitResult, fit
from tokendial.tune.fit_arguments import method_to_fit

FIT_FILE = "fit.json"
"""File that records the search beside a fitted model. A fit may replace folders that hold it."""


def fit_run(
    source: Run | ModelSource,
    out: Path,
    budgets: dict[str, list[float]],
    *,
    reduce: str | None = None,
    start_from: str | None = None,
    agree_by: AgreeBy | None = None,
    calibration: Path | None = None,
    images: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    runtime: Runtime = PLAIN,
    device: str | None = None,
    minutes: float = 5.0,
    note: Callable[[str], None] = lambda text: None,
) -> FitResult:
    """Search token schedules for a model, and save the model with them.

    Args:
        source: A run, whose best model is fitted, or another model of images.
        out: Folder for the fitted model, made if it is missing. That of a run can be used like a
            run, any other is a saved model.
        budgets: One of the keys speedup, latency_ms and gmacs, with its values; see
            `tokendial.fit`.
        reduce: Name of the reduction method, such as "tome" or "evit". None means the model's
            method, or tome if it has none.
        start_from: Where the search finds schedules to start from: a folder that holds a fit, or a
            backbone with a preset, see `tokendial.preset`. None means those of the model's method
            if it lists any.
        agree_by: What schedules are compared by: "logits", "embeddings", "neighbours",
            "feature_map" or "masks"; see `tokendial.fit`. None means what fits the model.
        calibration: Folder of images, or of videos for a run on them, that schedules are compared
            on. None means the run's training images, without augmentation. A model of no run needs
            a folder.
        images: Number of images that schedules are compared on, at most. Of a video, it is the
            middle clip.
        seed: Seed of the random choice of images.
        batch_size: Images per batch.
        runtime: Where and how the model computes when it is timed. In PyTorch the model is fitted
            in the runtime's precision, without `optimize`.
        device: Device to compute on in PyTorch. None means the accelerator if there is one, else
            the CPU.
        minutes: Time limit of the whole search.
        note: Called with a line of text when a stage of the search begins.

    Returns:
        The result of the search, as `tokendial.fit` gives it.

    Raises:
        ValueError: If there are no images, one cannot be read, `out` holds other files, or
            `tokendial.fit` raises one.
    """
    if isinstance(source, Run):
        source = ModelSource(name=str(source.folder))
    if out.exists() and not (out / FIT_FILE).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and holds no fit.")
    in_torch = runtime.name == "torch"
    if runtime.optimize or runtime.compile:
        raise ValueError("a fit runs the plain model in torch, not an optimised or compiled one.")
    opened = source.open(videos=True)
    task = opened.run.task() if opened.run else None
    sample = _sample_images(opened, calibration, images, seed)
    result = fit(
        opened.model.to(
            device or default_device(), DTYPES[runtime.precision] if in_torch else torch.float32
        ),
        sample,
        speedup=budgets.get("speedup"),
        latency_ms=budgets.get("latency_ms"),
        gmacs=budgets.get("gmacs"),
        reduce=_method(opened.model, reduce, start_from),
        agree_by=agree_by,
        multi_label=isinstance(task, Classification) and task.multi_label,
        batch_size=batch_size,
        minutes=minutes,
        runtime=None if in_torch else runtime,
        note=note,
    )
    fitted = source.open(result.reduce, videos=True).model
    record = result.to_json() | {"runtime": runtime.name, "precision": runtime.precision}
    text = json.dumps(record, indent=2) + "\n"
    write_derived_run(fitted, opened.run, out, files={FIT_FILE: text})
    return result


def _method(model: DialViT, name: str | None, start_from: str | None) -> ScheduledConfig | None:
    """The method to find schedules for, with those that the search is to start from."""
    named = from_json("reduce", {"name": name}) if name else None
    if start_from is None:
        return named
    fitted = Path(start_from) / FIT_FILE
    if fitted.is_file():
        try:
            start = from_json("reduce", json.loads(fitted.read_text())["reduce"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"start_from: {fitted} holds no fit: {error}.") from None
    elif start_from.partition(".")[0] in all_presets():
        start = preset(start_from)
    else:
        raise ValueError(
            f"start_from must be a folder that holds a fit, or a backbone with a preset "
            f"({', '.join(all_presets())}), got {start_from}."
        )
    method = method_to_fit(model, named or (None if model.reduce_config else start))
    return method.with_schedules(start.r)


def _sample_images(opened: OpenedModel, folder: Path | None, count: int, seed: int) -> Tensor:
    """At most `count` random images [N, 3, H, W], or clips, prepared without augmentation."""
    if count < 1:
        raise ValueError(f"images must be at least 1, got {count}.")
    model, run = opened.model, opened.run
    if folder is None:
        if run is None:
            raise ValueError("calibration must be a folder of images: the model is of no run.")
        try:
            return training_images(run, model, count=count, seed=seed)
        except (ValueError, OSError) as error:
            raise ValueError(f"{error} Other images can be given by calibration.") from None
    if not folder.is_dir():
        raise ValueError(f"calibration: no such folder: {folder}.")
    takes_videos = model.anatomy.frames is not None
    files = list_videos(folder) if takes_videos else list_images(folder)
    if not files:
        kind = "videos" if takes_videos else "images"
        raise ValueError(f"calibration: {folder} holds no {kind}.")
    prepare = fixed_size_transform(run.task(), model) if run else opened.transform
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(files), generator=generator)[:count].tolist()

    def read(file: Path) -> Any:
        return VideoFile(file) if takes_videos else read_image(file, opened.value_range)

    return torch.stack([prepare(read(files[index])) for index in chosen])
