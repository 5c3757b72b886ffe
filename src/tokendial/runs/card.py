"""Files that document a run: the versions of its packages, and a draft of a model card."""

import json
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from tokendial.atomic import atomic_write
from tokendial.measure import Cost
from tokendial.model.dial_vit import DialViT
from tokendial.runs.degrees import spread_degrees
from tokendial.runs.run import Run
from tokendial.tasks.metric_titles import metric_title

_PACKAGES = ("tokendial", "torch", "torchvision", "timm", "accelerate")
_DEGREES = 5
"""Degrees in the cost table of the card, evenly spaced in cost."""


def write_versions(run: Run) -> None:
    """Write `versions.json`: packages, Python, machine, and the git revision of the folder."""
    versions: dict[str, Any] = {name: version(name) for name in _PACKAGES}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    versions |= {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "accelerator": accelerator.type if accelerator else None,
        "git": _git_revision(),
    }
    with atomic_write(run.versions_file) as path:
        path.write_text(json.dumps(versions, indent=2) + "\n")


def _git_revision() -> str | None:
    """Revision of the working folder, with a + if files have changed; None without git."""
    try:
        revision, status = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.strip() + ("+" if status.strip() else "")


def write_card(run: Run) -> None:
    """Write `README.md`, the draft of a model card, and `cost.json`.

    The card describes the model, its metrics, its cost along the dial, and how to load it.
    `cost.json` holds the cost at the degree that was trained. An existing card is left alone,
    because it may have been edited by hand.
    """
    if run.card_file.exists():
        return
    model = run.model()
    costs = {degree: model.cost(degree) for degree in spread_degrees(model, _DEGREES)}
    with atomic_write(run.cost_file) as path:
        path.write_text(json.dumps(asdict(costs[model.degree])) + "\n")
    with atomic_write(run.card_file) as path:
        path.write_text(_card(run, model, list(costs.values())), encoding="utf-8")


def _card(run: Run, model: DialViT, costs: list[Cost]) -> str:
    recipe = run.recipe()
    best = run.best_record()
    classes = run.classes()
    purpose, use = "to keep its embeddings when tokens are reduced", "embed"
    if classes:
        listed = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        purpose, use = f"{len(classes)}\nclasses: {listed}", "predict"
    methods = {
        "reduction": model.reduce_config,
        "fine-tuning": model.adapt_config,
        "decoder": model.decode_config,
    }
    listed_methods = "\n".join(
        f"- {kind}: `{method!r}`" for kind, method in methods.items() if method
    )
    metrics = "\n".join(
        f"| {metric_title(name.removeprefix('val_'))} | {100 * value:.2f} |"
        for name, value in best.items()
        if name.startswith("val_")
    )
    unit, files = ("a clip", "videos") if run.has_videos() else ("an image", "images")
    return f"""---
library_name: tokendial
base_model: {recipe.model.name}
---

# {run.folder.name}

`{recipe.model.name}`, fine-tuned with Tokendial on {type(recipe.data).__name__} ({purpose}).

{listed_methods}
- {costs[0].params / 1e6:.2f} M parameters, {costs[0].trainable_params / 1e6:.3f} M of them \
trained (head or decoder not counted)
- seed {recipe.seed}, {recipe.train.epochs} epochs, batches of \
{recipe.train.batch_size * recipe.train.accumulate}, learning rate {recipe.train.lr:g}

## Metrics

On the validation set, in percent, at degree {model.degree}, epoch {best["epoch"]} of \
{recipe.train.epochs}:

| metric | value |
|---|---|
{metrics}

`tokendial eval {run.folder}` measures every degree of the dial.

## Cost of {unit}

| degree | GMACs | share |
|---|---|---|
{_cost_rows(costs)}

## Use

```python
import tokendial as td

model = td.load("{run.best}")  # ready for inference, at degree {model.degree}
model.set_degree({model.degrees[-1]})  # turn the dial
```

    tokendial {use} {run.folder} {files}/

## To be written

Who should use the model and who should not; where its training {files} come from; what it gets
wrong.
"""


def _cost_rows(costs: list[Cost]) -> str:
    return "\n".join(
        f"| {cost.degree} | {cost.gmacs:.4g} | {cost.macs / costs[0].macs:.0%} |" for cost in costs
    )
