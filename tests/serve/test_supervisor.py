"""Replacing model processes: how soon, and how often. Without processes, and with a clock by hand.

A watcher thread looks at the processes; tests wait until it has looked, and never for some time.
"""

import socket
import threading
from types import SimpleNamespace

import pytest
from serving import until

from tokendial.serve.scheduling.engine import WorkerLostError
from tokendial.serve.scheduling.requests import RequestRefusedError
from tokendial.serve.workers.model_process import ModelProcess
from tokendial.serve.workers.supervisor import Supervisor


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Process(ModelProcess):
    """Works until a test says why it does not."""

    def __init__(self, number: int, runtime: str | None) -> None:
        self.number, self.asked = number, runtime
        self.why: str | None = None
        self.silent_s, self.killed = 0.0, 0
        self.loses_batches = False

    def wait(self) -> None:
        self.runtime = self.asked or f"chosen by {self.number}"

    def run(self, name: str, degree: int, images: list[int], limit_s: float | None = None):
        if self.loses_batches:
            raise WorkerLostError("it has ended.")
        return [self.number for _ in images]

    def failure(self) -> str | None:
        return self.why

    @property
    def silence_s(self) -> float:
        return self.silent_s

    def kill(self) -> int | None:
        self.killed += 1
        return -9


class Forks(SimpleNamespace):
    """A fork server that counts its forks and how often the watcher has looked at it."""

    def __init__(self, lives: bool = True) -> None:
        super().__init__(catalog=None, made=[], closed=0, looks=0)
        self.lives = lives

    @property
    def alive(self) -> bool:
        self.looks += 1
        return True

    def wait(self) -> None:
        pass

    def fork(self, runtime: str | None = None) -> Process:
        process = Process(len(self.made), runtime)
        if not self.lives and self.made:
            process.why = "has ended"
        self.made.append(process)
        return process

    def close(self) -> None:
        self.closed += 1

    def wait_for_looks(self, count: int = 4) -> None:
        last = self.looks + count
        until(lambda: self.looks >= last)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def supervise(clock):
    made = []

    def make(forks: Forks, *, spare: bool = False) -> Supervisor:
        made.append(Supervisor(lambda: forks, lambda: forks, clock=clock))
        if spare:
            made[-1].keep_spare()
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not [t for t in threading.enumerate() if t.name == "tokendial-watch"]


def test_a_spare_process_replaces_a_lost_one_at_once(supervise):
    forks = Forks()
    supervisor = supervise(forks, spare=True)
    until(lambda: len(forks.made) == 2)
    until(lambda: supervisor._spare is forks.made[1])
    forks.made[0].loses_batches = True
    with pytest.raises(WorkerLostError):
        supervisor.run("pets", 0, [1])
    assert supervisor.run("pets", 0, [1, 2]) == [1, 1]
    until(lambda: len(forks.made) == 3 and forks.made[0].killed)


def test_processes_compute_in_the_runtime_that_the_first_one_chose(supervise):
    """To choose again would take the cores of a server that answers."""
    forks = Forks()
    supervisor = supervise(forks, spare=True)
    until(lambda: supervisor._spare)
    forks.made[0].why = "has ended"
    until(lambda: len(forks.made) == 3)
    assert [process.asked for process in forks.made] == [None, *["chosen by 0"] * 2]
    others = Forks()
    supervisor.replace_processes(lambda: others, *supervisor.start_processes(lambda: others))
    until(lambda: len(others.made) == 2)
    assert [process.asked for process in others.made] == [None, "chosen by 0"]


def test_a_spare_process_starts_when_it_is_asked_for(supervise):
    forks = Forks()
    supervisor = supervise(forks)
    forks.wait_for_looks()
    assert len(forks.made) == 1
    supervisor.keep_spare()
    until(lambda: len(forks.made) == 2)


def test_pauses_grow_between_processes_that_die_at_once(supervise, clock):
    """Four losses are replaced at once; then pauses of 1, 2, ... seconds of the clock follow.

    It would fail if the pause were missing (the number of forks would grow while the clock stands
    still), or did not grow.
    """
    forks = Forks(lives=False)
    supervisor = supervise(forks)
    forks.made[0].why = "has ended"
    until(lambda: supervisor._losses == 5)
    forks.wait_for_looks()
    assert len(forks.made) == 5
    with pytest.raises(RequestRefusedError, match="another one is being started") as refused:
        supervisor.run("pets", 0, [1])
    assert refused.value.reason == "lost"
    for pause in (1.0, 2.0, 4.0):
        losses = supervisor._losses
        clock.now += 0.9 * pause
        forks.wait_for_looks()
        assert supervisor._losses == losses
        clock.now += 0.2 * pause
        until(lambda before=losses: supervisor._losses == before + 1)
        forks.wait_for_looks()
        assert supervisor._losses == losses + 1
    clock.now += 0.5
    assert supervisor.missing_s == pytest.approx(0.5)


def test_a_process_without_heartbeats_counts_as_missing_before_it_is_given_up(supervise):
    forks = Forks()
    supervisor = supervise(forks)
    for silent_s, missing_s in ((0.0, 0.0), (0.3, 0.0), (0.5, 0.5)):
        forks.made[0].silent_s = silent_s
        assert supervisor.missing_s == missing_s


def test_silence_is_counted_in_checks_and_ended_by_a_heartbeat():
    ours, theirs = socket.socketpair()
    with theirs:
        process = ModelProcess(SimpleNamespace(wait_for_exit=lambda pid: None), 0, None, ours, None)
        process._ready = True
        for _ in range(3):
            theirs.send(b".")
            assert process.failure() is None
            for check in range(1, 21):
                assert process.failure() is None
                assert process.silence_s == pytest.approx(0.05 * check)
        assert process.failure() == "stands still"
    assert process.failure() == "has ended"
    ours.close()


def test_closing_ends_all_processes(supervise):
    forks = Forks()
    supervise(forks, spare=True).close()
    assert forks.closed
    assert all(process.killed for process in forks.made)
