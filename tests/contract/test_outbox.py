from __future__ import annotations

from typing import TYPE_CHECKING

from jobguard.model import Cause, Ended, Parent, Unknown, new_token
from jobguard.store.protocols import Void
from tests.contract.conftest import SOURCE, Contract, delivery

if TYPE_CHECKING:
    pass


def test_a_push_can_be_left_to_the_leader_with_the_record(ledger: Contract) -> None:
    """A delivery that is recorded for the outbox is watched until its push is cleared."""
    it, plain = delivery("a"), delivery("b")
    ledger.record(it, outbox=True)
    ledger.record(plain)
    assert list(ledger.watched()) == [it.token]
    assert ledger.watched()[it.token].suspected is Cause.PUSH
    ledger.leader.clear(ledger.elected(), SOURCE, [it.token])
    assert ledger.watched() == {}
    assert set(ledger.owed()) == {it.token, plain.token}


def test_a_fresh_delivery_can_go_to_the_outbox(ledger: Contract) -> None:
    """A fresh delivery can go to the outbox too."""
    it = delivery(fresh=True)
    ledger.record(it, outbox=True)
    assert list(ledger.watched()) == [it.token]


def test_a_push_can_be_left_to_the_leader_afterwards(ledger: Contract) -> None:
    """A push that failed after its record can go to the outbox; an unknown token is ignored."""
    it = ledger.recorded()
    for _ in range(2):
        ledger.store.outbox(SOURCE, [it.token, new_token()])
    assert list(ledger.watched()) == [it.token]


def test_a_refused_delivery_is_not_put_into_the_outbox(ledger: Contract) -> None:
    """A refused delivery does not go to the outbox."""
    gone = ledger.recorded()
    ledger.cancel(tokens=[gone.token])
    child = delivery(parent=Parent(gone.token))
    assert ledger.record(child, outbox=True).refused == {child.token}
    assert ledger.watched() == {}


def test_an_unpushed_delivery_can_be_withdrawn(ledger: Contract) -> None:
    """A withdrawn delivery leaves no tombstone."""
    it = delivery()
    ledger.record(it, outbox=True)
    ledger.store.withdraw(SOURCE, [it.token])
    assert (ledger.owed(), ledger.watched()) == ({}, {})
    assert ledger.outcome(it.token) is None
    assert isinstance(ledger.working().claim(it.token), Unknown)


def test_a_claimed_delivery_is_not_withdrawn(ledger: Contract) -> None:
    """A claimed delivery is not withdrawn, because the claim proves that it was pushed."""
    it = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.store.withdraw(SOURCE, [it.token])
    assert worker.end(claim) is Ended.ENDED


def test_a_delivery_that_was_started_is_not_withdrawn(ledger: Contract) -> None:
    """A delivery whose claim was voided is not withdrawn, because a worker had it."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.leader.declare_dead(term, [worker.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    ledger.store.withdraw(SOURCE, [it.token])
    assert it.token in ledger.owed()
