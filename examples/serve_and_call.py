"""Start the server and send it an image (pip install 'tokendial[serve]').

The program trains a tiny run first, or serves the one that --run names. It prints the server's own
lines, then the answers to one image at two degrees, and the cost of each degree.
"""

import argparse
import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import IO, Any

from tokendial.data import Scenes
from tokendial.runs import Run, read_recipe
from tokendial.train import train

SMALL = ("data.train_size=200", "data.val_size=50", "train.epochs=1", "train.warmup_epochs=0")


def trained_run(folder: Path) -> Run:
    """The recipe of the demo, with few images."""
    recipe = read_recipe("demo", [f"output={folder}", "train.workers=0", *SMALL])
    return train(recipe, quiet=True)


def address(lines: IO[str]) -> str:
    """Wait until the server prints its URL, and return it."""
    for line in lines:
        print(line, end="")
        if line.startswith("serving"):
            return line.split()[-1]
    raise RuntimeError("the server has ended")


def call(url: str, body: bytes | None = None) -> Any:
    """Return the JSON answer of the server: POST with an image, GET without."""
    request = urllib.request.Request(url, data=body, headers={"content-type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def main() -> None:
    """Serve, ask, stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run that was trained before")
    arguments = parser.parse_args()
    run = Run(arguments.run) if arguments.run else trained_run(Path("example_served"))

    picture = io.BytesIO()
    Scenes(task="count").build(seed=0).val[0][0].save(picture, format="png")
    command = [sys.executable, "-m", "tokendial.cli", "serve", str(run.folder), "--port", "0"]
    options = ["--slo-ms", "1000", "--threads", "1", "--decoders", "1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = address(server.stdout)
            for degree in ("0", "best"):
                answer = call(f"{url}/v1/predict?top=2&degree={degree}", picture.getvalue())
                print(json.dumps(answer["predictions"][0]["classes"]))
            print(json.dumps(call(f"{url}/v1/degrees"), indent=1)[:400])
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
