"""Recipe files: finding them by name, resolving `base`, applying overrides, the JSON schema."""

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

from tokendial.data.transforms.clip import Clip
from tokendial.data.transforms.image import Augment
from tokendial.data.transforms.masks import MaskAugment
from tokendial.runs.method_field import describe_fields
from tokendial.runs.recipe import (
    KINDS,
    BaseRecipe,
    CompensateRecipe,
    Recipe,
    check_section,
)

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
    """Read a recipe from a file, with overrides such as `train.epochs=10`.

    A file with `base: OTHER` holds only the fields that differ from another recipe, which lies in
    the same folder or is shipped. Without the field `output`, the run goes to runs/NAME.

    Args:
        path: A YAML file, or the name of a shipped recipe, such as demo or dar/duts.
        overrides: `dotted.field=value`, with the value written as in YAML.
        kind: The class of the recipe: `Recipe` for fine-tuning, or `CompensateRecipe`.

    Raises:
        ValueError: In one line: which field is wrong, its value, and what is allowed.
    """
    path, name = find_recipe(path)
    data = _resolve_base(path)
    for field, command, other_kind in (
        ("compensate", "compensate", Recipe),
        ("adapt", "train", CompensateRecipe),
    ):
        if kind is other_kind and field in data:
            raise ValueError(f"recipe {path.name} is one for `tokendial {command}`.")
    apply_overrides(data, overrides)
    data.setdefault("output", f"runs/{name}")
    return check_section(kind, data)


def shipped_recipes() -> dict[str, Path]:
    """The files of the shipped recipes by name, such as dar/duts."""
    # An installed package contains them; in a checkout they lie beside src/.
    package = Path(__file__).parent.parent
    for folder in (package / "recipes", package.parent.parent / "recipes"):
        if files := sorted(folder.rglob("*.yaml")):
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def recipes_in(folder: str) -> dict[str, Path]:
    """The shipped recipes below a folder, such as baselines or baselines/vtab, by name."""
    start = f"{folder.rstrip('/')}/"
    return {name: file for name, file in shipped_recipes().items() if name.startswith(start)}


def list_recipes() -> dict[str, str]:
    """The shipped recipes outside of folders, and the folders, each with one sentence."""
    recipes, folders = {}, {}
    for name, file in shipped_recipes().items():
        folder, *inner = name.split("/")
        if inner:
            folders[f"{folder}/"] = summary(file.parents[len(inner) - 1] / "README.md")
        else:
            recipes[name] = summary(file)
    return recipes | folders


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, which editors use: of fine-tuning and of compensators."""
    kinds = [kind.model_json_schema() for kind in (Recipe, CompensateRecipe)]
    base = {
        "type": "string",
        "description": "Recipe (file or name) whose fields hold where this file has none.",
    }
    for schema in kinds:
        schema["properties"]["base"] = base
    definitions = {name: part for schema in kinds for name, part in schema.pop("$defs").items()}
    for section in (Augment, Clip, MaskAugment):
        describe_fields(definitions[section.__name__], section)
    for part in (*kinds, *definitions.values()):
        # Required fields may stand in the base of a file, or on the command line.
        part.pop("required", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of Tokendial",
        "anyOf": kinds,
        "$defs": definitions,
    }


def describe(path: Path) -> str:
    """The comment at the top of a recipe file, or the title of a folder's README.md."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def summary(path: Path) -> str:
    """The first sentence of the description of a recipe or folder."""
    return describe(path).replace("\n", " ").partition(". ")[0].rstrip(".")


def explicit_fields(name: str | Path) -> dict[str, Any]:
    """The fields that a recipe and its bases write out, without defaults."""
    return _resolve_base(find_recipe(name)[0])


