"""What a server measures when it starts, and the objective that it starts with."""

from types import SimpleNamespace

import pytest
from serving import InProcessSupervisor

from tokendial.runtimes import Runtime
from tokendial.serve import starting
from tokendial.serve.settings import check_settings
from tokendial.serve.starting import choose_objective, start_engine
from tokendial.serve.workers import served_runs


@pytest.fixture
def supervisor(monkeypatch):
    """Two models; the second one takes 104 ms at degree 0, and less at the others."""

    def batch_seconds(supervisor: object, name: str, degree: int, images: int) -> float:
        return (0.104 if name == "slow" else 0.02) * images / (1 + degree)

    monkeypatch.setattr(starting, "_batch_seconds", batch_seconds)
    return SimpleNamespace(catalog=SimpleNamespace(names=("quick", "slow")))


@pytest.mark.parametrize(
    ("given", "chosen"),
    [({}, 312.0), ({"degree": 3}, 100.0), ({"slo_ms": 400.0}, 400.0), ({"slo_ms": 312.0}, 312.0)],
)
def test_an_objective_that_was_not_set_fits_the_slowest_model(supervisor, given, chosen, caplog):
    assert choose_objective(supervisor, check_settings(given), (0, 1, 2, 3)).slo_ms == chosen
    assert not caplog.text


def test_a_too_short_objective_is_kept_with_a_warning(supervisor, caplog):
    settings = choose_objective(supervisor, check_settings({"slo_ms": 50.0}), (0, 1, 2, 3))
    assert settings.slo_ms == 50
    assert [record.getMessage() for record in caplog.records] == [
        "slo_ms: 50 ms is short: one image takes 104.0 ms at degree 0 here, so 312 ms or more is "
        "advised."
    ]


def test_no_spare_process_starts_while_batches_are_timed(pets, monkeypatch):
    """It would take the cores that the times are of, so they would be too long."""
    happened = []

    class Supervisor(InProcessSupervisor):
        def run(self, *batch, **limit):
            happened.append("batch")
            return super().run(*batch, **limit)

        def keep_spare(self):
            happened.append("spare")

    monkeypatch.setattr(served_runs, "Supervisor", Supervisor)
    fixed = {"runtime": Runtime("auto"), "max_batch": 2, "slo_ms": 2000.0}
    for wanted, spares in ((True, ["spare"]), (False, [])):
        happened.clear()
        settings = check_settings(fixed | {"spare": wanted})
        start_engine({"pets": pets.folder}, settings)[0].close()
        assert happened[: happened.count("batch")] == ["batch"] * happened.count("batch")
        assert happened[happened.count("batch") :] == spares
        assert len(happened) > 4
