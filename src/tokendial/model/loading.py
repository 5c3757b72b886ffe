"""Saved models: what was trained, the configuration, and the name of the backbone."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokendial.atomic import atomic_write
from tokendial.backbones import Backbone, same_backbone
from tokendial.errors import error_message
from tokendial.hub import hub_problem
from tokendial.methods import from_fields, from_json, to_json
from tokendial.model.adapted import AdaptedViT
from tokendial.model.dial_vit import DialViT, wrap
from tokendial.reduce.base import Calibration, ReducerConfig
from tokendial.weights import check_finite, read_file

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# A saved model may come from anywhere. These are beyond all that there is, and keep what its
# configuration describes from filling the memory before it is compared with the tensors.
_DIGITS = 18
_MOST_BLOCKS, _MOST_PARAMETERS = 1000, 20_000_000_000
_MOST_IN_SMALL_FILES = 2**16
_MISFITS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
    TypeError,
)  # fmt: skip


def save(model: AdaptedViT, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` into `directory`.

    Saved are the weights that train and the adapter's own; a frozen backbone is only named, unless
    its weights are random and could not be had again.
    """
    if model.adapter.merged:
        raise ValueError("merged adapters cannot be saved: call unmerge_adapters() first.")
    model.check_headless(model.decode_config)
    with model.own_weights():
        write_files(directory, _config(model), _saved(model))


