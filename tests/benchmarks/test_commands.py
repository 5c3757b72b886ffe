import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib.image
import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.speed import MEASURES

SPEED = {column.key for column in MEASURES} | {"ratio_low", "ratio_high", "seconds"}
GROWTH = {"time_growth", "mac_growth", "growth_quotient", "reducing_mib", "reducing_share"}
CASES = {
    "inference --methods tome,evit --degrees 3": SPEED | {"dtype", "mode", "batch", "degree"},
    "methods --methods dyt --degrees 5 --dtype bf16": SPEED,
    "methods --methods pitome,prune_merge --degrees 2": SPEED,
    "step": {"layer", "patches", "method", "ms", "of_tome"},
    "resolution --methods evit --cost 0.6": SPEED | GROWTH,
    "attach": SPEED | {"model", "tower"},
    "dar": SPEED,
    "input": {"workers", "data_wait", "images_per_s"},
    "dial": {"what", "ms", "slowest_ms", "share", "extra_macs"},
    "training --methods linear,adaptformer_fused --dtype bf16": {
        "trained_m",
        "step_s",
        "time",
        "memory_mib",
        "memory",
    },
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a command; returns its exit code and the folder of its results."""

    def call(line: str) -> tuple[int, Path]:
        arguments = [*line.split(), "--quick", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        return main(), tmp_path

    return call


@pytest.mark.parametrize("line", CASES)
def test_a_command_writes_its_three_files(run, line):
    code, folder = run(line)
    assert code == 0
    files = {path.suffix: path for path in folder.iterdir()}
    assert set(files) == {".json", ".md", ".png"}
    assert len({path.stem for path in files.values()}) == 1
    found = json.loads(files[".json"].read_text())
    assert found["command"].startswith(f"python -m benchmarks {line} --quick")
    assert {"hardware", "versions", "made"} <= found.keys()
    rows = found["rows"]
    assert all(CASES[line] <= row.keys() for row in rows)
    table = files[".md"].read_text().splitlines()
    assert sum(text.startswith("| ") for text in table) == len(rows) + 2
    assert matplotlib.image.imread(files[".png"]).std() > 0
    if CASES[line] >= SPEED:
        check_speeds(rows)


def check_speeds(rows: list[dict[str, float]]) -> None:
    assert (rows[0]["ratio"], rows[0]["mac_ratio"]) == (1.0, 1.0)
    assert any(row["mac_ratio"] > 1 for row in rows)
    for row in rows:
        assert row["efficiency"] == pytest.approx(row["ratio"] / row["mac_ratio"])
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["peak_mib"] > 0
        assert row["page_faults"] >= 0


def test_wrong_settings_are_told_in_one_line(run, capsys):
    for line, told in {
        "inference --methods tome,nothing": "methods must be some of tome, .*got nothing",
        "inference --dtype int4": "dtype must be some of fp32, bf16, fp16, got int4",
        "inference --methods evit --degrees 1,99": r"degrees of evit must lie in \[0, 9\], got 99",
        "step --methods dyt": "methods must be some of tome, .*, evit_shift, got dyt",
        "step --layers 13": r"layers must lie in \[1, 12\].* 13",
        "step --r 2": "r must leave 2 patch tokens for each of the layers, got -6",
    }.items():
        code, folder = run(line)
        assert code == 2
        assert re.search(told, capsys.readouterr().err.splitlines()[-1])
        assert not any(folder.iterdir())


def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    assert main() == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)
    assert all(find_spec(f"benchmarks.{name}") for name in COMMANDS)
