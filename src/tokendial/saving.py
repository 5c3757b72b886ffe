"""Saved models: what was trained, the configuration, and the name of the backbone."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokendial.atomic import replacing
from tokendial.backbones import Backbone, same_backbone
from tokendial.methods import from_json, to_json
from tokendial.vit import DialViT, wrap

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: DialViT, directory: Path) -> None:
    """Write `config.json` and `model.safetensors` into `directory`.

    Saved are the weights that train and the adapter's own; a frozen backbone is only named, unless
    its weights are random and could not be had again.
    """
    if model.adapter.merged:
        raise ValueError("merged adapters cannot be saved: call unmerge_adapters() first.")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in _saved(model).items()}
    with replacing(directory / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with replacing(directory / CONFIG) as path:
        path.write_text(json.dumps(_config(model), indent=2) + "\n")


def load(directory: str | Path, vit: nn.Module | None = None) -> DialViT:
    """Load a model that `save_pretrained` has written.

    Args:
        directory: Local folder, or the name of a repository on the Hugging Face hub.
        vit: The backbone, with its weights; None: built from its name, with the weights that it
            was trained on (timm's own are downloaded where needed).

    Raises:
        ValueError: If the folder does not hold a saved model, or `vit` is not the backbone that
            it was trained on.
    """
    folder = _folder(directory)
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}.") from None
    backbone = Backbone(**config["backbone"])
    whole = config["whole"]
    if vit is None:
        vit = (dataclasses.replace(backbone, weights=None) if whole else backbone).create()
    model = wrap(
        vit,
        reduce=from_json("reduce", config["reduce"]) if config["reduce"] else None,
        adapt=from_json("adapt", config["adapt"]) if config["adapt"] else None,
        backbone=backbone,
    )
    _check_names(model, tensors, folder)
    if not whole and not same_backbone(config["fingerprint"], model.fingerprint):
        raise ValueError(
            f"{folder} was trained on another backbone: the weights of {backbone.name} at hand "
            f"are not the ones it was saved with."
        )
    model.load_state_dict(tensors, strict=False)
    model.set_degree(config["degree"])
    return model.eval()


def push(
    model: DialViT, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a saved model to the Hugging Face hub; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        return str(api.upload_folder(repo_id=repo, folder_path=folder))


def _config(model: DialViT) -> dict[str, Any]:
    reduce, adapt = model.reduce_config, model.adapt_config
    return {
        "format": FORMAT,
        "backbone": dataclasses.asdict(model.backbone),
        "whole": _whole(model),
        "fingerprint": model.fingerprint,
        "reduce": to_json("reduce", reduce) if reduce else None,
        "adapt": to_json("adapt", adapt) if adapt else None,
        "degree": model.degree,
    }


def _saved(model: DialViT) -> dict[str, Tensor]:
    whole = model.backbone.weights is None
    trained = {name: p for name, p in model.named_parameters() if whole or p.requires_grad}
    return trained | {f"adapter.{name}": t for name, t in model.adapter.state_dict().items()}


def _whole(model: DialViT) -> bool:
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise ValueError(f"{folder} holds no saved model: {CONFIG} is missing.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {config!r:.60}.")
    return config


def _check_names(model: DialViT, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = {name: value.shape for name, value in _saved(model).items()}
    found = {name: value.shape for name, value in tensors.items()}
    if expected == found:
        return
    differing = [n for n in expected | found if expected.get(n) != found.get(n)]
    name = differing[0]
    raise ValueError(
        f"{folder} does not fit this backbone: {len(differing)} tensors differ, the first is "
        f"{name} (model {_shape(expected.get(name))}, file {_shape(found.get(name))})."
    )


def _shape(shape: "tuple[int, ...] | None") -> str:
    return "none" if shape is None else str(tuple(shape))
