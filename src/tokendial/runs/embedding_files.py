"""Files of embeddings: written in parts, so that an interrupted command continues.

While images are embedded, the folder OUT.parts holds what is done so far. Each of its files is
written atomically. At the end the parts become OUT, with the names of the images in OUT.json.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokendial.atomic import atomic_write, leftover_files
from tokendial.extras import check_installed
from tokendial.methods import to_json
from tokendial.model.files import CONFIG, WEIGHTS, files_revision
from tokendial.runs.embed import Embedding, EmbedSettings, embed
from tokendial.runs.evaluate import ProgressCallback, no_progress
from tokendial.runs.image_model import is_image_model
from tokendial.runs.model_source import ModelSource
from tokendial.runs.predict import Source
from tokendial.runs.run import Run

FORMATS = (".safetensors", ".parquet")
PART = 512
"""Images in one part: so many are embedded again, at most, after an interruption."""


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """What `embed_to_file` has written."""

    path: Path
    """The file of embeddings."""
    shape: tuple[int, ...]
    """Number of embeddings, and their shape."""
    unreadable: tuple[str, ...]
    """Errors of the images that could not be read; they have no embedding."""


def embed_to_file(
    source: ModelSource,
    images: Sequence[Source],
    out: Path,
    settings: EmbedSettings | None = None,
    *,
    device: str | None = None,
    ray: bool = False,
    progress: ProgressCallback = no_progress,
    note: Callable[[str], object] = lambda text: None,
) -> EmbeddingFile:
    """Embed images and write their embeddings to a file.

    OUT.safetensors holds the tensor "embeddings" [N, ...], and OUT.json the N paths of its rows
    ("files"). OUT.parquet holds both as columns "file" and "embedding". The same call continues
    after an interruption.

    Args:
        source: Where the model comes from.
        images: Image files and images in shards.
        out: File to write; its ending, .safetensors or .parquet, is the format.
        settings: Degree, features, batch size and precision. None means the defaults.
        device: Device to compute on. None means the accelerator if there is one, else the CPU.
        ray: Whether to use a Ray cluster; see `embed`.
        progress: Called after each image.
        note: Called with a line of text when earlier work is continued.

    Raises:
        ValueError: If `out` exists or has another ending, its folder is missing, a package is
            missing, earlier work belongs to other settings, no image can be read, or `embed` raises
            one.
    """
    settings = settings or EmbedSettings()
    parts = _Parts(out.with_name(f"{out.name}.parts"), images)
    _check_out(out, continues=parts.folder.is_dir())
    facts = _facts(source, settings)
    done = parts.open(facts)
    if done:
        note(f"{out}: {min(done * PART, len(images))} of {len(images)} images are done already")
    answers = embed(source, images[done * PART :], settings, device=device, ray=ray)
    count = done * PART
    progress(min(count, len(images)), len(images), "images")
    for number in range(done, parts.number):
        found: list[Any] = []
        for answer in islice(answers, PART):
            found.append(answer)
            count += 1
            progress(count, len(images), "images")
        parts.write(number, found)
    rows = [parts.read(number) for number in range(parts.number)]
    names = [name for part in rows for name in part.names]
    unreadable = tuple(error for part in rows for error in part.errors)
    if not names:
        raise ValueError(f"no image can be read; the first error: {unreadable[0]}")
    values = torch.cat([part.values for part in rows if part.values is not None])
    _write(out, names, values, facts | {"unreadable": list(unreadable)})
    parts.remove()
    return EmbeddingFile(out, tuple(values.shape), unreadable)


@dataclass(frozen=True, slots=True)
class _Part:
    """The embeddings of some images."""

    names: list[str]
    errors: list[str]
    values: Tensor | None


class _Parts:
    """The folder of the parts."""

    def __init__(self, folder: Path, images: Sequence[Source]) -> None:
        self.folder, self.images = folder, images
        self.number = -(-len(images) // PART)
        """Number of parts of all images."""

    def open(self, facts: dict[str, Any]) -> int:
        """Make the folder, or check that it holds the same work; return how many parts are done."""
        listed = "\n".join(map(str, self.images)).encode()
        facts = facts | {"images": len(self.images), "list": hashlib.sha256(listed).hexdigest()}
        record = self.folder / "settings.json"
        if record.is_file():
            before = json.loads(record.read_text())
            for name in sorted(facts.keys() | before.keys()):
                if facts.get(name) != before.get(name):
                    raise ValueError(
                        f"out: {self.folder} holds unfinished work whose {name} is "
                        f"{before.get(name)}, not {facts.get(name)}; remove it or choose another "
                        "out."
                    )
        else:
            self.folder.mkdir(exist_ok=True)
            with atomic_write(record) as path:
                path.write_text(json.dumps(facts, indent=2) + "\n")
        for leftover in leftover_files(self.folder / "*"):
            leftover.unlink()
        return next((n for n in range(self.number) if not self._path(n).exists()), self.number)

    def write(self, number: int, answers: Sequence[Any]) -> None:
        """Write one part."""
        rows = [answer for answer in answers if isinstance(answer, Embedding)]
        errors = [str(answer) for answer in answers if not isinstance(answer, Embedding)]
        tensors = {"embeddings": torch.stack([row.values for row in rows])} if rows else {}
        lists = {"names": [row.path for row in rows], "errors": errors}
        with atomic_write(self._path(number)) as path:
            save_file(tensors, path, {key: json.dumps(value) for key, value in lists.items()})

    def read(self, number: int) -> _Part:
        """Read one part."""
        with safe_open(self._path(number), "pt") as file:
            lists = {key: json.loads(value) for key, value in file.metadata().items()}
            values = file.get_tensor("embeddings") if lists["names"] else None
        return _Part(lists["names"], lists["errors"], values)

    def remove(self) -> None:
        """Remove the folder, whose content stands in the file of embeddings now."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"


