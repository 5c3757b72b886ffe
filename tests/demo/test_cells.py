"""The solar-cell demo on a fake ELPV folder and a tiny model: what it writes, and what it says."""

import csv
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from layouts import write_elpv
from safetensors.torch import save_file

from tokendial.demo import cells as demo
from tokendial.demo import cells_scores, run_cells_demo
from tokendial.runs import evaluate

TINY = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
TINY_MODEL = {"name": "vit_tiny_patch16_224", "img_size": 64, "args": TINY}
LINES = [
    f"images/cell{number:04}.png  {('0.0', '0.3333', '0.6667', '1.0')[number % 4]}  {kind}"
    for number, kind in enumerate(["mono", "poly"] * 40)
]


def pictures() -> np.ndarray:
    """80 grey pictures [80, 64, 64, 3]: dark in the middle where the grade says defective."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(120, 200, (80, 64, 64, 1), dtype=np.uint8).repeat(3, axis=3)
    for number, picture in enumerate(drawn):
        if number % 4 >= 2:
            picture[16:48, 16:48] = 10
    return drawn


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished demo."""
    out = tmp_path_factory.mktemp("demo")
    (out / "weights").mkdir()
    torch.manual_seed(0)
    backbone = timm.create_model(TINY_MODEL["name"], img_size=64, num_classes=0, **TINY)
    weights = out / "weights" / "dinov2_small.safetensors"
    save_file(backbone.state_dict(), weights)
    write_elpv(out / "data" / "elpv", pictures(), LINES)
    small = (
        f"model={json.dumps(TINY_MODEL | {'weights': str(weights)})}",
        "data.check=false",
        "reduce.r=1",
        "adapt={name: dense_adapter, dim: 4, start: 3, interval: 2}",
        "train.epochs=6",
        "train.workers=0",
        "train.lr=0.01",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_TIMING_SECONDS", 0.0)
        report = run_cells_demo(out, small)
    assert report == out / "report.html"
    return out


def words_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def test_the_report_is_one_page_that_loads_nothing(finished):
    page = (finished / "report.html").read_text()
    assert page.count("<img") >= 5
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert (finished / "run" / "best" / "model.safetensors").exists()
    assert (finished / "compensator" / "best" / "model.safetensors").exists()
