from __future__ import annotations

import math
import threading
from collections.abc import Callable
from uuid import uuid4

import pytest

from jobguard.errors import NotLeading
from jobguard.model import Cause, Outcome
from jobguard.reconciler.leader import Leadership
from jobguard.store.protocols import Closing, LeaderStore, QueueRow, Void
from tests.fakes.store import MemoryLedger
from tests.fakes.world import (
    SOURCE,
    Clock,
    delivery,
    events,
    leader_store,
    outage,
    source_row,
    token,
)
from tests.support import eventually

LEASE = 10.0


class Stage:
    """One lease, one clock, and reconcilers that want to lead."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.ledger = MemoryLedger(clock=self.clock.wall)

    def candidate(self, watched_for: float = math.inf) -> tuple[Leadership, LeaderStore]:
        """Start another process, which has watched the consumers for so long."""
        store, clock = leader_store(self.ledger), self.clock
        began = clock() - watched_for
        made = Leadership(store, lease=LEASE, clock=clock, watched_for=lambda: clock() - began)
        return made, store


def test_the_first_leads() -> None:
    """The process that asks first gets the term; the other one stands by."""
    stage = Stage()
    (first, _), (second, _) = stage.candidate(), stage.candidate()
    assert not first.leads

    first.seek()
    second.seek()

    assert first.leads
    assert first.term == 1
    assert not second.leads
    with pytest.raises(NotLeading):
        _ = second.term


def test_renewing_keeps_the_term() -> None:
    """A leader that renews in time keeps its term."""
    stage = Stage()
    (leader, _), (other, _) = stage.candidate(), stage.candidate()
    leader.seek()

    for _ in range(10):
        stage.clock.advance(LEASE * 0.3)
        leader.seek()
        other.seek()

    assert leader.term == 1
    assert not other.leads


def test_steps_down_before_the_lease_ends() -> None:
    """A leader that cannot renew stops leading before another process can be elected."""
    stage = Stage()
    (leader, _), (other, _) = stage.candidate(), stage.candidate()
    leader.seek()

    led_until = taken_at = None
    for _ in range(1200):
        stage.clock.advance(0.01)
        other.seek()
        if leader.leads:
            led_until = stage.clock()
        if other.leads and taken_at is None:
            taken_at = stage.clock()
        assert not (leader.leads and other.leads)

    assert led_until is not None
    assert taken_at is not None
    assert led_until < taken_at


def test_a_slow_answer_shortens_the_trust() -> None:
    """The lease is counted from before the request: a slow answer does not prolong it."""
    stage = Stage()
    leader, store = stage.candidate()
    elect = store.elect

    def slowly(*, lease: float, patience: float = 0.0) -> int | None:
        term = elect(lease=lease, patience=patience)
        stage.clock.advance(LEASE)
        return term

    store.elect = slowly  # type: ignore[method-assign]
    leader.seek()

    assert not leader.leads


def test_a_failed_renewal_leaves_it_in_office_until_its_trust_ends() -> None:
    """A short outage of Postgres costs no term; a longer one does."""
    stage = Stage()
    leader, _ = stage.candidate()
    leader.seek()
    stage.clock.advance(3)

    with outage(stage.ledger):
        leader.seek()
    assert leader.leads
    assert leader.term == 1
    leader.seek()

    with outage(stage.ledger):
        while leader.leads:
            stage.clock.advance(0.5)
            leader.seek()
    with pytest.raises(NotLeading):
        _ = leader.term


def test_an_outage_is_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A standby that asks often logs once that Postgres is away, and once that it is back."""
    caplog.set_level("INFO", logger="jobguard")
    stage = Stage()
    (standby, _) = stage.candidate()
    with outage(stage.ledger):
        for _ in range(200):
            standby.seek()
    standby.seek()
    standby.seek()

    assert events(caplog.records) == ["lease_unrenewed", "leader_elected", "postgres_back"]


def test_a_failed_election_leaves_a_standby() -> None:
    """A process that could not ask for the lease does not lead, and asks again."""
    stage = Stage()
    leader, _ = stage.candidate()

    with outage(stage.ledger):
        leader.seek()
    assert not leader.leads

    leader.seek()
    assert leader.leads


def test_a_late_leader_gets_a_new_term() -> None:
    """A lease that has ended is not renewed: the same process leads again in a new term."""
    stage = Stage()
    leader, _ = stage.candidate()
    leader.seek()
    stage.clock.advance(LEASE + 1)

    leader.seek()
    assert not leader.leads

    leader.seek()
    assert leader.term == 2


def test_resigning_lets_another_lead_at_once() -> None:
    """After SIGTERM the lease is free at once, and not only at its end."""
    stage = Stage()
    (leader, _), (other, _) = stage.candidate(), stage.candidate()
    leader.seek()

    leader.stop()
    other.seek()

    assert not leader.leads
    assert other.term == 2


def test_resigning_takes_nothing_from_a_successor() -> None:
    """A late leader that resigns does not end the term of its successor."""
    stage = Stage()
    (leader, _), (other, _) = stage.candidate(), stage.candidate()
    leader.seek()
    stage.clock.advance(LEASE + 1)
    other.seek()

    leader.stop()
    other.seek()

    assert other.term == 2


