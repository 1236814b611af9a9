from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from jobguard.errors import NotLeading
from jobguard.model import Cause, Outcome, new_token
from jobguard.store.protocols import Closing, LeaderStore, QueueRow, SourceRow, Void
from tests.contract.conftest import LONG, NAMESPACE, SOURCE, Contract, Worker, delivery

if TYPE_CHECKING:
    from collections.abc import Callable


def test_one_leader_leads(ledger: Contract) -> None:
    """Only one leader has the lease until it ends; each election gives a later term."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    first = ledger.leader.elect(lease=10)
    assert first is not None
    assert other.elect(lease=10) is None
    ledger.advance(11)
    second = other.elect(lease=10)
    assert second is not None
    assert second > first
    with pytest.raises(NotLeading):
        ledger.leader.renew(first, lease=10)


def test_a_renewed_lease_lasts(ledger: Contract) -> None:
    """A renewal extends the lease."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    term = ledger.leader.elect(lease=10)
    assert term is not None
    ledger.advance(8)
    brake = ledger.leader.renew(term, lease=10)
    assert not brake.paused
    assert not brake.holds(SOURCE, "default")
    ledger.advance(8)
    assert other.elect(lease=10) is None


def test_a_resignation_frees_the_lease_at_once(ledger: Contract) -> None:
    """After a resignation another leader is elected at once."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    first = ledger.elected()
    ledger.leader.resign(first)
    assert not ledger.record(delivery()).leader_live
    second = other.elect(lease=LONG)
    assert second is not None
    assert second > first


def test_a_patient_process_leaves_a_lease_that_has_just_become_free_to_others(
    ledger: Contract,
) -> None:
    """A process may ask only for a lease that has been free for some seconds."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    term = ledger.leader.elect(lease=10, patience=5)  # There was no lease yet.
    assert term is not None
    ledger.advance(12)
    assert other.elect(lease=10, patience=5) is None
    ledger.advance(4)
    assert other.elect(lease=10, patience=5) is not None


def test_a_lost_answer_to_an_election_costs_no_lease(ledger: Contract) -> None:
    """A process that has the lease without knowing it is elected again."""
    other = ledger.backend.leader(NAMESPACE, uuid4())
    unknown = ledger.leader.elect(lease=10)
    assert other.elect(lease=10) is None
    term = ledger.leader.elect(lease=10)
    assert term is not None
    assert unknown is not None
    assert term > unknown
    ledger.leader.renew(term, lease=10)


def test_an_old_leader_does_not_resign_for_the_new_one(ledger: Contract) -> None:
    """An old leader cannot resign the term of the new one."""
    old_term = ledger.elected()
    ledger.leader.resign(old_term)
    new_leader = ledger.backend.leader(NAMESPACE, uuid4())
    term = new_leader.elect(lease=LONG)
    assert term is not None
    with contextlib.suppress(NotLeading):
        ledger.leader.resign(old_term)
    assert ledger.record(delivery()).leader_live
    new_leader.renew(term, lease=LONG)


def test_namespaces_are_led_apart(ledger: Contract) -> None:
    """Two namespaces have two leaders."""
    ledger.elected()
    assert ledger.backend.leader("others", uuid4()).elect(lease=LONG) is not None


_TOKEN = new_token()


_WORKER = uuid4()


_WRITES: dict[str, Callable[[LeaderStore, int], object]] = {
    "renew": lambda leader, term: leader.renew(term, lease=LONG),
    "signs": lambda leader, term: leader.signs(term),
    "acknowledge": lambda leader, term: leader.acknowledge(
        term, SOURCE, (None, None), (uuid4(), 9), run_id=None
    ),
    "open_incident": lambda leader, term: leader.open_incident(
        term, SOURCE, Cause.INCIDENT, "flushed", None
    ),
    "progress": lambda leader, term: leader.progress(term, 1, missing=1, restored=1, close=True),
    "declare_dead": lambda leader, term: leader.declare_dead(term, [_WORKER]),
    "forget": lambda leader, term: leader.forget(term, [_WORKER]),
    "suspect": lambda leader, term: leader.suspect(term, SOURCE, [(_TOKEN, Cause.TOPOLOGY, "")]),
    "clear": lambda leader, term: leader.clear(term, SOURCE, [_TOKEN]),
    "restored": lambda leader, term: leader.restored(term, SOURCE, [_TOKEN]),
    "void": lambda leader, term: leader.void(
        term, SOURCE, [Void(_TOKEN, 1, charge=True, backoff=0)]
    ),
    "close_owed": lambda leader, term: leader.close_owed(
        term, SOURCE, [Closing(_TOKEN, Outcome.DEAD)]
    ),
    "trust": lambda leader, term: leader.trust(term, [QueueRow(SOURCE, "default", 1.0)]),
    "count_up": lambda leader, term: leader.count_up(term, seconds=60),
    "hold": lambda leader, term: leader.hold(term, SOURCE, "default", "too many"),
}


@pytest.mark.parametrize("write", _WRITES)
def test_a_leader_of_an_older_term_changes_nothing(ledger: Contract, write: str) -> None:
    """Every write with an older term is refused and changes nothing."""
    ledger.store.register(SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, ""))
    ledger.record(delivery(token=_TOKEN), outbox=True)
    worker = Worker(ledger, id=_WORKER)
    worker.start(_TOKEN)
    worker.leave()
    old_term = ledger.elected()
    incident = ledger.leader.open_incident(old_term, SOURCE, Cause.TOPOLOGY, "", None)
    assert incident == 1
    ledger.leader.suspect(old_term, SOURCE, [(_TOKEN, Cause.EVICTION, "seen")])
    ledger.leader.resign(old_term)
    new_leader = ledger.backend.leader(NAMESPACE, uuid4())
    term = new_leader.elect(lease=LONG)
    assert term is not None
    with pytest.raises(NotLeading):
        _WRITES[write](ledger.leader, old_term)
    (source,) = new_leader.sources()
    assert source.pulse_n is None
    assert [(i.id, i.missing) for i in new_leader.incidents(SOURCE)] == [(incident, 0)]
    assert [(w.id, w.dead) for w in new_leader.workers(SOURCE)] == [(_WORKER, False)]
    row = ledger.watched()[_TOKEN]
    assert (row.suspected, row.suspected_mark) == (Cause.EVICTION, "seen")
    assert (row.claim_number, row.crashes, row.recoveries) == (1, 0, 0)
    assert new_leader.queues(SOURCE) == []
    assert not new_leader.renew(term, lease=LONG).holds(SOURCE, "default")


def test_a_leader_that_never_led_changes_nothing(ledger: Contract) -> None:
    """A leader without a term cannot write."""
    with pytest.raises(NotLeading):
        ledger.leader.hold(1, SOURCE, "default", "too many")


def test_a_held_queue_is_held_by_the_next_leader_too(ledger: Contract) -> None:
    """A hold is stored with the lease, so the next leader has it too."""
    term = ledger.elected()
    ledger.leader.hold(term, SOURCE, "default", "101 unexplained")
    brake = ledger.leader.renew(term, lease=LONG)
    assert brake.holds(SOURCE, "default")
    assert not brake.holds(SOURCE, "mail")
    assert brake.held[f"{SOURCE}/default"]["reason"] == "101 unexplained"
    assert ledger.leader.signs(term).brake == brake
    ledger.leader.resign(term)
    other = ledger.backend.leader(NAMESPACE, uuid4())
    next_term = other.elect(lease=LONG)
    assert next_term is not None
    assert other.renew(next_term, lease=LONG).holds(SOURCE, "default")
