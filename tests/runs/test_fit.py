"""`tokendial fit` on a real run."""

import json
import shutil

import pytest

import tokendial as td
from tokendial.runs import Run


@pytest.fixture
def fit(cli, run):
    def call(*arguments):
        return cli("fit", run.folder, "--minutes", "0.05", *arguments)

    return call


def test_a_fitted_run_is_a_run(fit, cli, run, digits, tmp_path):
    whole = run.model().cost(0).gmacs
    out = tmp_path / "fitted"
    code, printed, err = fit("--gmacs", f"{0.8 * whole},{0.6 * whole}", "--out", out)
    assert (code, err) == (0, "")
    assert "constant" in printed
    assert (out / "fit.png").stat().st_size > 1000
    told = json.loads((out / "fit.json").read_text())
    model = td.load(out)
    assert (model.degree, model.degrees) == (1, (0, 1, 2))
    assert model.reduce_config.r == [degree["found"]["removed"] for degree in told["degrees"]]
    code, printed, _ = cli("eval", out, "--degrees", "all")
    assert code == 0
    cells = [line.split()[1] for line in printed.splitlines() if line.startswith("│")]
    assert cells[:4] == [*"012", "digit"]  # the degrees; then the classes
    image = next(digits.glob("val/*/*.png"))
    code, printed, _ = cli("predict", out, image, "--degree", "2")
    assert (code, printed.count("digit")) == (0, 3)
    assert Run(out).recipe().reduce == model.reduce_config
    # A second fit may replace the first one, but no other files.
    assert fit("--gmacs", 0.7 * whole, "--out", out, "--reduce", "evit")[0] == 0
    assert isinstance(td.load(out).reduce_config, td.EViT)


def test_images_of_a_folder_replace_missing_training_images(cli, run, digits, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run.folder, moved)
    recipe = Run(moved).recipe_file
    recipe.write_text(recipe.read_text().replace(str(digits), str(tmp_path / "gone")))
    settings = ("--gmacs", 0.7 * run.model().cost(0).gmacs, "--minutes", "0.05")
    code, _, err = cli("fit", moved, *settings)
    assert code == 2
    assert err.startswith("error: ")
    assert err.endswith("Other images can be given by calibration.\n")
    assert cli("fit", moved, *settings, "--calibration", digits / "val", "--images", 30)[0] == 0
    assert td.load(moved / "fitted").degrees == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of speedup, latency_ms, gmacs"),
        (["--speedup", "fast"], "speedup must look like 2 or 1.5,2,3, got 'fast'"),
        (["--speedup", "-1"], "speedup must be above 0, got -1"),
        (["--speedup", "1000"], "speedup must lie in [1, "),
        (["--gmacs", "0.001", "--reduce", "dar"], "reduce must be ToMe or EViT"),
        (["--gmacs", "0.001", "--reduce", "best"], "reduce.name must be one of"),
        (["--gmacs", "0.001", "--calibration", "/none"], "calibration: no such folder: /none"),
        (["--gmacs", "0.001", "--out", "/proc"], "out: /proc exists and holds no fit"),
    ],
)
def test_mistakes_are_one_line_and_code_2(fit, arguments, message):
    code, _, err = fit(*arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1