def test_resigning_while_postgres_is_away() -> None:
    """A leader that cannot resign stops leading in any case."""
    stage = Stage()
    leader, _ = stage.candidate()
    leader.seek()

    with outage(stage.ledger):
        leader.stop()

    assert not leader.leads


def test_a_stale_term_writes_nothing() -> None:
    """Every write of a leader whose term is over raises NotLeading and changes nothing."""
    stage = Stage()
    (leader, stale), (other, fresh) = stage.candidate(), stage.candidate()
    host = stage.ledger.host()
    host.register(source_row())
    job = delivery()
    host.record(SOURCE.id, [job], namespace="tests")
    leader.seek()
    term = leader.term
    incident = stale.open_incident(term, SOURCE.id, Cause.INCIDENT, "before", None)
    stage.clock.advance(LEASE + 1)
    other.seek()
    assert other.leads

    writes: list[Callable[[], object]] = [
        lambda: stale.renew(term, lease=LEASE),
        lambda: stale.signs(term),
        lambda: stale.acknowledge(term, SOURCE.id, (None, None), (uuid4(), 5), run_id="r"),
        lambda: stale.open_incident(term, SOURCE.id, Cause.INCIDENT, "", None),
        lambda: stale.progress(term, incident, missing=1, restored=1, close=True),
        lambda: stale.declare_dead(term, [token()]),
        lambda: stale.forget(term, [token()]),
        lambda: stale.suspect(term, SOURCE.id, [(job.token, Cause.INCIDENT, "")]),
        lambda: stale.clear(term, SOURCE.id, [job.token]),
        lambda: stale.restored(term, SOURCE.id, [job.token]),
        lambda: stale.void(term, SOURCE.id, [Void(job.token, 1, True, 0.0)]),
        lambda: stale.close_owed(term, SOURCE.id, [Closing(job.token, Outcome.DEAD)]),
        lambda: stale.trust(term, [QueueRow(SOURCE.id, "mail", trusted_since=0.0)]),
        lambda: stale.hold(term, SOURCE.id, "mail", "stale"),
    ]
    for write in writes:
        with pytest.raises(NotLeading):
            write()

    (owed,) = fresh.page(SOURCE.id, after=None, limit=9)
    assert (owed.suspected, owed.recoveries) == (None, 0)
    assert [(i.missing, i.restored) for i in fresh.incidents(SOURCE.id)] == [(0, 0)]
    assert fresh.queues(SOURCE.id) == []
    assert not fresh.signs(other.term).brake.held
    assert fresh.sources()[0].pulse_n is None


def test_kept_by_a_thread_until_stopped() -> None:
    """start() keeps the lease in a thread; stop() resigns and ends the thread."""
    ledger = MemoryLedger()
    leader = Leadership(leader_store(ledger), lease=LEASE)

    leader.start()
    assert leader.wait(timeout=60)
    assert leader.term == 1

    leader.stop()
    assert not leader.leads
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "jobguard-lease"])


def test_a_new_process_leaves_a_free_lease_to_the_standbys() -> None:
    """A process without a watch over the consumers, such as a new one, lets a standby go first."""
    stage = Stage()
    (leader, _), (standby, _), (new, store) = (stage.candidate(w) for w in (99, 99, 0))
    elect, answers = store.elect, []

    def counted(*, lease: float, patience: float = 0.0) -> int | None:
        answers.append(elect(lease=lease, patience=patience))
        return answers[-1]

    store.elect = counted  # type: ignore[method-assign]
    leader.seek()
    stage.clock.advance(LEASE + 0.1)
    new.start()
    try:
        eventually(lambda: len(answers) > 1)
        assert set(answers) == {None}
        standby.seek()
        assert standby.term == 2

        for _ in range(4):
            stage.clock.advance(LEASE / 2)
            standby.seek()
        standby.stop()  # The other one has a watch by now.
        eventually(lambda: new.leads)
    finally:
        new.stop()


def test_a_new_process_leads_where_nobody_stands_by() -> None:
    """After a moment a new process takes the lease that no standby took."""
    stage = Stage()
    (leader, _), (new, _) = stage.candidate(), stage.candidate(0)
    leader.seek()
    leader.stop()
    stage.clock.advance(0.2 * LEASE)
    new.start()
    try:
        eventually(lambda: new.leads)
    finally:
        new.stop()


def test_waiting_until_the_timeout() -> None:
    """wait() returns False when the time is over, and returns at once when stopped."""
    stage = Stage()
    (leader, _), (standby, _) = stage.candidate(), stage.candidate()
    leader.seek()

    assert not standby.wait(timeout=0)

    standby.stop()
    assert not standby.wait(timeout=60)


def test_the_thread_survives_an_unforeseen_error() -> None:
    """An unexpected error is logged, and the thread goes on to seek the lease."""
    ledger = MemoryLedger()
    store = leader_store(ledger)
    elect, failed = store.elect, threading.Event()

    def once(*, lease: float, patience: float = 0.0) -> int | None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("unforeseen")
        return elect(lease=lease, patience=patience)

    store.elect = once  # type: ignore[method-assign]
    leader = Leadership(store, lease=0.5)
    leader.start()
    try:
        assert leader.wait(timeout=60)
        assert failed.is_set()
    finally:
        leader.stop()
