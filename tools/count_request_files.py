"""Count the source files that one prediction request crosses; exit with 1 above the limit.

    python tools/count_request_files.py [--list]

A real server (`tokendial serve`) with a tiny run is started, warmed up, and asked for one image at
a time (`POST /v1/predict`), `REQUESTS` times. Counted are the files of `src/tokendial/serve` in
which a Python function starts between the sending of a request and the end of its answer, in any
process of the server (HTTP, decoders, model process) and in any thread. So functions that run in
the background during that time count, too. Repeating the request makes sure that all of these are
met, and the number does not depend on chance.

Files of the library below the server (reading the image, transforms, the model's own layers) are
shown with `--list` and not counted: `tokendial predict` crosses them as well.

Each process records with `sys.setprofile`, which a `sitecustomize` module of this tool switches on
through `PYTHONPATH`. A byte of shared memory says when to record. The server's code knows nothing
of it.
"""

import argparse
import http.client
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LIMIT = 18
"""Maximum number of files of the server."""
REQUESTS = 20
"""Number of recorded requests; together they take at least as long as background tasks need."""
PAUSE_S = 0.1
"""Seconds of recording after each answer, in which background tasks run."""
SOURCE = Path(__file__).parents[1] / "src" / "tokendial"

RECORDER = """
import mmap, os, sys, threading

_root, _folder = os.environ["TOKENDIAL_COUNT_ROOT"], os.environ["TOKENDIAL_COUNT_FOLDER"]
with open(os.path.join(_folder, "recording"), "r+b") as file:
    _recording = mmap.mmap(file.fileno(), 1)
_log = os.open(os.path.join(_folder, "files"), os.O_WRONLY | os.O_APPEND)
_seen = set()


def _profile(frame, event, argument):
    if event == "call" and _recording[0]:
        name = frame.f_code.co_filename
        if name not in _seen:
            _seen.add(name)
            if name.startswith(_root):
                os.write(_log, (name + "\\n").encode())


threading.setprofile(_profile)
sys.setprofile(_profile)
"""


def main(arguments: Sequence[str]) -> int:
    """Count the files, print their number, and return the exit code."""
    parser = argparse.ArgumentParser(description="Count the files that one request crosses.")
    parser.add_argument("--list", action="store_true", help="also print the files")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        files = crossed_files(Path(folder))
    server = [name for name in files if name.startswith("serve/")]
    if options.list:
        print(*files, sep="\n")
    library = len(files) - len(server)
    print(f"one request crosses {len(server)} files of the server (at most {LIMIT})")
    print(f"and {library} files of the library: reading the image, transforms, the model")
    return int(len(server) > LIMIT)


def crossed_files(folder: Path) -> list[str]:
    """Names of the files below `SOURCE` that requests cross.

    Args:
        folder: Empty folder for the run and the records.
    """
    run, image = write_run(folder / "run"), png()
    recording, records = folder / "recording", folder / "files"
    recording.write_bytes(b"\0")
    records.touch()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(RECORDER)
    with server_port(run, folder) as port, recording.open("r+b", buffering=0) as switch:
        predict(port, image)
        for _ in range(REQUESTS):
            switch.seek(0)
            switch.write(b"\1")
            predict(port, image)
            time.sleep(PAUSE_S)
            switch.seek(0)
            switch.write(b"\0")
    names = set(records.read_text().splitlines())
    return sorted(str(Path(name).relative_to(SOURCE)) for name in names)


def write_run(folder: Path) -> Path:
    """Write a run with a tiny model that was not trained."""
    import timm

    import tokendial as td
    from tokendial.runs import Run
    from tokendial.runs.recipe import check_recipe

    name, classes = "vit_tiny_patch16_224", ["cat", "dog"]
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    reduce, adapt = {"name": "tome", "r": 4}, {"name": "adaptformer", "dim": 4}
    arguments = shape | {"img_size": 32, "num_classes": len(classes)}
    model = td.wrap(
        timm.create_model(name, **arguments),
        reduce=td.ToMe(r=4),
        adapt=td.AdaptFormer(dim=4),
        backbone=td.Backbone(name=name, weights=None, args=arguments),
    )
    recipe = {
        "output": str(folder),
        "model": {"name": name, "weights": None, "img_size": 32, "args": shape},
        "reduce": reduce,
        "adapt": adapt,
        "data": {"name": "image_folder", "root": "."},
    }
    run = Run(folder)
    run.claim(check_recipe(recipe), classes)
    model.save_pretrained(run.best)
    return folder


def png() -> bytes:
    """A small image file."""
    from PIL import Image

    file = io.BytesIO()
    Image.effect_noise((50, 40), 50).convert("RGB").save(file, "PNG")
    return file.getvalue()


@contextmanager
def server_port(run: Path, folder: Path) -> Iterator[int]:
    """Start a server that records, and yield its port; the server ends with the block."""
    paths = [str(folder / "site"), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TOKENDIAL_COUNT_ROOT": f"{SOURCE}{os.sep}",
        "TOKENDIAL_COUNT_FOLDER": str(folder),
    }
    options = ["--port", "0", "--slo-ms", "60000", "--max-batch", "1", "--max-degree", "1"]
    command = [sys.executable, "-m", "tokendial.cli", "serve", str(run), *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = server.stdout or ()
            found = (re.search(r"http://127\.0\.0\.1:(\d+)", line) for line in lines)
            port = next((int(match[1]) for match in found if match), None)
            if port is None:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            yield port
        finally:
            server.terminate()


def predict(port: int, image: bytes) -> None:
    """Ask for a prediction of one image."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    client.request("POST", "/v1/predict", image, {"content-type": "image/png"})
    response = client.getresponse()
    body = response.read()
    client.close()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {body.decode()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
