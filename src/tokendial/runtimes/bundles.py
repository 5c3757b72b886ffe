"""Exported files of a model that are kept for the next start."""

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tokendial.export_files import BUNDLE, export_bundle, output_names
from tokendial.model.dial_vit import DialViT
from tokendial.weights import hash_tensors

_REVISION, _OUTPUTS = "revision", "outputs"
_ABANDONED_S = 3600.0
"""Seconds after its last change from which on an unfinished bundle counts as abandoned."""


def find_or_export(
    model: DialViT,
    degrees: Sequence[int],
    folder: Path,
    *,
    feature_map: bool = False,
    quiet: bool = False,
) -> dict[int, Path]:
    """Return an exported file for each degree, which are written if they are missing.

    Args:
        model: The model.
        degrees: Degrees to find.
        folder: Holds a bundle for each set of degrees, in folders of their own. Bundles of other
            weights, and those that a new one replaces, are deleted.
        feature_map: Whether the files give feature maps in place of embeddings.
        quiet: Do not print that files are exported.

    Returns:
        The path of the ONNX file of each degree. Files give logits, and embeddings or feature maps.

    Raises:
        ValueError: If the model cannot be exported.
    """
    embeddings = not feature_map
    revision, outputs = _revision(model), output_names(embeddings, feature_map)
    for bundle, contents in _bundles(folder):
        files = {int(degree): bundle / name for degree, name in contents["files"].items()}
        serves = set(degrees) <= set(files) and contents.get(_OUTPUTS) == outputs
        if serves and contents.get(_REVISION) == revision:
            return {degree: files[degree] for degree in degrees}
    listed = ", ".join(map(str, degrees))
    if not quiet:
        print(f"exporting the model at degree {listed}: once for these weights", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*/bundle"):
        if time.time() - unfinished.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
    key = f"{listed} {outputs}".encode()
    name = f"{revision}-{hashlib.sha256(key).hexdigest()[:6]}"
    # A bundle appears whole under its name, or not at all.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        new = Path(temporary, "bundle")
        export_bundle(
            model,
            new,
            degrees,
            facts={_REVISION: revision},
            embeddings=embeddings,
            feature_map=feature_map,
        )
        for bundle, contents in list(_bundles(folder)):
            replaced = set(contents["files"]) <= set(map(str, degrees))
            # Bundles that an earlier version wrote do not say what they give.
            replaced &= contents.get(_OUTPUTS, outputs) == outputs
            if contents.get(_REVISION) != revision or replaced:
                shutil.rmtree(bundle, ignore_errors=True)
        new.replace(folder / name)
    return {degree: folder / name / f"degree_{degree}.onnx" for degree in degrees}


def _bundles(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The bundles in a folder, with the contents of their lists of files."""
    for listed in sorted(folder.glob(f"*/{BUNDLE}")):
        yield listed.parent, json.loads(listed.read_text())


def _revision(model: DialViT) -> str:
    """First 12 characters of a hash of all that decides the logits of a model."""
    digest = hashlib.sha256(torch.__version__.encode())
    digest.update(repr(model.anatomy.input_shape).encode())
    for config in (model.reduce_config, model.adapt_config, model.decode_config, model.backbone):
        digest.update(repr(config).encode())
    if model.compensation:
        digest.update(model.compensation.revision.encode())
    with model.own_weights():
        digest.update(hash_tensors(model.state_dict()).encode())
    return digest.hexdigest()[:12]
