from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from jobguard.model import Cause, Claim, End, Ended, Outcome, Parent, Refusal, new_token
from tests.contract.conftest import SOURCE, Contract, InPostgres, delivery, refused
from tests.support import eventually

if TYPE_CHECKING:
    from tests.contract.conftest import Together


def test_a_cancelled_delivery_stays_cancelled(ledger: Contract) -> None:
    """Neither a replay, nor a claim, nor a retry, nor an end makes a cancelled delivery owed again."""
    it = ledger.recorded()
    worker = ledger.working()
    assert ledger.cancel(tokens=[it.token]) == 1
    ledger.record(it, replay=True)
    child = delivery(parent=Parent(it.token))
    assert ledger.record(child).refused == {child.token}
    assert refused(worker.claim(it.token)) == (Refusal.ENDED, Outcome.CANCELLED)
    assert worker.end(Claim(it.token, 1)) is Ended.LATE
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.CANCELLED


def test_a_claimed_delivery_can_be_cancelled(ledger: Contract) -> None:
    """A running delivery can be cancelled: its heartbeat finds no claim, and its failure comes late."""
    it = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    assert ledger.cancel(job_ids=["j"]) == 1
    assert not worker.heartbeat(claim)
    assert worker.end(claim, Outcome.FAILED) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.CANCELLED


def test_a_run_that_was_cancelled_and_completes_is_completed(
    ledger: Contract,
) -> None:
    """A cancelled run that completes is completed, if the cancelled claim itself reports it."""
    it = ledger.recorded()
    worker, other = ledger.working(), ledger.working()
    claim = worker.start(it.token)
    ledger.cancel(job_ids=["j"])
    assert worker.end(Claim(it.token, claim.number + 1)) is Ended.LATE
    assert other.end(claim) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.CANCELLED

    assert worker.end(claim) is Ended.ENDED
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    assert worker.end(claim, Outcome.CANCELLED) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    assert refused(worker.claim(it.token)) == (Refusal.ENDED, Outcome.COMPLETED)


def test_every_delivery_of_a_job_id_is_cancelled(ledger: Contract) -> None:
    """A cancel by job id ends the running and the waiting delivery, and no other job."""
    first = ledger.recorded("a")
    ledger.working().start(first.token)
    ledger.recorded("a")
    other = ledger.recorded("b")
    assert ledger.cancel(job_ids=["a"]) == 2
    assert list(ledger.owed()) == [other.token]


def test_a_cancellation_can_come_before_the_record(ledger: Contract) -> None:
    """The tombstone of an unknown delivery refuses its later record."""
    it = delivery()
    assert ledger.cancel(tokens=[it.token]) == 0
    ledger.record(it, replay=True)
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.CANCELLED


