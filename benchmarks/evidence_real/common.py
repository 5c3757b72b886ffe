"""What the tables share: options, trainings that resume, results that are computed once."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from tokendial.atomic import atomic_write
from tokendial.backbones import Backbone
from tokendial.runs import Run, read_recipe
from tokendial.runs.recipe import CompensateRecipe, Recipe

Item = TypeVar("Item")
Result = TypeVar("Result")
BACKBONE = "vit_small_patch14_dinov2"
SEEDS = (0, 1)
"""Seeds of the trainings of tables that have many of them."""
THREE_SEEDS = (0, 1, 2)
"""Seeds of the trainings of the other tables."""


@dataclass(frozen=True)
class Options:
    """Where data lie and results go."""

    out: Path = Path("runs/evidence_real")
    """Folder for runs and results; the same folder continues an interrupted command."""
    jobs: int = 2
    """Processes at the same time, each with one thread."""
    weights: Path = Path("weights/dinov2_small.safetensors")
    """Weights of DINOv2-S, from `tokendial weights fetch dinov2_small`."""
    onnx: Path = Path("weights/vit_s_focus.onnx")
    """The file that these weights come from. It holds a saliency decoder, too."""
    elpv: str = ""
    """Folder of ELPV; empty for the installed package."""
    cutouts: Path = Path("cutouts/saliency")
    """Folder that tools/build_cutouts.py built."""
    pictures: Path = Path("real_pictures")
    """Folder that tools/build_real_pictures.py built."""

    @classmethod
    def parse(cls, command: str, doc: str, arguments: Sequence[str]) -> "Options":
        """Read the options from a command line."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks evidence_real {command}", description=doc
        )
        for field in fields(cls):
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default)
        return cls(**vars(parser.parse_args(list(arguments))))


def train(
    name: str, recipe: str, settings: Mapping[str, Any], options: Options, command: str = "train"
) -> Path:
    """Run `tokendial train` (or `compensate`) with one thread, unless that is done.

    An interrupted run is resumed.

    Args:
        name: Name of the run: its folder below `options.out / "runs"`.
        recipe: Name of the recipe.
        settings: Fields of the recipe to change, by dotted name.
        options: The options.
        command: The command.

    Returns:
        The folder of the run.

    Raises:
        ValueError: If the folder holds a run of other settings, or the command fails.
    """
    folder = options.out / "runs" / name
    done = folder / "finished"
    written = settings | {"output": str(folder), "train.trackers": []}
    fields = [f"{key}={json.dumps(value)}" for key, value in written.items()]
    kind = {"train": Recipe, "compensate": CompensateRecipe}[command]
    if not (Run(folder).has_recipe(read_recipe(recipe, fields, kind=kind)) and done.exists()):
        run_tokendial(command, recipe, *fields)
        done.touch()
        print(name, flush=True)
    return folder


def frozen_backbone(img_size: int, options: Options) -> VisionTransformer:
    """The pre-trained model without a head, in evaluation mode."""
    args = {"img_size": img_size, "num_classes": 0}
    weights = str(options.weights.resolve())
    return Backbone(name=BACKBONE, weights=weights, args=args).create().eval()


def run_tokendial(*words: str) -> None:
    """Run a command of Tokendial with one thread. A ValueError has its error if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tokendial.cli", *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"{' '.join(words)}: {ended.stderr.strip() or ended.stdout.strip()}")


def cached(path: Path, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the values in a file, which is computed and written first if it is missing.

    Args:
        path: A .json file (numbers and text), or a .npz file (arrays).
        compute: Makes the values by name.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = compute()
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            if path.suffix == ".npz":
                np.savez_compressed(file, **found)
            else:
                file.write(json.dumps(dict(found)).encode())
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    return dict(json.loads(path.read_text()))


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], options: Options
) -> list[Result]:
    """Results in order, `options.jobs` at a time; for functions that start processes (`train`)."""
    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(function, items))


def in_processes(
    function: Callable[[Item], Result], items: Iterable[Item], options: Options
) -> list[Result]:
    """Results in order, in `options.jobs` processes of one thread each; for functions of torch."""
    with ProcessPoolExecutor(
        options.jobs, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(function, items))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