def write_files(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a configuration and tensors, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(directory / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with atomic_write(directory / CONFIG) as path:
        path.write_text(json.dumps({"format": FORMAT} | config, indent=2) + "\n")


def load(
    directory: str | Path, vit: nn.Module | None = None, *, reduce: ReducerConfig | None = None
) -> DialViT:
    """Load a model that `save_pretrained` has written.

    Args:
        directory: Local folder, or the name of a repository on the Hugging Face hub.
        vit: The backbone, with its weights; None: built from its name, with the weights that it
            was trained on (timm's own are downloaded where needed).
        reduce: Another reduction method than the model was trained with, to run it at the degree
            that this one describes; neither may have weights of its own. None: the model's own
            method, at the degree that it was saved at.

    Raises:
        ValueError: If the folder does not hold a saved model, `vit` is not the backbone that it
            was trained on, or one of the two reduction methods has weights. A `vit` that was given
            is then as it was.
    """
    folder, config, tensors = read_files(directory, kind="model")
    backbone = _described(config, tensors, folder)
    whole = config["whole"]
    own, adapt, decode = _methods(config)
    methods: dict[str, Any] = {"reduce": reduce or own, "adapt": adapt, "decode": decode}
    with building(folder):
        if vit is None:
            _check_source(backbone, folder)
            # What the configuration describes takes memory only once the file is known to fit it.
            with torch.device("meta"):
                blank = dataclasses.replace(backbone, weights=None).create()
                count = sum(p.numel() for p in blank.parameters())
                if count > _MOST_PARAMETERS:
                    raise ValueError(f"{folder / CONFIG} describes {count} parameters.")
                _check_names(_saved(wrap(blank, **methods, backbone=backbone)), tensors, folder)
            vit = (dataclasses.replace(backbone, weights=None) if whole else backbone).create()
        model = wrap(vit, **methods, backbone=backbone)
        try:
            _check_names(_saved(model), tensors, folder)
            check_finite(tensors, folder / WEIGHTS, model.state_dict())
            if whole:
                # Of what it was fine-tuned from, not of the fresh weights that are now replaced.
                model.fingerprint = config["fingerprint"]
            else:
                _check_backbone(model, config, folder)
            if reduce is None:
                _calibrate(model, config)
                model.set_degree(config["degree"])
            model.load_state_dict(tensors, strict=False)
        except BaseException:
            model.release_backbone()
            raise
    return model.eval()


def load_adapter(model: AdaptedViT, name: str, directory: str | Path) -> None:
    """Add a saved adapter and its head to a model; see `DialViT.load_adapter`."""
    folder, config, tensors = read_files(directory, kind="model")
    _described(config, tensors, folder)
    reduce, adapt, decode = _methods(config)
    if adapt is None:
        raise ValueError(f"{folder} holds a model without an adapter.")
    if reduce != model.reduce_config:
        raise ValueError(
            f"{folder} was trained with another reduction ({reduce}) than this model's "
            f"({model.reduce_config})."
        )
    _check_backbone(model, config, folder)
    biases = {f"vit.{head}.{bias}" for head in model.head_names for bias in ("bias", "head.bias")}
    heads = [value for tensor, value in tensors.items() if tensor in biases]
    active = model.active_adapter
    with building(folder), model.own_weights():
        model.add_adapter(name, adapt, num_classes=len(heads[0]) if heads else None, decode=decode)
        try:
            model.set_adapter(name)
            # The file may hold the frozen backbone, too, whose weights the model has.
            frozen = model.state_dict().keys() - (own := _trained(model)).keys()
            found = {n: value for n, value in tensors.items() if n not in frozen}
            _check_names(own, found, folder)
            check_finite(found, folder / WEIGHTS, own)
            model.load_state_dict(found, strict=False)
            _calibrate(model, config)
        except BaseException:
            model.set_adapter(active)
            model.delete_adapter(name)
            raise
        model.set_adapter(active)


def push(
    model: AdaptedViT, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a saved model to the Hugging Face hub; returns its address."""
    return push_files(lambda folder: save(model, folder), repo_id, private=private, token=token)


def push_files(
    write: Callable[[Path], None], repo_id: str, *, private: bool | None, token: str | None
) -> str:
    """Upload what `write` puts into a folder; returns its address on the hub."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return str(api.upload_folder(repo_id=repo, folder_path=folder))


def _config(model: AdaptedViT) -> dict[str, Any]:
    methods = {
        "reduce": model.reduce_config,
        "adapt": model.adapt_config,
        "decode": model.decode_config,
    }
    return {
        "kind": "model",
        "backbone": dataclasses.asdict(model.backbone),
        "whole": _whole(model),
        "fingerprint": model.fingerprint,
        "degree": model.degree,
        "calibration": _calibration(model),
    } | {kind: to_json(kind, method) if method else None for kind, method in methods.items()}


def _calibration(model: AdaptedViT) -> dict[str, Any] | None:
    found = model.reducer.calibration if model.reducer else None
    return dataclasses.asdict(found) if found else None


def _calibrate(model: AdaptedViT, config: dict[str, Any]) -> None:
    """Give the reducer what was measured; models saved before dials were measured have nothing."""
    found = config.get("calibration")
    if model.reducer is None or found is None:
        return
    lists = {name: tuple(values) for name, values in _mapping(found, "calibration").items()}
    calibration = from_fields(Calibration, lists, "calibration", "a saved model")
    wanted = len(model.reducer.degrees) - 1
    for name, values in lists.items():
        if len(values) != wanted:
            raise ValueError(f"calibration.{name} must be {wanted} numbers, got {len(values)}.")
    model.reducer.calibration = calibration


def _saved(model: AdaptedViT) -> dict[str, Tensor]:
    random = model.backbone.weights is None
    return (dict(model.named_parameters()) if random else {}) | _trained(model)


def _trained(model: AdaptedViT) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained |= {f"adapter.{name}": t for name, t in model.adapter.state_dict().items()}
    decoder = model.decoder.state_dict() if model.decoder else {}
    return trained | {f"decoder.{name}": t for name, t in decoder.items()}


def _whole(model: AdaptedViT) -> bool:
    saved = _saved(model)
    return all(f"vit.{name}" in saved for name, _ in model.vit.named_parameters())


def _folder(directory: str | Path) -> Path:
    folder = Path(directory)
    if folder.exists():
        return folder
    name = str(directory)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"no such folder: {folder}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    problem = hub_problem()
    try:
        patterns, local = [CONFIG, WEIGHTS], problem is not None
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = problem or str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is neither a folder nor on the hub: {reason}") from None


def read_files(
    directory: str | Path, *, kind: str
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Where what `write_files` wrote lies, its configuration and its tensors.

    Args:
        directory: Local folder, or the name of a repository on the Hugging Face hub.
        kind: What is looked for: "model" or "compensator".

    Raises:
        ValueError: If it is not there, or cannot be read.
    """
    folder = _folder(directory)
    config = _read_config(folder, kind)
    try:
        return folder, config, read_file(folder / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{WEIGHTS} cannot be read: {error}") from None


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Turn whatever a configuration that fits no model leads to into a ValueError in one line."""
    try:
        yield
    except _MISFITS as error:
        raise ValueError(
            f"{folder / CONFIG} describes nothing that can be built: {error_message(error)}."
        ) from error


def check_field(config: dict[str, Any], name: str, kind: type, folder: Path) -> None:
    """Refuse a field of a configuration that is missing or of another type."""
    if type(value := config.get(name)) is not kind:
        raise ValueError(
            f"{folder / CONFIG}: {name} must be of type {kind.__name__}, got {value!r:.60}."
        )


def check_numbers(numbers: list[Any], name: str, folder: Path) -> None:
    """Refuse a list that holds other things than numbers."""
    if odd := [value for value in numbers if type(value) not in (int, float)]:
        raise ValueError(f"{folder / CONFIG}: {name} must hold numbers, got {odd[0]!r:.60}.")


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r:.60}.")
    return value


def _described(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Backbone:
    """The backbone of a saved model, after its configuration was looked through."""
    for name, kind in (("whole", bool), ("fingerprint", list), ("degree", int), ("backbone", dict)):
        check_field(config, name, kind, folder)
    check_numbers(config["fingerprint"], "fingerprint", folder)
    check_sizes(config, tensors, folder)
    return from_fields(Backbone, config["backbone"], f"{folder / CONFIG}: backbone", "a backbone")


def check_sizes(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse sizes in a configuration that its tensors cannot be of, before any is built."""
    most = max(_MOST_IN_SMALL_FILES, sum(value.numel() for value in tensors.values()))
    for name in ("backbone", "adapt", "decode"):
        for key, value in _numbers(config.get(name), name):
            limit = _MOST_BLOCKS if key.endswith(("depth", "num_hidden_layers")) else most
            if abs(value) > limit:
                raise ValueError(f"{folder / CONFIG}: {key} must be at most {limit}, got {value}.")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """All numbers in plain JSON, and where they stand."""
    if isinstance(value, int | float):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)


def _check_source(backbone: Backbone, folder: Path) -> None:
    """Refuse names that say where files lie: a saved model may come from anywhere."""
    if ":" in backbone.name or "/" in backbone.name:
        raise ValueError(
            f"{folder / CONFIG}: backbone.name {backbone.name!r} is a place, which is not read; "
            "build the backbone and give it: load(..., vit=...)."
        )


def _methods(config: dict[str, Any]) -> list[Any]:
    """Reduction, adapter and decoder; models saved before there were decoders have none."""
    written = {kind: config.get(kind) for kind in ("reduce", "adapt", "decode")}
    return [None if data is None else from_json(kind, data) for kind, data in written.items()]


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(
            path.read_text(), parse_constant=_finite, parse_float=_finite, parse_int=_integer
        )
    except OSError:
        raise ValueError(f"{folder} holds no saved {kind}: {CONFIG} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {config!r:.60}.")
    if (found := config.get("kind", "model")) != kind:
        raise ValueError(f"{folder} holds a {found}, not a {kind}.")
    return config


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text:.20}... is too large")
    return int(text)


def _check_backbone(model: AdaptedViT, config: dict[str, Any], folder: Path) -> None:
    if not same_backbone(config["fingerprint"], model.fingerprint):
        raise ValueError(
            f"{folder} was trained on another backbone: the weights of "
            f"{config['backbone']['name']} at hand are not the ones it was saved with."
        )


def _check_names(own: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    expected = {name: value.shape for name, value in own.items()}
    found = {name: value.shape for name, value in tensors.items()}
    if expected == found:
        return
    differing = [n for n in expected | found if expected.get(n) != found.get(n)]
    name = differing[0]
    raise ValueError(
        f"{folder} does not fit this model: {len(differing)} tensors differ, the first is "
        f"{name} (model {_shape(expected.get(name))}, file {_shape(found.get(name))})."
    )


def _shape(shape: "tuple[int, ...] | None") -> str:
    return "none" if shape is None else str(tuple(shape))
