import os
import sys

import pytest
import torch
from examples import tiny_vit
from hypothesis import settings
from torch import nn

from tokendial.cli import main

# The same examples in every run, and no limit on their time: the machine may be busy.
settings.register_profile("tokendial", derandomize=True, deadline=None)
settings.load_profile("tokendial")
# The models of the tests are too small to share; threads that wait for each other cost more.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too


@pytest.fixture
def vit() -> nn.Module:
    return tiny_vit()


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokendial", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call
