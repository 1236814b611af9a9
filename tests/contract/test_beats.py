from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from jobguard.model import Beat, Claim
from tests.contract.conftest import NAMESPACE, SOURCE, Contract

if TYPE_CHECKING:
    pass


def test_a_beat_makes_a_worker_known(ledger: Contract) -> None:
    """A beat stores the worker, its unflushed reports and the pulse that it sees."""
    worker, pulse = ledger.worker(host="here"), (uuid4(), 5)
    beat = Beat(
        worker=worker.id,
        counter=1,
        claims=[],
        name="rq.1",
        host="here",
        pid=42,
        queues=["default", "mail"],
        unflushed_since=1_700_000_000.0,
        pulse=pulse,
    )
    reply = ledger.store.beat(SOURCE, beat, namespace=NAMESPACE)
    assert (reply.dead, reply.leader_live) == (False, False)
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.id, row.name, row.host, row.pid, row.beat) == (worker.id, "rq.1", "here", 42, 1)
    assert list(row.queues) == ["default", "mail"]
    assert (row.unflushed_since, row.pulse) == (1_700_000_000.0, pulse)
    assert (row.left, row.dead, row.claims) == (False, False, 0)


def test_a_later_beat_replaces_the_one_before(ledger: Contract) -> None:
    """A later beat replaces the counter, the unflushed time and the queues."""
    worker = ledger.worker()
    worker.beat(unflushed_since=1_700_000_000.0, queues=["mail"])
    worker.beat(queues=["bulk", "mail"])
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.beat, row.unflushed_since) == (2, None)
    assert list(row.queues) == ["bulk", "mail"]


def test_a_late_beat_changes_nothing(ledger: Contract) -> None:
    """A beat that arrives after a later one changes nothing, because its list is old."""
    it, worker = ledger.recorded(), ledger.working()
    claim = worker.claim(it.token)
    worker.beat()
    worker.beats = 0
    assert not worker.beat(claims=set()).dead
    (row,) = ledger.leader.workers(SOURCE)
    assert row.beat == 2
    assert ledger.leader.listed(SOURCE, [it.token]) == (frozenset([it.token]), False)
    assert claim == Claim(it.token, 1)
    assert ledger.owed()[it.token].claim_live


def test_beats_of_a_worker_and_its_beat_process_have_one_order(ledger: Contract) -> None:
    """A beat of the beat process that arrives after the worker's next beat changes nothing."""
    it, worker = ledger.recorded(), ledger.working()
    step = 1 << 20
    for count, claims in ((step, set()), (step + 1, set()), (2 * step, {it.token})):
        worker.beats = count - 1
        worker.beat(claims=claims)
    worker.beats = step + 1
    worker.beat(claims=set())
    (row,) = ledger.leader.workers(SOURCE)
    assert row.beat == 2 * step
    assert ledger.leader.listed(SOURCE, [it.token]) == (frozenset([it.token]), False)


def test_a_beat_reports_whether_a_leader_leads(ledger: Contract) -> None:
    """The answer to a beat shows whether a leader leads."""
    worker = ledger.worker()
    assert not worker.beat().leader_live
    ledger.elected()
    assert worker.beat().leader_live


def test_a_worker_that_was_declared_dead_learns_it_by_its_beat(ledger: Contract) -> None:
    """A dead worker's beat is ignored, so its claims stay void."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    ledger.leader.declare_dead(term, [worker.id])
    assert worker.beat().dead
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.beat, row.dead) == (1, True)
    assert not ledger.owed()[it.token].claim_live


def test_a_regular_exit_is_final(ledger: Contract) -> None:
    """A beat that arrives after the regular exit does not bring the worker back."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    worker.leave()
    worker.beat()
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.left, row.claims) == (True, 1)
    assert not ledger.owed()[it.token].claim_live


def test_a_death_that_is_reported_voids_the_claims(ledger: Contract) -> None:
    """The row keeps the claims of that moment, and beats of the dead worker are ignored."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    ledger.store.report_death(worker.id)
    assert worker.beat().dead
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.dead, row.left, row.claims) == (True, False, 1)
    assert not ledger.owed()[it.token].claim_live


def test_the_death_of_a_worker_that_has_left_changes_nothing(ledger: Contract) -> None:
    """A worker that exited regularly is not dead, and an unknown one gets no row."""
    worker = ledger.working()
    worker.leave()
    ledger.store.report_death(worker.id)
    ledger.store.report_death(uuid4())
    (row,) = ledger.leader.workers(SOURCE)
    assert (row.dead, row.left) == (False, True)


def test_the_exit_of_an_unknown_worker_does_nothing(ledger: Contract) -> None:
    """The exit of a worker that never beat does nothing."""
    ledger.store.leave(uuid4())
    assert ledger.leader.workers(SOURCE) == []


def test_a_worker_is_forgotten_once_it_is_gone_without_claims(ledger: Contract) -> None:
    """A gone worker is forgotten after 15 minutes without claims; a live one is not."""
    term, it = ledger.elected(), ledger.recorded()
    alive, left, dead, holding = (ledger.working() for _ in range(4))
    claim = holding.start(it.token)
    for worker in (left, holding):
        worker.leave()
    ledger.leader.declare_dead(term, [dead.id])
    everyone = [worker.id for worker in (alive, left, dead, holding)]
    ledger.leader.forget(term, everyone)
    assert len(ledger.leader.workers(SOURCE)) == 4  # the library's registry still lists them
    ledger.advance(1000)
    alive.beat()
    ledger.leader.forget(term, everyone)
    assert {row.id: row.claims for row in ledger.leader.workers(SOURCE)} == {
        alive.id: 0,
        holding.id: 1,
    }
    holding.end(claim)
    ledger.leader.forget(term, everyone)
    assert [row.id for row in ledger.leader.workers(SOURCE)] == [alive.id]
