"""Predictions and exports of a run with a compensator."""

import csv
import io

import pytest
import torch

import tokendial as td
from tokendial.data.readers.images import read_image


@pytest.fixture(scope="module")
def compensator(run, tmp_path_factory):
    """A compensator that reaches two degrees, and changes answers."""
    plugin = td.Compensator.for_model(run.model(), td.ToCom(rank=2), steps=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter += 3 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("compensator")
    plugin.save_pretrained(folder)
    return folder


def compensated(run, folder, degree):
    """The run's model, which was trained at degree 2, with the compensator."""
    model = run.model()
    td.Compensator.from_pretrained(folder).attach(model, source=2)
    model.set_degree(degree)
    return model


def test_predictions_are_those_of_the_compensated_model(run, compensator, digits, cli):
    files = sorted(digits.glob("val/*/*.png"))[:20]
    arguments = ("predict", run.folder, *files, "--degree", 0)
    code, plain, err = cli(*arguments)
    assert (code, err) == (0, "")
    code, found, err = cli(*arguments, "--compensator", compensator)
    assert (code, err) == (0, "")
    assert found != plain
    model = compensated(run, compensator, 0)
    transform = run.task().image_transform(model.anatomy)
    with torch.no_grad():
        logits = model(torch.stack([transform(read_image(file)) for file in files]))
    given = [run.classes()[place] for place in logits.argmax(1).tolist()]
    assert [row["class"] for row in csv.DictReader(io.StringIO(found))] == given


@pytest.mark.filterwarnings("ignore")
def test_exports_hold_the_compensator(run, compensator, digits, cli, tmp_path):
    path = tmp_path / "model.pt2"
    arguments = ("export", run.folder, "--to", "pt2", "--degree", 0, "--out", path)
    code, printed, err = cli(*arguments, "--compensator", compensator)
    assert (code, err) == (0, "")
    assert "degree 0" in printed
    images = torch.randn(3, *run.model().anatomy.input_shape)
    with torch.no_grad():
        logits = torch.export.load(path).module()(images)
        torch.testing.assert_close(
            logits, compensated(run, compensator, 0)(images), atol=1e-4, rtol=1e-4
        )


def test_the_dial_ends_where_the_compensator_does(run, compensator):
    model = compensated(run, compensator, 0)
    assert model.degrees == (0, 1, 2)
    with pytest.raises(ValueError, match="compensator"):
        model.set_degree(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "RUN", "IMAGES", "--cascade"],
            "a cascade is calibrated without a compensator",
        ),
        (["export", "RUN", "--int8"], "leave out --to, --batch, --compensator, --em"),
        (["predict", "RUN", "IMAGES", "--degree", "3"], "degree"),
    ],
)
def test_what_a_compensator_cannot_be_combined_with_is_one_line(
    run, compensator, digits, cli, arguments, message
):
    places = {"RUN": run.folder, "IMAGES": digits / "val"}
    words = [places.get(word, word) for word in arguments]
    code, _, err = cli(*words, "--compensator", compensator)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