def field_origins(name: str | Path) -> dict[str, str]:
    """Which recipe sets each field that is not a default, by dotted field.

    Args:
        name: A YAML file, or the name of a shipped recipe.

    Raises:
        ValueError: If there is no such recipe, or a file cannot be read.
    """
    names = {file.resolve(): shipped for shipped, file in shipped_recipes().items()}
    origins: dict[str, str] = {}
    merged: dict[str, Any] = {}
    for path, data in _chain(find_recipe(name)[0]):
        merged = _merge_fields(merged, data)
        origins |= dict.fromkeys(_leaves(data), names.get(path, path.name))
    return {field: origins[field] for field in _leaves(merged)}


def _leaves(data: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of all fields that are no sections."""
    names = []
    for name, value in data.items():
        inner = _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else []
        names += inner or [f"{prefix}{name}"]
    return names


def _resolve_base(path: Path) -> dict[str, Any]:
    """The fields of a file over those of its base."""
    merged: dict[str, Any] = {}
    for _, data in _chain(path):
        merged = _merge_fields(merged, data)
    return merged


def _chain(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """A file and its bases with their own fields, the last base first.

    Args:
        path: The file.
        above: Files that lead here.
    """
    path = path.resolve()
    if path in above:
        raise ValueError(f"recipe {path}: base leads back to itself.")
    data = _read(path)
    base = data.pop("base", None)
    if base is None:
        return [(path, data)]
    if not isinstance(base, str):
        raise ValueError(f"recipe {path}: base must be the name of a recipe, got {base!r}.")
    in_folder = path.parent / base
    candidates = (in_folder, in_folder.with_suffix(".yaml"))
    base_file = next((file for file in candidates if file.is_file()), None)
    try:
        base_file = base_file or find_recipe(base)[0]
    except ValueError:
        raise ValueError(f"recipe {path}: base: no such recipe: {base}.") from None
    return [*_chain(base_file, (*above, path)), (path, data)]


def _merge_fields(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Fields of `data` over those of `base`. Another method drops the settings of the base's."""
    merged = dict(base)
    for field, value in data.items():
        present = merged.get(field)
        if isinstance(value, dict) and isinstance(present, dict):
            same_method = value.get("name", present.get("name")) == present.get("name")
            merged[field] = _merge_fields(present, value) if same_method else value
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
    """Write `dotted.field=value` overrides into `data`, and return it.

    An override that names another method (`adapt.name=lora`) drops the settings of the method
    before it, as in files. Settings among the overrides belong to the new method, even if they
    stand before its name.
    """
    parsed = [_parse_override(override) for override in overrides]
    for index, (name, value) in enumerate(parsed):
        section, _, field = name.partition(".")
        present = data.get(section)
        method = present.get("name", value) if isinstance(present, dict) else value
        if field == "name" and section in KINDS and value != method:
            data[section] = {}
            for earlier_name, earlier_value in parsed[:index]:
                if earlier_name.startswith(f"{section}."):
                    _set(data, earlier_name, earlier_value)
        _set(data, name, value)
    return data


def find_recipe(path: str | Path) -> tuple[Path, str]:
    """The file of a recipe, and the name that its runs get.

    Args:
        path: A YAML file, or the name of a shipped recipe.

    Raises:
        ValueError: If there is neither such a file nor a shipped recipe of that name.
    """
    path = Path(path)
    if path.is_file():
        return path, path.stem
    name, shipped = str(path).removesuffix(".yaml"), shipped_recipes()
    if name in shipped:
        return shipped[name], name
    raise ValueError(f"no such recipe: {path}.")


def _parse_override(override: str) -> tuple[str, Any]:
    """The dotted field of an override, and its parsed value."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"an override must look like train.epochs=10, got {override!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{name}: {text!r} is not a YAML value.") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text, because it has no decimal point.
        with contextlib.suppress(ValueError):
            value = float(value)
    return name, value


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    """Set a dotted field, and make the sections above it where they are missing."""
    *parents, last = name.split(".")
    section = data
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ValueError(f"{name}: {parent} is not a mapping, so it has no field {last}.")
    section[last] = value
