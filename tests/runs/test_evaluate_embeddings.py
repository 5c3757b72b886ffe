"""`tokendial eval --images`: embeddings along the dial, beside those at degree 0."""

import csv

import pytest
import torch

import tokendial as td
from tokendial.data import read_image
from tokendial.measure import neighbour_overlap
from tokendial.runs.evaluate_embeddings import evaluate_embeddings, labels_by_folder
from tokendial.runs.model_source import ModelSource

SHIPPED = ModelSource(name="scenes_vit", weights="shipped")


@torch.no_grad()
def test_scores_compare_with_degree_0(digits):
    files = sorted(digits.glob("val/*/*.png"))
    labels = labels_by_folder(files)
    rows = evaluate_embeddings(SHIPPED, files, "4,8", labels=labels, reduce=td.ToMe(), batch_size=7)
    opened = SHIPPED.open(td.ToMe())
    inputs = torch.stack([opened.transform(read_image(file)) for file in files])
    found = {}
    for degree in (0, 4, 8):
        opened.model.set_degree(degree)
        found[degree] = opened.model.embeddings(inputs)
    for row in rows:
        mine, unreduced = found[row.degree], found[0]
        overlap = neighbour_overlap(mine, unreduced, neighbours=10)
        assert row.scores["same_neighbours"] == pytest.approx(float(overlap.mean()), abs=0.01)
        cosine = torch.cosine_similarity(mine, unreduced).mean()
        assert row.scores["cosine"] == pytest.approx(float(cosine), abs=1e-4)
        assert row.gmacs == opened.model.cost(row.degree).gmacs
    accuracy = [row.scores["neighbour_accuracy"] for row in rows]
    assert 0.5 < min(accuracy) <= max(accuracy) < 1  # four digits
    assert [row.degree for row in rows] == [4, 8]
    assert rows[1].scores["cosine"] < rows[0].scores["cosine"] < 1


def test_the_command_prints_and_writes_what_changes(cli, run, digits):
    code, printed, err = cli("eval", run.folder, "--images", digits / "val", "--degrees", "0,2,4")
    assert (code, err) == (0, "")
    assert "neighbour accuracy" in printed
    with (run.folder / "eval" / "embeddings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["degree"] for row in rows] == ["0", "2", "4"]
    assert (rows[0]["same_neighbours"], float(rows[0]["cosine"])) == ("1", pytest.approx(1))
    assert 0 < float(rows[2]["same_neighbours"]) < 1
    assert (run.folder / "eval" / "embeddings.png").stat().st_size > 1000
    # One folder is one class: there is no accuracy.
    one = ("--images", digits / "val" / "digit 1", "--degrees", "0,8", "--reduce", "tome")
    code, printed, _ = cli("eval", "scenes_vit", "--weights", "shipped", *one)
    assert (code, "neighbour accuracy" in printed, "same neighbours" in printed) == (0, False, True)
    assert "wrote" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reduce", "tome"], "reduce needs --images, got tome"),
        (["--images", "VAL", "--optimize"], "images is for one model"),
        (["--images", "/none"], "no such image or folder: /none"),
        (["--images", "VAL", "--degrees", "99"], "degrees must lie in"),
    ],
)
def test_mistakes_are_one_line_and_code_2(cli, run, digits, arguments, message):
    words = [digits / "val" if word == "VAL" else word for word in arguments]
    code, _, err = cli("eval", run.folder, *words)
    assert (code, err.startswith(f"error: {message}")) == (2, True), err
    assert len(err.splitlines()) == 1


def test_images_and_labels_that_do_not_fit_raise(digits, tmp_path):
    files = sorted(digits.glob("val/*/*.png"))[:4]
    with pytest.raises(ValueError, match="images must be at least 3, got 2"):
        evaluate_embeddings(SHIPPED, files[:2])
    with pytest.raises(ValueError, match="labels must be 4, one for each image, got 1"):
        evaluate_embeddings(SHIPPED, files, labels=["a"])
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(ValueError, match="is not an image"):
        evaluate_embeddings(SHIPPED, [*files, broken])
