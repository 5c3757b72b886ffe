"""How many files one request crosses, and which libraries the model process loads."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from loaded_modules import load_and_report

from tokendial.runtimes import PLAIN
from tokendial.serve.workers.messages import LoadModels
from tokendial.serve.workers.model_process import ForkServer

TOOL = Path(__file__).parents[2] / "tools" / "count_request_files.py"
NOT_NEEDED = {"matplotlib", "accelerate", "fastapi", "uvicorn", "peft", "torchmetrics"}


@pytest.mark.slow
def test_one_request_crosses_at_most_eighteen_files():
    command = [sys.executable, str(TOOL), "--list"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for crossed in ("scheduling/scheduler.py", "workers/models.py", "http/prediction.py"):
        assert f"serve/{crossed}\n" in done.stdout


def test_the_model_process_loads_no_library_that_it_does_not_need(pets, tmp_path, monkeypatch):
    """The modules are those of a real fork server; model processes are forked from it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    load = partial(load_and_report, tmp_path / "modules", {"pets": pets})
    server = ForkServer(LoadModels(load, PLAIN, None, None, 1, None))
    try:
        server.wait()
    finally:
        server.close()
    loaded = {name.partition(".")[0] for name in (tmp_path / "modules").read_text().split()}
    assert "torch" in loaded
    assert not loaded & NOT_NEEDED
