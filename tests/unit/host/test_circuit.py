from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest

from jobguard.errors import BadRow, BreakerOpen, NotMigrated, StoreUnavailable
from jobguard.host.circuit import Circuit
from tests.fakes.world import Clock

RETRY = 1.0


class Stage:
    """A circuit, and a Postgres that answers or does not."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.calls = 0
        self.probes = 0
        self.changes: list[bool] = []
        self.chance = 1.0
        self.standing: Callable[[], bool] = lambda: True
        self.circuit = Circuit(
            self._probe,
            retry_interval=RETRY,
            on_change=self.changes.append,
            clock=self.clock,
            chance=lambda: self.chance,
        )

    def _probe(self) -> bool:
        self.probes += 1
        return self.standing()

    def call(self, error: Exception | None = None) -> None:
        """Make a call that succeeds, or fails like this."""
        with self.circuit.calling():
            self.calls += 1
            if error is not None:
                raise error

    def fail(self) -> None:
        """Let a call fail, so that the circuit opens."""
        with pytest.raises(StoreUnavailable):
            self.call(StoreUnavailable())


def away() -> bool:
    """Answer as a Postgres that refuses connections."""
    raise StoreUnavailable


def test_opens_at_the_first_failure() -> None:
    """One call that Postgres did not answer is enough, and its error comes through as it was."""
    stage = Stage()
    error = NotMigrated()

    with pytest.raises(NotMigrated) as raised:
        stage.call(error)

    assert raised.value is error
    assert not stage.circuit.closed
    assert stage.changes == [False]


@pytest.mark.parametrize("error", [BadRow("bad"), ValueError("a bug"), KeyError("another")])
def test_stays_closed_for_what_is_not_postgres_absence(error: Exception) -> None:
    """Bad data and our own mistakes never open it, however many."""
    stage = Stage()

    for _ in range(20):
        with pytest.raises(type(error)):
            stage.call(error)

    assert stage.circuit.closed
    assert stage.changes == []


def test_the_last_failure_says_why() -> None:
    """Of a call, and later of a look."""
    stage = Stage()
    with pytest.raises(StoreUnavailable):
        stage.call(StoreUnavailable("no connection left"))
    assert stage.circuit.why == "no connection left"

    def refused() -> bool:
        raise StoreUnavailable("refused")

    stage.standing = refused
    stage.circuit.check()
    assert stage.circuit.why == "refused"


def test_no_call_while_open() -> None:
    """While it is open, calls fail at once and are not made; Postgres is looked for once an interval."""
    stage = Stage()
    stage.standing = away
    stage.fail()

    for _ in range(100):
        with pytest.raises(BreakerOpen):
            stage.call()

    assert (stage.calls, stage.probes) == (1, 1)


def test_a_hiccup_is_over_at_once() -> None:
    """After one slow call of a Postgres that stands, the very next call goes through."""
    stage = Stage()
    stage.fail()

    stage.call()

    assert stage.changes == [False, True]


def test_a_postgres_that_lets_one_in_and_does_not_answer_is_given_time() -> None:
    """It costs its one wait an interval, not one with every call."""
    stage = Stage()
    stage.fail()
    stage.fail()

    for _ in range(20):
        with pytest.raises(BreakerOpen):
            stage.call()

    assert (stage.calls, stage.probes) == (2, 1)
    stage.clock.advance(RETRY)
    stage.call()


def test_threads_that_fail_together_are_one_outage() -> None:
    """The second of two calls that were under way does not put the first look off."""
    stage = Stage()
    with pytest.raises(StoreUnavailable), stage.circuit.calling():
        stage.fail()
        raise StoreUnavailable

    stage.call()

    assert stage.circuit.closed


def looks(stage: Stage, seconds: float) -> list[float]:
    """Let calls come all the time, for so long; return when Postgres was looked for."""
    began, found = stage.clock(), []
    while stage.clock() - began < seconds:
        before = stage.probes
        with pytest.raises(BreakerOpen):
            stage.call()
        if stage.probes > before:
            found.append(stage.clock() - began)
        stage.clock.advance(RETRY / 10)
    return found


def test_looks_more_and_more_seldom() -> None:
    """The pause doubles while Postgres stays away, up to eight intervals."""
    stage = Stage()
    stage.standing = away
    stage.fail()

    found = looks(stage, 40 * RETRY)

    pauses = [round(later - sooner) for sooner, later in pairwise(found)]
    assert pauses[:3] == [1, 2, 4]
    assert set(pauses[3:]) == {8}
    assert stage.calls == 1


def test_processes_do_not_look_in_step() -> None:
    """A part of each pause is left to chance, half of it at least is not."""
    stages = [Stage() for _ in range(3)]
    for stage, chance in zip(stages, (0.0, 0.5, 1.0), strict=True):
        stage.chance = chance
        stage.standing = away
        stage.fail()

    firsts = [looks(stage, 3 * RETRY)[1] for stage in stages]

    assert firsts[0] < firsts[1] < firsts[2]
    assert firsts[0] >= RETRY / 2


def test_one_that_lets_us_in_and_never_answers_is_left_alone_as_well() -> None:
    """Its connections stand at each look, its calls fail: the pause grows all the same."""
    stage = Stage()
    for _ in range(5):
        stage.fail()
        while not stage.circuit.check():
            stage.clock.advance(RETRY / 10)
    began = stage.clock()
    stage.fail()
    while not stage.circuit.check():
        stage.clock.advance(RETRY / 10)

    assert stage.clock() - began >= 7 * RETRY


def test_a_process_that_ends_looks_once_more() -> None:
    """It does not wait for the end of a pause that is longer than its life."""
    stage = Stage()
    stage.standing = away
    stage.fail()
    looks(stage, 20 * RETRY)
    stage.standing = lambda: True
    assert not stage.circuit.check()

    stage.circuit.beat_now()

    assert stage.circuit.check()


def test_begins_anew_after_a_time_without_failures() -> None:
    """An outage long ago makes the next one's first looks no later."""
    stage = Stage()
    stage.standing = away
    stage.fail()
    looks(stage, 20 * RETRY)
    stage.standing = lambda: True
    while not stage.circuit.check():
        stage.clock.advance(RETRY)
    stage.clock.advance(100 * RETRY)

    stage.fail()
    stage.standing = away
    assert looks(stage, 3 * RETRY)[:2] == pytest.approx([0.0, RETRY], abs=RETRY / 5)