def test_a_cancellation_does_not_rewrite_history(ledger: Contract) -> None:
    """A cancel does not change the outcome of an ended delivery."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.end(worker.start(it.token))
    assert ledger.cancel(tokens=[it.token], job_ids=["j"]) == 0
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_a_purge_spares_running_deliveries(ledger: Contract) -> None:
    """A cancel by queue ends only waiting deliveries of that queue."""
    waiting, running = ledger.recorded("a"), ledger.recorded("b")
    elsewhere = ledger.recorded("c", queue="mail")
    ledger.working().start(running.token)
    assert ledger.cancel(queue="default") == 1
    assert set(ledger.owed()) == {running.token, elsewhere.token}
    assert ledger.outcome(waiting.token) is Outcome.CANCELLED


_BY = pytest.mark.parametrize("by", [{"job_ids": ["j"]}, {"queue": "default"}], ids=["id", "queue"])


@_BY
def test_a_late_cancellation_spares_later_records(ledger: Contract, by: dict[str, Any]) -> None:
    """A late cancel spares every delivery that was recorded after it, with any token."""
    before, since = delivery(fresh=True), delivery(fresh=True)
    ledger.record(before)
    ledger.advance(20)
    ledger.record(since)
    assert ledger.cancel(**by, ago=10, until=new_token()) == 1
    assert list(ledger.owed()) == [since.token]
    assert ledger.outcome(before.token) is Outcome.CANCELLED


@_BY
def test_a_late_cancellation_spares_later_deliveries_of_its_process(
    ledger: Contract, by: dict[str, Any]
) -> None:
    """A late cancel spares deliveries that its own process sent later, by their tokens."""
    before, until = ledger.recorded(fresh=True), new_token()
    since = ledger.recorded(fresh=True)
    assert ledger.cancel(**by, ago=0, until=until) == 1
    assert list(ledger.owed()) == [since.token]
    assert ledger.outcome(before.token) is Outcome.CANCELLED


@_BY
def test_a_late_cancellation_finds_deliveries_that_waited_in_the_spool(
    ledger: Contract, by: dict[str, Any]
) -> None:
    """A late cancel also ends deliveries that waited in the spool at its time."""
    waited, until = delivery(), new_token()
    other = delivery("other", queue="mail")
    ledger.record(waited, other, replay=True)
    waiting = [waited.token, other.token]
    assert ledger.cancel(**by, ago=10, until=until) == 0
    assert ledger.cancel(**by, ago=10, until=until, waiting=waiting) == 1
    assert list(ledger.owed()) == [other.token]
    assert ledger.outcome(waited.token) is Outcome.CANCELLED


def test_a_late_purge_spares_running_deliveries(ledger: Contract) -> None:
    """A late cancel by queue spares running deliveries, even those that waited in the spool."""
    running = ledger.recorded()
    ledger.working().start(running.token)
    waiting = [running.token]
    assert ledger.cancel(queue="default", ago=0, waiting=waiting) == 0
    assert list(ledger.owed()) == [running.token]


def test_a_cancelled_token_is_cancelled_whenever_it_is_recorded(ledger: Contract) -> None:
    """A cancel by token applies to its delivery at any time."""
    until = new_token()
    since, unknown = ledger.recorded("a"), delivery("b")
    tokens = [since.token, unknown.token]
    assert ledger.cancel(tokens=tokens, ago=10, until=until) == 1
    ledger.record(unknown, replay=True)
    assert ledger.owed() == {}
    assert {ledger.outcome(token) for token in tokens} == {Outcome.CANCELLED}


@_BY
def test_a_cancellation_that_waits_spares_records_made_meanwhile(
    ledger_in_postgres: Contract, together: Together, by: dict[str, Any]
) -> None:
    """A cancel that waits for a lock spares deliveries that are recorded meanwhile."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    ended, before = ledger.recorded(fresh=True), ledger.recorded(fresh=True)
    runner = ledger.working()
    end = End(ended.token, runner.start(ended.token).number, Outcome.COMPLETED, runner.id)
    with ledger.backend.commits_held_back() as waiting:
        together.call(ledger.backend.host().end, SOURCE, [end])
        eventually(lambda: waiting() >= 1)
        host = ledger.backend.host()
        cancel = partial(host.cancel, SOURCE, **by, meant=host.now())
        answers = together.call(cancel)
        eventually(lambda: waiting() >= 2)
        since = ledger.recorded(fresh=True)
    together.wait()
    assert answers == [1]
    assert list(ledger.owed()) == [since.token]
    assert ledger.outcome(before.token) is Outcome.CANCELLED


def test_a_cancelled_delivery_is_not_watched(ledger: Contract) -> None:
    """A cancelled delivery has no suspicion and no outbox row."""
    it = delivery()
    ledger.record(it, outbox=True)
    ledger.leader.suspect(ledger.elected(), SOURCE, [(it.token, Cause.EVICTION, "")])
    ledger.cancel(tokens=[it.token])
    assert ledger.watched() == {}
    assert ledger.leader.envelopes(SOURCE, [it.token]) == []
