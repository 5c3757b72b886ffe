"""A run that holds a changed model of another run: fitted, or tuned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokendial.atomic import atomic_write
from tokendial.model.dial_vit import DialViT
from tokendial.runs.run import Run


def write_derived_run(
    model: DialViT,
    run: Run | None,
    out: Path,
    *,
    degree: int | None = None,
    files: Mapping[str, str],
) -> None:
    """Save a model with the recipe and the classes that make its folder a run.

    Args:
        model: The model; the recipe gets its reduction method.
        run: The run that it comes from; None: it comes from no run, so the folder is none either.
        out: The folder, made if it is missing.
        degree: The degree that the recipe is to name.
        files: Further files: their contents by name.
    """
    written = {out / name: text for name, text in files.items()}
    if run is not None:
        recipe, new = run.recipe(), Run(out)
        train = recipe.train.model_copy(update={"degree": degree})
        changed: dict[str, Any] = {"reduce": model.reduce_config, "output": str(out)}
        written[new.classes_file] = run.classes_file.read_text()
        written[new.recipe_file] = recipe.model_copy(update=changed | {"train": train}).to_yaml()
    out.mkdir(parents=True, exist_ok=True)
    for path, text in written.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text)
    model.save_pretrained(out)
