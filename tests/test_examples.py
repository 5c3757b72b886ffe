"""Every file of examples/ runs as it stands, offline, on the shipped model.

They run in this process, one after the other: importing torch anew takes longer than most of them.
The tests look at what an example prints: its lines are what a reader is promised.
"""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PRINTED = {
    "add_a_method.py": r"degree 1: tokens per layer \(65, .*\nfeature map.*\nloaded: EveryNth",
    "attach_to_a_depth_model.py": r"ViT is 78% of .*\n     0     1\.00x  1\.00x.*\n    24     1\.",
    "attach_to_a_language_model.py": r"encoder is 12% of .*degree 8: 95% .*prompt kept: True",
    "attach_to_a_pipeline.py": r"\n     0   1\.26        100%  1\.00x\n.*as before: True",
    "attach_to_feature_maps.py": r"     0   2\.24  16 x 20 .*\n    20   1\.3\d  16 x 20",
    "attach_to_open_clip.py": r"     0   1\.26   1\.000 .*\n    13   0\.74",
    "attach_to_sam.py": r"reduce must be FFNMerge for Sam.*\n   512   4\.16",
    "compensator.py": r"degree  plain  compensated\n     0 ",
    "dense_masks.py": r"degree 5: \d+% of the tokens in FFNs, IoU",
    "fine_tune_on_a_folder.py": r"epoch 3: accuracy.*\ndegree 0: .*1\.00x",
    "fit_a_schedule.py": r"merged per layer \[.*\nwrapped: degree 2 of \[0, 1, 2\]",
    "hugging_face_trainer.py": r"before: loss.*\nafter: loss",
    "serve_and_call.py": r"serving example_served on http://127.0.0.1:\d+",
    "several_adapters.py": r"cars: [\d,]+ trained parameters, logits \[2, 196\]",
    "speed_up_a_model.py": r"degree  MMACs  accuracy  speed\n     0 .* 1\.00x",
    "training_loop.py": r"degree 6: accuracy.*\nloaded: True",
}


def test_every_example_is_run_and_listed():
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files == PRINTED.keys()
    assert set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())) == files


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
# Trainer's own imports use what Python and torch have deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_example_prints_what_it_promises(name, tmp_path, monkeypatch, capsys):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) < 200
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(PRINTED[name], capsys.readouterr().out, flags=re.DOTALL)
