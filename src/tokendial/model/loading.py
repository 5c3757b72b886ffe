"""Build a saved model again."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokendial.model.dial_vit import DialViT
from tokendial.model.files import CONFIG, config_errors
from tokendial.model.saved_model import SavedModel
from tokendial.model.wrap import wrap
from tokendial.reduce.base import ReducerConfig

_MAX_PARAMETERS = 20_000_000_000


def load(
    directory: str | Path,
    vit: nn.Module | None = None,
    *,
    reduce: ReducerConfig | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> DialViT:
    """Load a model that `save_pretrained` has written.

    Args:
        directory: Local folder, or "owner/name" of a repository on the Hugging Face hub.
        vit: The backbone with its weights; None: it is built from its name, with the weights that
            the model was trained on (timm's own are downloaded where needed).
        reduce: Replace the reduction method that the model was trained with, and run at the degree
            that the new method describes. Both must have the same weights, or none. None: the
            model's own method, at the degree that it was saved at.
        revision: Branch, tag or commit of the repository on the hub; None: its main branch.
        token: Access token of the hub; None: the one that `hf auth login` stored, if any.

    Raises:
        ValueError: If the folder does not hold a saved model, `vit` is not the backbone that it
            was trained on, or the two reduction methods have different weights. A `vit` that was
            passed is then as it was.
    """
    saved = SavedModel.read(directory, revision=revision, token=token)
    methods: dict[str, Any] = {
        "reduce": reduce or saved.reduce,
        "adapt": saved.adapt,
        "decode": saved.decode,
    }
    with config_errors(saved.folder):
        if vit is None:
            vit = _create_backbone(saved, methods)
        model = wrap(vit, **methods, backbone=saved.backbone)
        try:
            saved.check_shapes(model.saved_tensors(), saved.tensors)
            saved.check_values(saved.tensors, model.state_dict())
            if saved.whole:
                # That of the backbone before fine-tuning, not of the random weights that the file
                # now replaces.
                model.fingerprint = saved.fingerprint
            else:
                saved.check_backbone(model.fingerprint)
            if reduce is None:
                saved.restore_dial(model.reducer)
                model.set_degree(saved.degree)
            model.load_state_dict(saved.tensors, strict=False)
        except BaseException:
            model.release_backbone()
            raise
    return model.eval()


def _create_backbone(saved: SavedModel, methods: dict[str, Any]) -> nn.Module:
    """Build the backbone, after a trial on the meta device, which takes no memory.

    Raises:
        ValueError: If the file's tensors are not those of the model that it describes.
    """
    saved.check_source()
    blank = dataclasses.replace(saved.backbone, weights=None)
    with torch.device("meta"):
        vit = blank.create()
        count = sum(p.numel() for p in vit.parameters())
        if count > _MAX_PARAMETERS:
            raise ValueError(f"{saved.folder / CONFIG} describes {count} parameters.")
        model = wrap(vit, **methods, backbone=saved.backbone)
        saved.check_shapes(model.saved_tensors(), saved.tensors)
    return (blank if saved.whole else saved.backbone).create()
