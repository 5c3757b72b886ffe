"""The comparison of a converted model with its file, on a tiny model."""

import numpy as np
import pytest
import yaml
from exported_dinov2 import BACKBONE, DECODER, Saliency, export
from PIL import Image

from tools import check_real_model


@pytest.fixture
def arguments(tmp_path):
    export(tmp_path / "saliency.onnx", Saliency(padding=1))
    content = {
        "model": {"name": BACKBONE.name, "args": BACKBONE.args},
        "reduce": {"name": "tome", "r": 4},
        "adapt": {"name": "linear"},
        "decode": {"name": "upconv", "channels": list(DECODER.channels)},
        "data": {"name": "pairs", "root": "nowhere"},
        "train": {"degree": 0},
    }
    (tmp_path / "focus.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    for name in ("first.png", "second.jpg", "notes.txt"):
        (tmp_path / "photos" / name).write_text("no image")
        if not name.endswith("txt"):
            Image.fromarray(noise).save(tmp_path / "photos" / name)
    names = ("saliency.onnx", "photos", "--recipe", "focus.yaml")
    parts = [n if n.startswith("-") else str(tmp_path / n) for n in names]
    return [*parts, "--sizes", "24", "32x20", "--degrees", "0", "4"]


def test_an_equal_model_passes_at_every_size(arguments, capsys):
    assert check_real_model.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "24: largest difference on 2 photographs" in printed
    assert "32x20: degree 0, 100% of the cost, overlap 1.000" in printed
    assert printed.endswith(": equal\n")


def test_a_small_difference_fails(arguments, capsys, monkeypatch):
    equal = check_real_model.mask
    monkeypatch.setattr(check_real_model, "mask", lambda *given: equal(*given) + 3e-4)
    assert check_real_model.main(arguments) == 1
    assert capsys.readouterr().out.endswith("NOT equal\n")
