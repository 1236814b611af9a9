from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from jobguard.model import Ended, Outcome, Parent, Unknown, new_token
from jobguard.store.protocols import Void
from tests.contract.conftest import (
    ENDED_SUPERSEDED,
    NAMESPACE,
    SOURCE,
    Contract,
    InPostgres,
    delivery,
    refused,
    retry_of,
)
from tests.support import eventually

if TYPE_CHECKING:
    from tests.contract.conftest import Together


def test_the_same_id_while_the_first_waits(ledger: Contract) -> None:
    """A new delivery supersedes the unclaimed ones of its job id."""
    first = ledger.recorded()
    second = ledger.recorded()
    assert list(ledger.owed()) == [second.token]
    assert ledger.outcome(first.token) is Outcome.SUPERSEDED
    worker = ledger.working()
    assert refused(worker.claim(first.token)) == ENDED_SUPERSEDED
    assert worker.start(second.token).number == 1


def test_the_same_id_twice_in_one_call(ledger: Contract) -> None:
    """In one batch the last delivery of a job id is owed."""
    first, second = delivery(), delivery()
    ledger.record(first, second)
    assert list(ledger.owed()) == [second.token]
    assert ledger.outcome(first.token) is Outcome.SUPERSEDED


def test_a_claimed_delivery_is_not_superseded_by_its_id(ledger: Contract) -> None:
    """A running delivery stays owed beside a new delivery of its job id."""
    first = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(first.token)
    second = ledger.recorded()
    assert list(ledger.owed()) == [first.token, second.token]
    assert worker.end(claim) is Ended.ENDED


def test_a_fresh_delivery_supersedes_no_other(ledger: Contract) -> None:
    """A fresh delivery supersedes no other, because its job id was created for it."""
    first = ledger.recorded("a", fresh=True)
    second = ledger.recorded("b", fresh=True)
    assert list(ledger.owed()) == [first.token, second.token]


def test_counts_are_carried_through_supersession(ledger: Contract) -> None:
    """A new delivery of a job keeps the crashes and recoveries; its attempt is its own."""
    term, first = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(first.token)
    ledger.leader.declare_dead(term, [worker.id])
    ledger.leader.void(term, SOURCE, [Void(first.token, claim.number, charge=True, backoff=0)])
    ledger.leader.restored(term, SOURCE, [first.token])
    second = ledger.recorded()
    row = ledger.owed()[second.token]
    assert (row.crashes, row.recoveries, row.claims) == (1, 1, 0)
    ledger.leader.restored(term, SOURCE, [second.token])
    assert ledger.leader.restores(SOURCE, [second.token, new_token()]) == {second.token: 1}
    assert ledger.owed()[second.token].recoveries == 2


def test_a_retry_takes_the_place_of_its_parent(ledger: Contract) -> None:
    """A parent and its child are never both owed, and one of them always is."""
    parent = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(parent.token)
    child = retry_of(claim)
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert ledger.owed()[child.token].claim_number is None
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert refused(worker.claim(parent.token)) == ENDED_SUPERSEDED
    assert worker.end(claim, Outcome.FAILED) is Ended.LATE


def test_a_job_that_repeats_itself_completes_its_parent(ledger: Contract) -> None:
    """The new delivery reports the outcome of its parent."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = delivery(parent=Parent(claim.token, claim.number, Outcome.COMPLETED))
    assert ledger.record(child).refused == frozenset()
    assert ledger.outcome(parent.token) is Outcome.COMPLETED
    assert list(ledger.owed()) == [child.token]


def test_a_retry_carries_the_counts_of_its_parent(ledger: Contract) -> None:
    """A retry of the library keeps the crashes of its parent."""
    term, parent = ledger.elected(), ledger.recorded()
    dead, alive = ledger.working(), ledger.working()
    dead.start(parent.token)
    ledger.leader.declare_dead(term, [dead.id])
    claim = alive.start(parent.token)
    child = retry_of(claim)
    ledger.record(child)
    assert ledger.owed()[child.token].crashes == 1


def test_a_move_takes_the_place_of_an_unclaimed_parent(ledger: Contract) -> None:
    """A delay queue can move a delivery that no worker runs."""
    parent = ledger.recorded("a")
    child = delivery("b", parent=Parent(parent.token))
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]


def test_a_move_is_refused_while_the_parent_runs(ledger: Contract) -> None:
    """A move without a claim is refused while another worker runs the parent."""
    parent = ledger.recorded("a")
    worker = ledger.working()
    claim = worker.start(parent.token)
    child = delivery("b", parent=Parent(parent.token))
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [parent.token]
    assert worker.end(claim) is Ended.ENDED


def test_a_move_takes_the_place_of_a_parent_whose_worker_is_dead(ledger: Contract) -> None:
    """A move is accepted if the claim of the parent is not live."""
    parent = ledger.recorded("a")
    worker = ledger.working()
    worker.start(parent.token)
    worker.leave()
    child = delivery("b", parent=Parent(parent.token))
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]


def test_a_retry_in_the_name_of_another_claim_is_refused(ledger: Contract) -> None:
    """A retry with a stale claim does not touch the successor's run."""
    parent = ledger.recorded()
    zombie, successor = ledger.working(), ledger.working()
    stale = zombie.start(parent.token)
    zombie.leave()
    claim = successor.start(parent.token)
    child = retry_of(stale)
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [parent.token]
    assert isinstance(successor.claim(child.token), Unknown)
    assert successor.end(claim) is Ended.ENDED


