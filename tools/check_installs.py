"""Install the wheel into bare environments, with the core only and with each extra, and use it.

    python tools/check_installs.py              the core and every extra
    python tools/check_installs.py core serve   some of them

Each environment gets the versions of constraints.txt. Then installed_checks.py runs in it. A table
says what works; the exit code is 1 if anything fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "tools" / "installed_checks.py"
FIXTURES = ROOT / "tests" / "fixtures" / "saved_by_0_1"
WITHOUT_CHECK = {"dev"}
"""Extras that promise nothing to users."""


def main() -> int:
    """Check the installations that are named, or all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = ["core", *(e for e in project["optional-dependencies"] if e not in WITHOUT_CHECK)]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"from: {', '.join(known)}")
    names = parser.parse_args().names or known
    if unknown := set(names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    rows = []
    # Beside the project's own environment: there is room for one, and uv can link its files.
    with tempfile.TemporaryDirectory(prefix=".venv-", dir=ROOT) as folder:
        wheel = build_wheel(Path(folder))
        for name in names:
            start = time.monotonic()
            problem = check(name, wheel, Path(folder) / name)
            rows.append((name, problem))
            seconds = time.monotonic() - start
            print(
                f"{name:14} {'works' if problem is None else 'FAILS'} {seconds:6.1f} s", flush=True
            )
    for name, problem in rows:
        if problem is not None:
            print(f"\n{name}:\n{problem}", file=sys.stderr)
    return int(any(problem is not None for _, problem in rows))


def build_wheel(folder: Path) -> Path:
    """Build the wheel from the tree."""
    run(uv(), "build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(name: str, wheel: Path, environment: Path) -> str | None:
    """Install the wheel into a new environment, and use it; returns what went wrong."""
    extra = "" if name == "core" else f"[{name}]"
    python = environment / "bin" / "python"
    try:
        run(uv(), "venv", "--quiet", "--python", sys.executable, environment)
        requirement = f"tokendial{extra} @ {wheel.as_uri()}"
        versions = ("--constraint", ROOT / "constraints.txt")
        run(uv(), "pip", "install", "--quiet", "--python", python, *versions, requirement)
        run(python, CHECKS, name, FIXTURES)
    except subprocess.CalledProcessError as error:
        return f"{error}\n{error.stdout}{error.stderr}"
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return None


def run(*command: object) -> None:
    """Run a command without the settings of this Python; an error holds what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True, env=environment
    )


def uv() -> str:
    """The uv beside this Python, or that of the system."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if (found := shutil.which("uv", path=path)) is None:
        raise SystemExit("uv is not installed: pip install uv")
    return found


if __name__ == "__main__":
    sys.exit(main())
