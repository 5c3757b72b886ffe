"""Saved models: what was trained, the configuration, and the name of the backbone."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokendial.adapted import AdaptedViT
from tokendial.atomic import replacing
from tokendial.backbones import Backbone, same_backbone
from tokendial.methods import from_json, to_json
from tokendial.reduce.base import Calibration, ReducerConfig
from tokendial.vit import DialViT, wrap

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


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
    with replacing(directory / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with replacing(directory / CONFIG) as path:
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
    backbone = Backbone(**config["backbone"])
    whole = config["whole"]
    if vit is None:
        vit = (dataclasses.replace(backbone, weights=None) if whole else backbone).create()
    own, adapt, decode = _methods(config)
    model = wrap(vit, reduce=reduce or own, adapt=adapt, decode=decode, backbone=backbone)
    try:
        _check_names(_saved(model), tensors, folder)
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
    with model.own_weights():
        model.add_adapter(name, adapt, num_classes=len(heads[0]) if heads else None, decode=decode)
        try:
            model.set_adapter(name)
            own = _trained(model)
            found = {tensor: value for tensor, value in tensors.items() if tensor in own}
            _check_names(own, found, folder)
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
    if model.reducer and (found := config.get("calibration")):
        lists = {name: tuple(values) for name, values in found.items()}
        model.reducer.calibration = Calibration(**lists)


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

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
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
        return folder, config, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}.") from None


def _methods(config: dict[str, Any]) -> list[Any]:
    """Reduction, adapter and decoder; models saved before there were decoders have none."""
    written = {kind: config.get(kind) for kind in ("reduce", "adapt", "decode")}
    return [from_json(kind, data) if data else None for kind, data in written.items()]


def _read_config(folder: Path, kind: str) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{folder} holds no saved {kind}: {CONFIG} is missing.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {config!r:.60}.")
    if (found := config.get("kind", "model")) != kind:
        raise ValueError(f"{folder} holds a {found}, not a {kind}.")
    return config


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
