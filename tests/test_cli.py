"""The command line in a process of its own: exit codes, signals, errors in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tokendial
from tokendial.runs import Run

# The demo with few images, so that it starts at once, and with many epochs, so that it is long.
LONG = [
    "train",
    "demo",
    "model.weights=null",
    "data.train_size=200",
    "data.val_size=10",
    "train.epochs=500",
    "train.checkpoint_every=1",
]


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own."""
    source = str(Path(tokendial.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-m", "tokendial.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": source, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_stops_a_run_cleanly(tmp_path, number):
    run = Run(tmp_path / "run")
    process = start(*LONG, f"output={run.folder}", "train.workers=2")
    deadline = time.monotonic() + 120
    while not list(run.checkpoints.glob("update-*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "stopped; the same command continues from here\n"


# Sends Ctrl-C when a module is first imported.
INTERRUPTED = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[-1]:
            sys.argv.pop()
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from tokendial.cli import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "torch", "tokendial.data.sets.scenes"])
def test_an_early_ctrl_c_is_one_line_and_code_130(tmp_path, module):
    command = [sys.executable, "-c", INTERRUPTED, *LONG, f"output={tmp_path / 'run'}", module]
    source = str(Path(tokendial.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": source, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "stopped\n")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_for_the_output_is_one_line_and_code_2():
    source = str(Path(tokendial.__file__).parent.parent)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tokendial.cli", "--version"],
            env=os.environ | {"PYTHONPATH": source},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_a_truncated_file_is_an_error_and_no_abort(cli, monkeypatch):
    def ends_early():
        raise EOFError("Ran out of input")

    monkeypatch.setattr("tokendial.runs.recipe_file.list_recipes", ends_early)
    assert cli("recipes") == (2, "", "error: Ran out of input\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo", "output=/proc/none/run"], "No such file or directory: '/proc/none'"),
        (["train", "demo", "output=FILE"], "File exists: "),
    ],
)
def test_a_folder_that_cannot_be_made_is_one_line_and_code_2(tmp_path, cli, arguments, message):
    (tmp_path / "file").write_text("in the way")
    arguments = [text.replace("FILE", str(tmp_path / "file")) for text in arguments]
    small = ("model.weights=null", "data.train_size=50", "data.val_size=10")
    code, _, err = cli(*arguments, *small)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_pretrained_weights_without_the_hub_are_one_line_and_code_2(tmp_path):
    process = start(
        "train", "demo", "model={name: vit_tiny_patch16_224, img_size: 48}", "data.train_size=50",
        f"output={tmp_path / 'run'}",
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? See tokendial --help."),
        (["train"], "Missing argument 'RECIPE'. See tokendial train --help."),
        (["demo", "--fulll"], "No such option: --fulll (Possible options: --full). See tokend"),
        (
            ["demo", "--task", "cats"],
            "'--task': 'cats' is not one of 'counting', 'masks', 'cells'.",
        ),
        (["eval", "run", "--batch-size", "0"], "'--batch-size': Input should be greater than or"),
        (["eval", "run", "--batch-size", "0"], "equal to 1, got '0'. See tokendial eval --help."),
        (["data", "chek"], "No such command 'chek'. Did you mean 'check'? See tokendial data --h"),
    ],
)
def test_a_mistyped_command_is_one_line_and_code_2(cli, arguments, message):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_no_arguments_give_the_help(cli):
    code, out, err = cli("data")
    assert code == 2
    assert "Usage: tokendial data" in out + err
