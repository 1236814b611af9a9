from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from jobguard.model import Cause, Outcome
from jobguard.store.protocols import QueueRow, SourceRow
from tests.contract.conftest import LONG, NAMESPACE, SOURCE, Contract

if TYPE_CHECKING:
    pass


def test_an_incident_stays_open_until_it_is_closed(ledger: Contract) -> None:
    """An open incident keeps its counts for the next leader."""
    term = ledger.elected()
    first = ledger.leader.open_incident(term, SOURCE, Cause.INCIDENT, "flushed", uuid4())
    second = ledger.leader.open_incident(term, SOURCE, Cause.TOPOLOGY, "failover", None)
    ledger.leader.progress(term, first, missing=3, restored=1, close=False)
    ledger.leader.progress(term, first, missing=1, restored=2, close=False)
    one, two = ledger.leader.incidents(SOURCE)
    assert (one.id, one.cause, one.detail) == (first, Cause.INCIDENT, "flushed")
    assert (one.missing, one.restored) == (4, 3)
    assert (two.id, two.cause, two.missing) == (second, Cause.TOPOLOGY, 0)
    assert ledger.leader.incidents(SOURCE + 1) == []
    ledger.leader.progress(term, first, missing=0, restored=1, close=True)
    assert [incident.id for incident in ledger.leader.incidents(SOURCE)] == [second]


def test_facts_about_a_queue_are_kept(ledger: Contract) -> None:
    """What is known about the consumers of a queue is stored."""
    term = ledger.elected()
    row = QueueRow(SOURCE, "default", 1000.0, 2000.0, ("rq:worker:old",), 3000.0)
    ledger.leader.trust(term, [row, QueueRow(SOURCE, "mail")])
    kept, other = ledger.leader.queues(SOURCE)
    assert (kept.queue, kept.trusted_since, kept.clean_since) == ("default", 1000.0, 2000.0)
    assert (list(kept.unguarded), kept.unguarded_at) == (["rq:worker:old"], 3000.0)
    assert (other.queue, other.trusted_since, list(other.unguarded)) == ("mail", None, [])
    ledger.leader.trust(term, [QueueRow(SOURCE, "default")])
    assert ledger.leader.queues(SOURCE)[0].trusted_since is None
    assert ledger.leader.queues(SOURCE + 1) == []


def test_old_history_is_dropped(ledger: Contract) -> None:
    """Ended deliveries are kept for the retention; owed ones are kept forever."""
    old, owed = ledger.recorded("a"), ledger.recorded("b")
    ledger.cancel(tokens=[old.token])
    ledger.leader.rotate(retention=7 * 86400)
    assert ledger.outcome(old.token) is Outcome.CANCELLED
    ledger.advance(9 * 86400)
    recent = ledger.recorded("c")
    ledger.cancel(tokens=[recent.token])
    ledger.leader.rotate(retention=7 * 86400)
    assert ledger.outcome(old.token) is None
    assert ledger.outcome(recent.token) is Outcome.CANCELLED
    assert list(ledger.owed()) == [owed.token]


def test_one_namespaces_retention_drops_nothing_of_anothers(ledger: Contract) -> None:
    """The retention of one namespace does not drop history that another one wants."""
    ledger.elected()
    ledger.leader.rotate(retention=30 * 86400)
    other = ledger.backend.leader("staging", uuid4())
    assert other.elect(lease=LONG) is not None
    it = ledger.recorded()
    ledger.cancel(tokens=[it.token])
    ledger.advance(9 * 86400)
    other.rotate(retention=3600)
    assert ledger.outcome(it.token) is Outcome.CANCELLED
    ledger.leader.rotate(retention=2 * 86400)
    other.rotate(retention=3600)
    assert ledger.outcome(it.token) is None


def test_a_namespace_without_a_retention_has_a_week(
    ledger: Contract,
) -> None:
    """A namespace without a set retention keeps history for seven days."""
    row = SourceRow(SOURCE, NAMESPACE, "rq", "localhost:6379/0", "", None, "fence=true")
    ledger.store.register(row)
    it = ledger.recorded()
    ledger.cancel(tokens=[it.token])
    ledger.advance(5 * 86400)
    ledger.backend.leader("staging", uuid4()).rotate(retention=3600)
    assert ledger.outcome(it.token) is Outcome.CANCELLED
    ledger.advance(5 * 86400)
    ledger.backend.leader("staging", uuid4()).rotate(retention=3600)
    assert ledger.outcome(it.token) is None


def test_a_vacuum_is_always_possible(ledger: Contract) -> None:
    """A vacuum with nothing to do names no table."""
    assert list(ledger.leader.vacuum()) == []


def test_a_store_can_be_closed_twice(ledger: Contract) -> None:
    """A second close does nothing."""
    for _ in range(2):
        ledger.store.close()
        ledger.leader.close()
