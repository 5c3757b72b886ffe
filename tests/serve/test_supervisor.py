"""Replacing processes: how soon, and how often; without any."""

import threading
import time
from types import SimpleNamespace

import pytest

from tokendial.serve.scheduling.scheduler import RequestRefusedError
from tokendial.serve.workers.model_process import ModelProcess
from tokendial.serve.workers.supervisor import Supervisor


class Process(ModelProcess):
    """Is in no trouble until it is told so."""

    def __init__(self) -> None:
        self.why: str | None = None
        self.killed = 0

    def wait(self) -> None:
        pass

    def trouble(self) -> str | None:
        return self.why

    @property
    def still_s(self) -> float:
        return 0.0

    def kill(self) -> int | None:
        self.killed += 1
        return -9


class Forks(SimpleNamespace):
    """Counts what it forks."""

    def __init__(self, lives: bool = True) -> None:
        super().__init__(facts=None, alive=True, made=[], closed=0)
        self.lives = lives

    def wait(self) -> None:
        pass

    def fork(self) -> Process:
        self.made.append(Process())
        if not self.lives and len(self.made) > 1:
            self.made[-1].why = "has ended"
        return self.made[-1]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def supervised():
    made = []

    def make(forks: Forks, *, spare: bool = False) -> Supervisor:
        made.append(Supervisor(lambda: forks, lambda: forks, spare=spare))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not [t for t in threading.enumerate() if t.name == "tokendial-watch"]


def within(seconds: float, happened) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_spare_process_takes_the_place_at_once(supervised):
    forks = Forks()
    supervisor = supervised(forks, spare=True)
    within(10, lambda: len(forks.made) == 2)
    within(10, lambda: supervisor._spare is forks.made[1])
    supervisor.lost(forks.made[0])
    assert supervisor.process() is forks.made[1]
    within(10, lambda: len(forks.made) == 3 and forks.made[0].killed)


def test_processes_that_die_at_once_are_started_less_and_less_often(supervised):
    forks = Forks(lives=False)
    supervisor = supervised(forks)
    forks.made[0].why = "has ended"
    within(10, lambda: supervisor.missing_s and supervisor._losses > 4)
    with pytest.raises(RequestRefusedError, match="another one is being started") as refused:
        supervisor.process()
    assert refused.value.reason == "lost"
    time.sleep(1.5)  # the first wait is a second, the next two
    assert len(forks.made) <= 7


def test_the_end_leaves_nothing_behind(supervised):
    forks = Forks()
    supervised(forks, spare=True).close()
    assert forks.closed
    assert all(process.killed for process in forks.made)
