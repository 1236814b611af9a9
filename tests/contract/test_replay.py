from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from jobguard.model import Claim, Ended, Outcome, Parent, Refusal, token_at
from tests.contract.conftest import (
    ENDED_COMPLETED,
    ENDED_SUPERSEDED,
    SOURCE,
    Contract,
    delivery,
    refused,
    retry_of,
)

if TYPE_CHECKING:
    pass


def test_a_replay_of_an_ended_delivery_is_not_owed(ledger: Contract) -> None:
    """A replayed record of an ended delivery is not owed."""
    it = delivery()
    worker = ledger.working()
    assert worker.end(Claim(it.token, 0)) is Ended.UNKNOWN
    assert ledger.record(it, replay=True).refused == frozenset()
    assert ledger.owed() == {}
    assert refused(worker.claim(it.token)) == ENDED_COMPLETED


def test_a_delivery_that_ended_before_its_record_supersedes_its_parent(
    ledger: Contract,
) -> None:
    """A delivery that ended before its record supersedes its parent when the record arrives."""
    parent = ledger.recorded()
    child = delivery(parent=Parent(parent.token))
    worker = ledger.working()
    assert worker.end(Claim(child.token, 0)) is Ended.UNKNOWN
    ledger.record(child, replay=True)
    assert ledger.owed() == {}
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert ledger.outcome(child.token) is Outcome.COMPLETED
    ledger.record(parent, replay=True)
    assert ledger.owed() == {}


def test_a_delivery_that_ended_before_its_record_keeps_out_a_later_parent(
    ledger: Contract,
) -> None:
    """A parent that is recorded last, from another spool, is not owed."""
    parent = delivery(fresh=True)
    child = delivery(parent=Parent(parent.token))
    ledger.working().end(Claim(child.token, 0))
    ledger.record(child, replay=True)
    ledger.record(parent, replay=True)
    assert ledger.owed() == {}


@pytest.mark.parametrize("first", ["the end", "the parent"])
def test_an_end_without_a_record_supersedes_older_deliveries(ledger: Contract, first: str) -> None:
    """A retry that was never recorded supersedes the older delivery by its end, early or late."""
    parent, child = delivery(fresh=True), delivery()
    worker = ledger.working()
    if first == "the parent":
        ledger.record(parent, replay=True)
    worker.end(Claim(child.token, 0), job_id="j")
    if first == "the end":
        ledger.record(parent, replay=True)

    assert ledger.owed() == {}
    assert ledger.outcome(parent.token) is Outcome.SUPERSEDED
    assert ledger.outcome(child.token) is Outcome.COMPLETED
    assert refused(worker.claim(parent.token)) == ENDED_SUPERSEDED


def test_a_retry_whose_worker_has_a_slower_clock_is_owed(ledger: Contract) -> None:
    """A replayed retry is owed even if its token sorts before its parent's."""
    parent = ledger.recorded()
    claim = ledger.working().start(parent.token)
    child = retry_of(claim, token=token_at(1.0))
    ledger.record(child, replay=True)
    assert list(ledger.owed()) == [child.token]


@pytest.mark.parametrize("replay", [True, False])
def test_a_retry_of_a_run_without_a_claim_while_another_worker_has_it(
    ledger: Contract, *, replay: bool
) -> None:
    """Its replay counts: the holder died in an outage. A retry that is not pushed yet is refused."""
    parent = ledger.recorded()
    holder, other = ledger.working(), ledger.working()
    claim = holder.start(parent.token)
    child = delivery(parent=Parent(parent.token, claim=0, worker=other.id), attempt=2)
    answer = ledger.record(child, replay=replay)
    assert answer.refused == (frozenset() if replay else {child.token})
    assert list(ledger.owed()) == [child.token if replay else parent.token]
    assert holder.end(claim) is (Ended.LATE if replay else Ended.ENDED)


