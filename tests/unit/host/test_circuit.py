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
    """A circuit, and a Postgres that answers or does not answer."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.calls = 0
        self.probes = 0
        self.changes: list[bool] = []
        self.chance = 1.0
        self.probe_answer: Callable[[], bool] = lambda: True
        self.circuit = Circuit(
            self._probe,
            retry_interval=RETRY,
            on_change=self.changes.append,
            clock=self.clock,
            chance=lambda: self.chance,
        )

    def _probe(self) -> bool:
        self.probes += 1
        return self.probe_answer()

    def call(self, error: Exception | None = None) -> None:
        """Make a call that succeeds, or fails with this error."""
        with self.circuit.calling():
            self.calls += 1
            if error is not None:
                raise error

    def fail(self) -> None:
        """Let a call fail, so that the circuit opens."""
        with pytest.raises(StoreUnavailable):
            self.call(StoreUnavailable())


def away() -> bool:
    """Refuse the connection."""
    raise StoreUnavailable


def test_opens_at_the_first_failure() -> None:
    """One unanswered call opens the circuit, and its error is raised unchanged."""
    stage = Stage()
    error = NotMigrated()

    with pytest.raises(NotMigrated) as raised:
        stage.call(error)

    assert raised.value is error
    assert not stage.circuit.closed
    assert stage.changes == [False]


@pytest.mark.parametrize("error", [BadRow("bad"), ValueError("a bug"), KeyError("another")])
def test_stays_closed_for_what_is_not_postgres_absence(error: Exception) -> None:
    """Bad data and errors of jobguard never open the circuit, however many they are."""
    stage = Stage()

    for _ in range(20):
        with pytest.raises(type(error)):
            stage.call(error)

    assert stage.circuit.closed
    assert stage.changes == []


def test_the_last_failure_says_why() -> None:
    """The circuit keeps the text of the last failure, of a call and later of a check."""
    stage = Stage()
    with pytest.raises(StoreUnavailable):
        stage.call(StoreUnavailable("no connection left"))
    assert stage.circuit.why == "no connection left"

    def refused() -> bool:
        raise StoreUnavailable("refused")

    stage.probe_answer = refused
    stage.circuit.check()
    assert stage.circuit.why == "refused"


def test_no_call_while_open() -> None:
    """While it is open, calls fail at once without a call, and Postgres is checked once per interval."""
    stage = Stage()
    stage.probe_answer = away
    stage.fail()

    for _ in range(100):
        with pytest.raises(BreakerOpen):
            stage.call()

    assert (stage.calls, stage.probes) == (1, 1)


def test_a_hiccup_is_over_at_once() -> None:
    """After one slow call of a healthy Postgres, the next call is made."""
    stage = Stage()
    stage.fail()

    stage.call()

    assert stage.changes == [False, True]


def test_a_postgres_that_lets_one_in_and_does_not_answer_is_given_time() -> None:
    """A Postgres that accepts connections but does not answer costs one wait per interval, not per call."""
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
    """The second of two concurrent failed calls does not delay the first check."""
    stage = Stage()
    with pytest.raises(StoreUnavailable), stage.circuit.calling():
        stage.fail()
        raise StoreUnavailable

    stage.call()

    assert stage.circuit.closed


def checks(stage: Stage, seconds: float) -> list[float]:
    """Make calls continuously for this long; return the times of the checks."""
    began, found = stage.clock(), []
    while stage.clock() - began < seconds:
        before = stage.probes
        with pytest.raises(BreakerOpen):
            stage.call()
        if stage.probes > before:
            found.append(stage.clock() - began)
        stage.clock.advance(RETRY / 10)
    return found


def test_checks_more_and_more_seldom() -> None:
    """The pause doubles while Postgres stays away, up to eight intervals."""
    stage = Stage()
    stage.probe_answer = away
    stage.fail()

    found = checks(stage, 40 * RETRY)

    pauses = [round(later - sooner) for sooner, later in pairwise(found)]
    assert pauses[:3] == [1, 2, 4]
    assert set(pauses[3:]) == {8}
    assert stage.calls == 1


def test_processes_do_not_check_in_step() -> None:
    """Half of each pause is fixed at least, and the rest is random."""
    stages = [Stage() for _ in range(3)]
    for stage, chance in zip(stages, (0.0, 0.5, 1.0), strict=True):
        stage.chance = chance
        stage.probe_answer = away
        stage.fail()

    firsts = [checks(stage, 3 * RETRY)[1] for stage in stages]

    assert firsts[0] < firsts[1] < firsts[2]
    assert firsts[0] >= RETRY / 2


def test_one_that_lets_us_in_and_never_answers_is_left_alone_as_well() -> None:
    """The pause also grows if connections succeed at each check but calls fail."""
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


def test_a_process_that_ends_checks_once_more() -> None:
    """A process that ends checks once more, without waiting for the end of the pause."""
    stage = Stage()
    stage.probe_answer = away
    stage.fail()
    checks(stage, 20 * RETRY)
    stage.probe_answer = lambda: True
    assert not stage.circuit.check()

    stage.circuit.end_pause()

    assert stage.circuit.check()


def test_starts_again_after_a_time_without_failures() -> None:
    """After a long time without failures, the first checks of a new outage come as early as ever."""
    stage = Stage()
    stage.probe_answer = away
    stage.fail()
    checks(stage, 20 * RETRY)
    stage.probe_answer = lambda: True
    while not stage.circuit.check():
        stage.clock.advance(RETRY)
    stage.clock.advance(100 * RETRY)

    stage.fail()
    stage.probe_answer = away
    assert checks(stage, 3 * RETRY)[:2] == pytest.approx([0.0, RETRY], abs=RETRY / 5)


def test_closes_when_the_probe_stands() -> None:
    """When the check shows that Postgres answers, the call that checked is made."""
    stage = Stage()
    stage.fail()
    stage.clock.advance(RETRY)

    stage.call()

    assert stage.circuit.closed
    assert stage.calls == 2
    assert stage.changes == [False, True]


def test_a_probe_under_way_is_carried_on_by_the_next() -> None:
    """An incomplete connection keeps the circuit open, and the next caller advances it at once."""
    stage = Stage()
    steps = iter([False, False, True])
    stage.probe_answer = lambda: next(steps)
    stage.fail()
    stage.clock.advance(RETRY)

    for _ in range(2):
        with pytest.raises(BreakerOpen):
            stage.call()
    stage.call()

    assert stage.probes == 3
    assert stage.circuit.closed


def test_one_checks_and_the_others_do_not_wait() -> None:
    """While one thread checks, other calls fail at once."""
    stage = Stage()
    checking, go_on = threading.Event(), threading.Event()

    def slowly() -> bool:
        checking.set()
        return go_on.wait(10)

    stage.probe_answer = slowly
    stage.fail()
    stage.clock.advance(RETRY)
    first = threading.Thread(target=stage.call)
    first.start()
    try:
        assert checking.wait(10)
        for _ in range(10):
            with pytest.raises(BreakerOpen):
                stage.call()
        assert stage.probes == 1
    finally:
        go_on.set()
        first.join(10)
    assert stage.circuit.closed
    assert stage.calls == 2


def test_a_check_that_fails_unexpectedly_allows_the_next_check() -> None:
    """An unexpected error of the probe is raised, and blocks no later check."""
    stage = Stage()
    stage.fail()
    stage.clock.advance(RETRY)

    def broken() -> bool:
        raise RuntimeError("a bug")

    stage.probe_answer = broken
    with pytest.raises(RuntimeError):
        stage.circuit.check()

    stage.probe_answer = lambda: True
    assert stage.circuit.check()


def test_an_answer_to_another_caller_closes_it() -> None:
    """A worker's beat that Postgres received closes the circuit; a second one changes nothing."""
    stage = Stage()
    stage.fail()

    stage.circuit.answered()
    stage.circuit.answered()

    assert stage.circuit.closed
    assert stage.changes == [False, True]


def test_opens_again() -> None:
    """A closed circuit opens again at the first failure."""
    stage = Stage()
    for _ in range(3):
        stage.fail()
        stage.clock.advance(RETRY)
        stage.call()

    assert stage.changes == [False, True] * 3


def test_a_child_begins_as_its_parent_left_off() -> None:
    """The circuit of a forked child is open if the parent's was open, and closed if it was closed."""
    parent, child, other = Stage(), Stage(), Stage()
    other.circuit.copy_state(parent.circuit)
    assert other.circuit.closed

    parent.fail()
    child.circuit.copy_state(parent.circuit)

    assert not child.circuit.closed
    child.call()  # its life may be short: it checks at once, and Postgres is back
    assert child.circuit.closed
    assert not parent.circuit.closed


def test_an_outage_is_announced_once() -> None:
    """Calls that were all under way when Postgres went away cause one change of state."""
    stage = Stage()

    with pytest.raises(StoreUnavailable), stage.circuit.calling():
        with pytest.raises(StoreUnavailable), stage.circuit.calling():
            raise StoreUnavailable
        raise StoreUnavailable

    assert stage.changes == [False]
