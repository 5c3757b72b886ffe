"""The papers' tables, through the command line, on the real models."""

import csv

import pytest
from typer.testing import CliRunner

from tokendial.cli import app
from tokendial.reproduce import agreement, read_tables


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce")
    done = CliRunner().invoke(app, ["reproduce", "cost", "--out", str(out)])
    assert done.exit_code == 0, done.output
    with (out / "cost.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return done.output, rows, (out / "cost.md").read_text().splitlines()


def values(rows):
    """Name, verdict, paper's value, formula's value and kind, of every value of every row."""
    for known, row in zip(read_tables(), rows, strict=True):
        name = f"{row['paper']} {row['table']} {row['row']}"
        for kind, key in (("params", "params_m"), ("cost", "gflops")):
            verdict = known[f"{kind if kind == 'params' else 'gflops'}_verdict"]
            yield name, verdict, known[key], known[f"{key}_computed"], kind, row


def test_every_row_is_there(printed):
    output, rows, markdown = printed
    assert len(rows) == len(markdown) - 2 == 141
    assert "68 of the 68 that should agree do" in output


def test_values_that_should_agree_do_and_exact_ones_to_the_last_digit(printed):
    checked = 0
    for name, verdict, paper, _, kind, row in values(printed[1]):
        ours = row[kind]
        if verdict in ("exact", "within 2%"):
            checked += 1
            assert float(row[f"{kind}_difference"]) == pytest.approx(float(ours) - paper)
            allowed = ("exact",) if verdict == "exact" else ("exact", "within 2%")
            assert agreement(paper, float(ours)) in allowed, name
    assert checked == 144


def test_the_real_models_equal_the_formulas(printed):
    for name, _, _, formula, kind, row in values(printed[1]):
        ours = row[kind]
        assert (formula is None) == (ours == ""), name
        if formula is not None:
            # Some numbers of tokens are rounded differently, by at most one token.
            assert float(ours) == pytest.approx(formula, rel=0.005, abs=1e-4), name


def test_rows_that_the_paper_contradicts_are_printed_with_their_note(printed):
    output, rows, markdown = printed
    contradicted = [r for r in rows if r["verdict"] == "inconsistent in the paper"]
    assert len(contradicted) > 10
    text = " ".join(output.split())
    for row in contradicted:
        assert f"{row['row']}: inconsistent in the paper. {row['note'][:30]}" in text
        assert any(row["note"] in line for line in markdown)


@pytest.mark.parametrize(
    ("paper", "ours", "said"),
    [
        (17.58, 17.5820, "exact"),
        (0.2, 0.2043, "exact"),
        (0.2, 0.2058, "+2.9%"),
        (106.2, 105.86, "within 2%"),
        (10.78, 9.856, "-8.6%"),
        (None, 1.0, ""),
        (1.0, None, ""),
    ],
)
def test_agreement(paper, ours, said):
    assert agreement(paper, ours) == said