def test_a_delivery_that_a_worker_has_is_the_newest(ledger: Contract) -> None:
    """With ``newest`` a delivery is owed although its token comes from a slower clock."""
    worker = ledger.working()
    worker.end(worker.start(ledger.recorded().token))
    again = delivery(token=token_at(1.0))
    ledger.record(again, replay=True, newest=True)
    assert list(ledger.owed()) == [again.token]


def test_an_unknown_end_spares_younger_and_running_deliveries(ledger: Contract) -> None:
    """An end of an unknown delivery supersedes only older, unclaimed deliveries."""
    running = ledger.recorded()
    ledger.working().start(running.token)
    ended = delivery()
    younger = ledger.recorded()

    ledger.working().end(Claim(ended.token, 0), job_id="j")

    assert set(ledger.owed()) == {running.token, younger.token}


def test_a_delivery_that_ended_before_its_record_takes_no_claim_of_others(ledger: Contract) -> None:
    """A parent that another worker runs again stays claimed when its ended child is recorded."""
    parent = ledger.recorded()
    ledger.working().start(parent.token)
    child = delivery(parent=Parent(parent.token))
    ledger.working().end(Claim(child.token, 0))
    assert ledger.record(child, replay=True).refused == frozenset()
    assert list(ledger.owed()) == [parent.token]


def test_a_replay_of_an_unknown_delivery_is_owed(ledger: Contract) -> None:
    """A replayed record of an unknown delivery is owed."""
    it = delivery()
    ledger.record(it, replay=True)
    assert list(ledger.owed()) == [it.token]


def test_a_replay_of_an_owed_delivery_changes_nothing(ledger: Contract) -> None:
    """A replayed record of an owed delivery changes nothing."""
    it = ledger.recorded()
    ledger.working().start(it.token)
    ledger.record(it, replay=True)
    assert ledger.owed()[it.token].claim_live


def test_a_replay_is_checked_one_by_one(ledger: Contract) -> None:
    """A replay skips the ended deliveries and records the others, in one call."""
    ended, open_ = delivery("a", fresh=True), delivery("b", fresh=True)
    ledger.cancel(tokens=[ended.token])
    ledger.record(ended, open_, replay=True)
    assert list(ledger.owed()) == [open_.token]


def test_an_ended_job_runs_again_only_as_a_new_delivery(ledger: Contract) -> None:
    """A job runs again only as a new delivery; the old one is neither owed nor restored."""
    old = ledger.recorded()
    worker = ledger.working()
    worker.end(worker.start(old.token), Outcome.FAILED)
    ledger.record(old, replay=True)
    assert ledger.owed() == {}
    assert ledger.leader.envelopes(SOURCE, [old.token]) == []
    assert refused(worker.claim(old.token)) == (Refusal.ENDED, Outcome.FAILED)
    new = ledger.recorded()
    assert worker.start(new.token).number == 1
    assert ledger.outcome(old.token) is Outcome.FAILED


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "replaced"])
def test_a_refused_replay_gets_a_tombstone(ledger: Contract, cancelled: bool) -> None:
    """A delivery that was pushed before its record is refused is known as ended, and does not run."""
    parent = ledger.recorded()
    if cancelled:
        ledger.cancel(tokens=[parent.token])
    else:
        ledger.record(delivery(parent.job_id, parent=Parent(parent.token)))
    child = delivery(parent.job_id, parent=Parent(parent.token))
    assert ledger.record(child, replay=True).refused == frozenset([child.token])
    ledger.store.refuse(ledger.source, [child])
    expected = Outcome.CANCELLED if cancelled else Outcome.SUPERSEDED
    assert ledger.outcome(child.token) is expected
    assert refused(ledger.working().claim(child.token)) == (Refusal.ENDED, expected)


def test_a_refusal_changes_nothing_that_is_known(ledger: Contract) -> None:
    """A delivery that is owed, or has ended, stays as it is when its second record is refused."""
    owed, ended = ledger.recorded(), delivery()
    ledger.working().end(Claim(ended.token, 0))
    ledger.store.refuse(ledger.source, [owed, ended])
    assert ledger.owed().keys() == {owed.token}
    assert ledger.outcome(ended.token) is Outcome.COMPLETED
