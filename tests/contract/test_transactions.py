"""Deliveries that a transaction of the application recorded: one side pushes, the process or the leader."""

from __future__ import annotations

from uuid import UUID

from jobguard.model import Outcome, new_token
from tests.contract.conftest import SOURCE, Contract, delivery


def taken(ledger: Contract, *tokens: UUID) -> frozenset[UUID]:
    """Take the pushes of these."""
    return ledger.store.take_committed(SOURCE, tokens, deadline=5.0)


def test_a_committed_delivery_belongs_to_its_process_first(ledger: Contract) -> None:
    """Its process takes the push once; the leader inspects it only after the deadline of that push."""
    it = delivery("a", fresh=True)
    ledger.backend.commit([it])
    assert (ledger.owed(), ledger.watched()) == ({}, {})
    assert taken(ledger, it.token, new_token()) == {it.token}
    assert ledger.leader.see_committed(ledger.elected(), SOURCE, wait=1.0) == 0
    assert (ledger.owed(), ledger.watched()) == ({}, {})
    ledger.advance(5.1)
    assert set(ledger.owed()) == {it.token}
    assert not ledger.watched()[it.token].unsent
    assert taken(ledger, it.token) == frozenset()


def test_a_delivery_of_a_dead_process_is_the_leaders(ledger: Contract) -> None:
    """A leader that saw the commit pushes after a moment, and its process does not push any more."""
    it, late = delivery("a"), delivery("b")
    ledger.backend.commit([it, late])
    assert ledger.leader.see_committed(ledger.elected(), SOURCE, wait=1.0) == 2
    assert ledger.watched() == {}
    assert taken(ledger, late.token) == {late.token}
    ledger.advance(1.1)
    assert list(ledger.watched()) == [it.token]
    assert ledger.watched()[it.token].unsent
    assert taken(ledger, it.token) == frozenset()


def test_a_failed_push_is_the_leaders_at_once(ledger: Contract) -> None:
    """A taken delivery that could not be pushed goes to the leader without a wait."""
    it = delivery("a")
    ledger.backend.commit([it])
    taken(ledger, it.token)
    ledger.store.outbox(SOURCE, [it.token])
    ledger.advance(0.01)
    assert list(ledger.watched()) == [it.token]


def test_a_committed_delivery_is_not_withdrawn(ledger: Contract) -> None:
    """What the application has committed stays owed, whatever its push raised."""
    it = delivery("a")
    ledger.backend.commit([it])
    taken(ledger, it.token)
    ledger.store.withdraw(SOURCE, [it.token])
    ledger.advance(6)
    assert set(ledger.owed()) == {it.token}


def test_a_run_that_is_repeated_sends_nothing_twice(ledger: Contract) -> None:
    """A derived delivery that is owed or has ended is not recorded again by the next run."""
    owed, ended = delivery("a", derived=True), delivery("b", derived=True)
    ledger.backend.commit([owed, ended])
    assert taken(ledger, owed.token, ended.token) == {owed.token, ended.token}
    worker = ledger.working()
    worker.end(worker.start(ended.token))
    ledger.backend.commit([owed, ended])
    assert taken(ledger, ended.token) == frozenset()
    assert ledger.outcome(ended.token) is Outcome.COMPLETED


def test_the_older_deliveries_of_its_id_are_superseded_after_the_commit(ledger: Contract) -> None:
    """With one body per job id, a committed delivery supersedes the others, except for running ones."""
    ledger.recorded("other")
    old, running = ledger.recorded("a"), ledger.recorded("b")
    ledger.working().start(running.token)
    first, second, third = delivery("a"), delivery("b"), delivery("a")
    ledger.backend.commit([first, second])
    assert ledger.outcome(old.token) is None
    assert taken(ledger, first.token, second.token) == {first.token, second.token}
    assert ledger.outcome(old.token) is Outcome.SUPERSEDED
    assert ledger.outcome(running.token) is None
    ledger.backend.commit([third])
    assert ledger.leader.see_committed(ledger.elected(), SOURCE, wait=0.0) == 1
    assert ledger.outcome(first.token) is Outcome.SUPERSEDED
    assert ledger.outcome(third.token) is None