def test_closes_when_the_probe_stands() -> None:
    """When the look shows that Postgres answers, the very call that looked goes through."""
    stage = Stage()
    stage.fail()
    stage.clock.advance(RETRY)

    stage.call()

    assert stage.circuit.closed
    assert stage.calls == 2
    assert stage.changes == [False, True]


def test_a_probe_under_way_is_carried_on_by_the_next() -> None:
    """A connection that is not there yet keeps it open, and whoever comes by carries it on at once."""
    stage = Stage()
    steps = iter([False, False, True])
    stage.standing = lambda: next(steps)
    stage.fail()
    stage.clock.advance(RETRY)

    for _ in range(2):
        with pytest.raises(BreakerOpen):
            stage.call()
    stage.call()

    assert stage.probes == 3
    assert stage.circuit.closed


def test_one_looks_and_the_others_do_not_wait() -> None:
    """While one thread's look is under way, others are turned away at once."""
    stage = Stage()
    looking, go_on = threading.Event(), threading.Event()

    def slowly() -> bool:
        looking.set()
        return go_on.wait(10)

    stage.standing = slowly
    stage.fail()
    stage.clock.advance(RETRY)
    first = threading.Thread(target=stage.call)
    first.start()
    try:
        assert looking.wait(10)
        for _ in range(10):
            with pytest.raises(BreakerOpen):
                stage.call()
        assert stage.probes == 1
    finally:
        go_on.set()
        first.join(10)
    assert stage.circuit.closed
    assert stage.calls == 2


def test_a_look_that_fails_by_our_own_mistake_lets_the_next_look() -> None:
    """An unforeseen error of the probe is raised, and blocks no later look."""
    stage = Stage()
    stage.fail()
    stage.clock.advance(RETRY)

    def broken() -> bool:
        raise RuntimeError("a bug")

    stage.standing = broken
    with pytest.raises(RuntimeError):
        stage.circuit.check()

    stage.standing = lambda: True
    assert stage.circuit.check()


def test_an_answer_to_somebody_else_closes_it() -> None:
    """A worker's beat, which no breaker holds back, closes it; twice is once."""
    stage = Stage()
    stage.fail()

    stage.circuit.answered()
    stage.circuit.answered()

    assert stage.circuit.closed
    assert stage.changes == [False, True]


def test_opens_again() -> None:
    """A closed circuit that fails again opens again at the first failure."""
    stage = Stage()
    for _ in range(3):
        stage.fail()
        stage.clock.advance(RETRY)
        stage.call()

    assert stage.changes == [False, True] * 3


def test_a_child_begins_as_its_parent_left_off() -> None:
    """The circuit of a forked child is open where the parent's was, and closed where it was."""
    parent, child, other = Stage(), Stage(), Stage()
    other.circuit.copy_state(parent.circuit)
    assert other.circuit.closed

    parent.fail()
    child.circuit.copy_state(parent.circuit)

    assert not child.circuit.closed
    child.call()  # its life may be short: it looks at once, and Postgres is back for it
    assert child.circuit.closed
    assert not parent.circuit.closed


def test_an_outage_is_announced_once() -> None:
    """Calls that were all under way when Postgres went away make one change of state."""
    stage = Stage()

    with pytest.raises(StoreUnavailable), stage.circuit.calling():
        with pytest.raises(StoreUnavailable), stage.circuit.calling():
            raise StoreUnavailable
        raise StoreUnavailable

    assert stage.changes == [False]
