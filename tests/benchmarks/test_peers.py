import sys

import pytest

from benchmarks.__main__ import main


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A package in the place of the authors', whose patch changes nothing."""
    folder = tmp_path / "checkout" / "tome" / "patch"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text("def timm(model):\n    model.r = 0\n")
    yield folder.parents[1]
    for name in ("tome", "tome.patch"):
        sys.modules.pop(name, None)


def run(monkeypatch, out, *options) -> int:
    arguments = ["peers", "--quick", "--out", str(out), *map(str, options)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return main()


def test_a_peer_that_gives_other_logits_is_not_compared(checkout, tmp_path, monkeypatch, capsys):
    code = run(monkeypatch, tmp_path, "--tome-checkout", checkout)
    assert code == 2
    assert "the authors' ToMe gives other logits than ours" in capsys.readouterr().err


def test_a_peer_that_gives_the_same_logits_is_compared(checkout, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, "--tome-checkout", checkout, "--r", 0) == 0
    told = capsys.readouterr().out
    assert "| authors' tome | eager |" in told
    assert "| transformers | eager |" in told
    assert "logits of the authors' ToMe and of ours differ by 0.0e+00" in told


def test_what_is_no_checkout_is_told(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, "--tome-checkout", tmp_path) == 2
    assert "tome_checkout must hold the folder tome/patch" in capsys.readouterr().err
