"""Recipes as files: found by name, built on each other by `base`, changed by overrides."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

from tokendial.runs.recipe import KINDS, BaseRecipe, CompensateRecipe, Recipe, check_section

RecipeT = TypeVar("RecipeT", bound=BaseRecipe)


@overload
def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...


@overload
def read_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type[RecipeT]
) -> RecipeT: ...


def read_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type[BaseRecipe] = Recipe
) -> BaseRecipe:
    """Read a recipe and apply overrides such as `train.epochs=10`.

    Args:
        path: YAML file, or the name of a recipe that is shipped, such as demo or dar/duts. Without
            `output` in it, the run goes to runs/NAME. With `base: OTHER` it holds only what
            differs from another one, which lies beside it or is shipped.
        overrides: `dotted.field=value`, the value written as in YAML.
        kind: What the recipe is for: `Recipe` or `CompensateRecipe`.

    Raises:
        ValueError: In one line: which field, its value, and what is allowed.
    """
    path, name = find_recipe(path)
    data = _resolved(path)
    for field, command, of in (
        ("compensate", "compensate", Recipe),
        ("adapt", "train", CompensateRecipe),
    ):
        if kind is of and field in data:
            raise ValueError(f"recipe {path.name} is one for `tokendial {command}`.")
    apply_overrides(data, overrides)
    data.setdefault("output", f"runs/{name}")
    return check_section(kind, data)


def shipped_recipes() -> dict[str, Path]:
    """Files of the recipes that are shipped, by name, such as dar/duts."""
    # They lie beside the sources in a checkout, and inside the package when it is installed.
    here = Path(__file__).parent.parent
    for folder in (here / "recipes", here.parent.parent / "recipes"):
        if files := sorted(folder.rglob("*.yaml")):
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def recipes_in(folder: str) -> dict[str, Path]:
    """Files of the shipped recipes below a folder, such as baselines or baselines/vtab."""
    start = f"{folder.rstrip('/')}/"
    return {name: file for name, file in shipped_recipes().items() if name.startswith(start)}


def contents() -> dict[str, str]:
    """What is shipped, in a sentence each: recipes outside of folders, and the folders."""
    recipes, folders = {}, {}
    for name, file in shipped_recipes().items():
        folder, *inner = name.split("/")
        if inner:
            folders[f"{folder}/"] = summary(file.parents[len(inner) - 1] / "README.md")
        else:
            recipes[name] = summary(file)
    return recipes | folders


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipe files, for editors; of fine-tuning and of compensators."""
    kinds = [kind.model_json_schema() for kind in (Recipe, CompensateRecipe)]
    base = {"type": "string", "description": "Recipe that this one changes."}
    for schema in kinds:
        schema["properties"]["base"] = base
    definitions = {name: part for schema in kinds for name, part in schema.pop("$defs").items()}
    for part in (*kinds, *definitions.values()):
        # A file may leave to its base, or to the command line, what a recipe needs.
        part.pop("required", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of Tokendial",
        "anyOf": kinds,
        "$defs": definitions,
    }


def describe(path: Path) -> str:
    """What the comment at the top of a recipe says, or the title of a page about a folder."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def summary(path: Path) -> str:
    """The first sentence of that."""
    return describe(path).replace("\n", " ").partition(". ")[0].rstrip(".")


def resolved_recipe(name: str | Path) -> dict[str, Any]:
    """The fields of a recipe as they are written, those of its bases included."""
    return _resolved(find_recipe(name)[0])


def _resolved(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a file, on top of those of its base."""
    path = path.resolve()
    if path in above:
        raise ValueError(f"recipe {path}: base leads back to itself.")
    data = _read(path)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"recipe {path}: base must be the name of a recipe, got {base!r}.")
    beside = path.parent / base
    found = next((f for f in (beside, beside.with_suffix(".yaml")) if f.is_file()), None)
    try:
        found = found or find_recipe(base)[0]
    except ValueError:
        raise ValueError(f"recipe {path}: base: no such recipe: {base}.") from None
    return _merged(_resolved(found, (*above, path)), data)


def _merged(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Fields of `data` over those of `base`; another method replaces one with its settings."""
    merged = dict(base)
    for field, value in data.items():
        there = merged.get(field)
        if isinstance(value, dict) and isinstance(there, dict):
            same = value.get("name", there.get("name")) == there.get("name")
            merged[field] = _merged(there, value) if same else value
        else:
            merged[field] = value
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"recipe {path} cannot be read: {' '.join(str(error).split())}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"recipe {path} must be a mapping of fields, got {type(data).__name__}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Write `dotted.field=value` overrides into `data` and return it.

    Another method than the one that is there (`adapt.name=lora`) replaces it with its settings, as
    in files; settings among the overrides are the new one's, wherever they stand.
    """
    read = [_parsed(override) for override in overrides]
    for number, (name, value) in enumerate(read):
        section, _, field = name.partition(".")
        there = data.get(section)
        before = there.get("name", value) if isinstance(there, dict) else value
        if field == "name" and section in KINDS and value != before:
            data[section] = {}
            for earlier, given in read[:number]:
                if earlier.startswith(f"{section}."):
                    _set(data, earlier, given)
        _set(data, name, value)
    return data


def find_recipe(path: str | Path) -> tuple[Path, str]:
    """The file of a recipe, and what its runs are called.

    Raises:
        ValueError: If there is no such file, nor a shipped recipe of that name.
    """
    path = Path(path)
    if path.is_file():
        return path, path.stem
    name, shipped = str(path).removesuffix(".yaml"), shipped_recipes()
    if name in shipped:
        return shipped[name], name
    raise ValueError(f"no such recipe: {path}.")


def _parsed(override: str) -> tuple[str, Any]:
    """The dotted field of an override, and its value."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"an override must look like train.epochs=10, got {override!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{name}: {text!r} is not a YAML value.") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text, because the dot is missing.
        with contextlib.suppress(ValueError):
            value = float(value)
    return name, value


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    place = data
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ValueError(f"{name}: {parent} is not a mapping, so it has no field {last}.")
    place[last] = value