def test_a_retry_in_the_name_of_a_voided_claim_is_refused(ledger: Contract) -> None:
    """A retry with a voided claim is refused, even if no other worker has claimed the delivery yet."""
    term, parent = ledger.elected(), ledger.recorded()
    zombie = ledger.working()
    stale = zombie.start(parent.token)
    ledger.leader.void(term, SOURCE, [Void(parent.token, stale.number, charge=True, backoff=0)])
    child = retry_of(stale)
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [parent.token]


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED])
def test_a_retry_of_an_ended_delivery_is_refused(ledger: Contract, outcome: Outcome) -> None:
    """A retry of an ended delivery is refused: the library's own recovery came too late."""
    parent = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(parent.token)
    worker.end(claim, outcome)
    child = retry_of(claim)
    assert ledger.record(child).refused == {child.token}
    assert ledger.owed() == {}


def test_a_cancelled_delivery_is_not_retried(ledger: Contract) -> None:
    """A retry of a cancelled delivery is refused, so its worker learns that it was cancelled."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    ledger.cancel(tokens=[parent.token])
    child = retry_of(claim)
    assert ledger.record(child).refused == {child.token}
    assert ledger.owed() == {}


def test_a_parent_has_one_child(ledger: Contract) -> None:
    """A second child of the same parent is refused."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    first, second = retry_of(claim), retry_of(claim)
    ledger.record(first)
    assert ledger.record(second).refused == {second.token}
    assert list(ledger.owed()) == [first.token]


@pytest.mark.parametrize("outcome", [Outcome.SUPERSEDED, Outcome.COMPLETED])
def test_a_retry_recorded_twice_is_taken_twice(ledger: Contract, outcome: Outcome) -> None:
    """A record of a retry that is sent again is accepted again."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = delivery(parent=Parent(claim.token, claim.number, outcome))
    assert ledger.record(child).refused == frozenset()
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]


def test_a_retry_whose_parent_is_unknown(ledger: Contract) -> None:
    """A retry is accepted before the record of its parent, which then is not owed when it arrives."""
    parent = delivery()
    child = delivery(parent=Parent(parent.token, claim=1), attempt=2)
    assert ledger.record(child).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert ledger.record(parent, replay=True).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert refused(ledger.working().claim(parent.token)) == ENDED_SUPERSEDED


def test_a_chain_in_one_call(ledger: Contract) -> None:
    """In one call with a delivery and its retry, the retry is owed."""
    parent = delivery()
    child = delivery(parent=Parent(parent.token))
    assert ledger.record(parent, child, replay=True).refused == frozenset()
    assert list(ledger.owed()) == [child.token]
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED


def test_a_refused_delivery_supersedes_nothing(ledger: Contract) -> None:
    """A refused delivery supersedes neither its parent nor another delivery of its job id."""
    ended = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(ended.token)
    worker.end(claim)
    waiting = ledger.recorded()
    child = retry_of(claim)
    assert ledger.record(child).refused == {child.token}
    assert list(ledger.owed()) == [waiting.token]


def test_a_refusal_does_not_stop_the_rest_of_its_call(ledger: Contract) -> None:
    """The answer names the refused deliveries; all others are owed."""
    gone = ledger.recorded()
    ledger.cancel(tokens=[gone.token])
    bad, good = delivery(parent=Parent(gone.token)), delivery("other")
    assert ledger.record(bad, good).refused == {bad.token}
    assert list(ledger.owed()) == [good.token]


def test_a_redelivered_parent_is_skipped(ledger: Contract) -> None:
    """A superseded delivery gets no claim when the library delivers it again."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = retry_of(claim)
    ledger.record(child)
    other = ledger.working()
    assert refused(other.claim(parent.token)) == ENDED_SUPERSEDED
    assert other.start(child.token).number == 1


def test_a_record_that_races_an_uncommitted_retry(
    ledger_in_postgres: Contract, together: Together
) -> None:
    """Of two retries of one delivery recorded at the same moment, one is accepted."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    children = [retry_of(claim), retry_of(claim)]
    with ledger.backend.commits_held_back() as waiting:
        answers = []
        for child in children:
            host = ledger.backend.host()
            record = partial(host.record, SOURCE, [child], namespace=NAMESPACE)
            answers.append(together.call(record))
            eventually(lambda: waiting() == len(answers))
    together.wait()
    assert [answer[0].refused for answer in answers] == [frozenset(), {children[1].token}]
    assert list(ledger.owed()) == [children[0].token]