def _check_out(out: Path, *, continues: bool) -> None:
    """Raise a ValueError unless the file can be written.

    Args:
        out: The file.
        continues: Whether earlier work continues, which may have written the names already.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"out must end in {' or '.join(FORMATS)}, got {out.name}.")
    if out.suffix == ".parquet":
        check_installed("out in the format of Parquet", "pyarrow")
    names = out.with_suffix(".json") if out.suffix == ".safetensors" and not continues else out
    for path in (out, names):
        if path.exists():
            raise ValueError(f"out: {path} exists; remove it or choose another out.")
    if not out.parent.is_dir():
        raise ValueError(f"out: no such folder: {out.parent}.")


def _facts(source: ModelSource, settings: EmbedSettings) -> dict[str, Any]:
    """The model and the settings that embeddings belong to, as plain JSON."""
    facts = dataclasses.asdict(source.absolute())
    if is_image_model(source.name):
        files = sorted(path for path in Path(source.name).iterdir() if path.is_file())
    elif source.is_folder:
        best = Run(source.name).best
        files = [best / CONFIG, best / WEIGHTS]
    else:
        files = [Path(source.weights or "")]
    facts["revision"] = files_revision(path for path in files if path.is_file())
    fields = ("degree", "features", "precision", "runtime")
    facts |= {field: getattr(settings, field) for field in fields}
    facts["reduce"] = to_json("reduce", settings.reduce) if settings.reduce else None
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _write(out: Path, names: list[str], values: Tensor, facts: dict[str, Any]) -> None:
    if out.suffix == ".parquet":
        _write_parquet(out, names, values, facts)
        return
    # The names come first: where the embeddings are, they are, too.
    with atomic_write(out.with_suffix(".json")) as path:
        path.write_text(json.dumps(facts | {"files": names}, indent=1) + "\n")
    with atomic_write(out) as path:
        save_file({"embeddings": values}, path, {"tokendial": json.dumps(facts)})


def _write_parquet(out: Path, names: list[str], values: Tensor, facts: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = values.flatten(1)
    # A list of fixed length has no nested shape, so that of a map stands in the metadata.
    rows = pa.FixedSizeListArray.from_arrays(pa.array(flat.flatten().numpy()), flat.shape[1])
    facts = facts | {"shape": list(values.shape[1:])}
    table = pa.table({"file": names, "embedding": rows})
    with atomic_write(out) as path:
        pq.write_table(table.replace_schema_metadata({"tokendial": json.dumps(facts)}), path)
