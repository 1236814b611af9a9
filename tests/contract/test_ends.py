from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from jobguard.model import Cause, Claim, End, Ended, Outcome, Parent, Refusal, new_token
from jobguard.store.protocols import Closing, Void
from tests.contract.conftest import (
    NAMESPACE,
    SOURCE,
    Contract,
    InPostgres,
    delivery,
    refused,
    taken_over,
)
from tests.support import eventually

if TYPE_CHECKING:
    from tests.contract.conftest import Together


def test_an_end_that_races_an_uncommitted_replay(
    ledger_in_postgres: Contract, together: Together
) -> None:
    """An end that waits for the record of its delivery ends it like any other."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    parent = ledger.recorded()
    it = delivery(parent=Parent(parent.token))
    runner = ledger.working()
    with ledger.backend.commits_held_back() as waiting:
        record = partial(
            ledger.backend.host().record, SOURCE, [it], namespace=NAMESPACE, replay=True
        )
        together.call(record)
        eventually(lambda: waiting() >= 1)
        end = End(it.token, 0, Outcome.COMPLETED, runner.id, job_id="j")
        ends = together.call(ledger.backend.host().end, SOURCE, [end])
        eventually(lambda: waiting() >= 2 or ends)
        assert not ends, "the end did not wait for the record"
    together.wait()
    assert ends == [[Ended.ENDED]]
    assert ledger.owed() == {}
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_an_end_moves_a_delivery_from_owed_to_history(ledger: Contract) -> None:
    """After its end a delivery is neither owed nor watched, and is in history."""
    term, it = ledger.elected(), delivery()
    ledger.record(it, outbox=True)
    worker = ledger.working()
    claim = worker.start(it.token)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.INCIDENT, "")])
    assert worker.end(claim, Outcome.FAILED, error="boom") is Ended.ENDED
    assert (ledger.owed(), ledger.watched()) == ({}, {})
    assert ledger.outcome(it.token) is Outcome.FAILED


def test_the_first_of_two_ends_stands(ledger: Contract) -> None:
    """A second end of a delivery changes nothing."""
    it = ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    assert worker.end(claim) is Ended.ENDED
    assert worker.end(claim, Outcome.FAILED) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_two_ends_of_one_delivery_in_one_call(ledger: Contract) -> None:
    """A batch of ends is applied in its order, with one answer per end."""
    it, stranger = ledger.recorded(), new_token()
    worker = ledger.working()
    claim = worker.start(it.token)
    answers = ledger.store.end(
        SOURCE,
        [
            End(it.token, claim.number, Outcome.COMPLETED, worker.id),
            End(stranger, 1, Outcome.COMPLETED, worker.id),
            End(it.token, claim.number, Outcome.FAILED, worker.id),
        ],
    )
    assert list(answers) == [Ended.ENDED, Ended.UNKNOWN, Ended.LATE]
    assert ledger.outcome(it.token) is Outcome.COMPLETED


def test_no_ends_are_no_answers(ledger: Contract) -> None:
    """An empty batch gives no answers."""
    assert list(ledger.store.end(SOURCE, [])) == []


def test_an_end_of_an_unrecorded_delivery_leaves_a_tombstone(ledger: Contract) -> None:
    """An end of an unrecorded delivery leaves a tombstone, which its later record finds."""
    it = delivery()
    worker = ledger.working()
    fields: dict[str, Any] = {"job_id": it.job_id, "queue": it.queue, "task": it.task}
    assert worker.end(Claim(it.token, 0), **fields) is Ended.UNKNOWN
    assert worker.end(Claim(it.token, 0), **fields) is Ended.LATE
    assert ledger.outcome(it.token) is Outcome.COMPLETED
    ledger.record(it, replay=True)
    assert ledger.owed() == {}


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED])
def test_a_zombies_end_does_not_end_its_successors_run(ledger: Contract, outcome: Outcome) -> None:
    """An end with a stale number changes nothing; the end of the current claim counts."""
    it, zombie, stale, successor, claim = taken_over(ledger)
    assert zombie.end(stale, outcome) is Ended.LATE
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.claim_worker) == (claim.number, successor.id)
    assert ledger.outcome(it.token) is None
    assert successor.end(claim, Outcome.FAILED) is Ended.ENDED
    assert ledger.outcome(it.token) is Outcome.FAILED


def test_a_zombies_heartbeat_is_not_its_successors(ledger: Contract) -> None:
    """A heartbeat with a stale claim is refused."""
    _, zombie, stale, successor, claim = taken_over(ledger)
    assert not zombie.heartbeat(stale)
    assert successor.heartbeat(claim)


def test_a_zombies_completion_ends_a_delivery_that_no_other_worker_runs(ledger: Contract) -> None:
    """A completion with a voided claim ends the delivery if no other worker has claimed it."""
    term, it = ledger.elected(), ledger.recorded()
    zombie = ledger.working()
    stale = zombie.start(it.token)
    ledger.leader.declare_dead(term, [zombie.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, stale.number, charge=True, backoff=0)])
    assert zombie.end(stale, Outcome.FAILED) is Ended.LATE
    assert list(ledger.owed()) == [it.token]
    assert zombie.end(stale, Outcome.COMPLETED) is Ended.ENDED
    assert (ledger.owed(), ledger.watched()) == ({}, {})


def test_a_start_while_postgres_was_away_ends_its_delivery(ledger: Contract) -> None:
    """Number 0 ends a delivery that no worker has claimed, with any outcome."""
    first, second = ledger.recorded("a"), ledger.recorded("b")
    worker = ledger.working()
    assert worker.end(Claim(first.token, 0), Outcome.FAILED) is Ended.ENDED
    assert worker.end(Claim(second.token, 0), Outcome.COMPLETED) is Ended.ENDED
    assert ledger.outcome(first.token) is Outcome.FAILED


def test_a_start_while_postgres_was_away_and_a_late_claim_are_one(ledger: Contract) -> None:
    """Number 0 ends the claim that the same worker took later."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    assert worker.end(Claim(it.token, 0), Outcome.FAILED) is Ended.ENDED


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.COMPLETED])
@pytest.mark.parametrize("dead", [False, True], ids=["live", "dead"])
def test_an_end_without_a_claim_while_another_worker_has_it(
    ledger: Contract, outcome: Outcome, *, dead: bool
) -> None:
    """It counts if the run has completed, or if the other worker is dead."""
    it = ledger.recorded()
    unclaimed, holder = ledger.working(), ledger.working()
    claim = holder.start(it.token)
    if dead:
        ledger.leader.declare_dead(ledger.elected(), [holder.id])
    counts = dead or outcome is Outcome.COMPLETED
    answer = unclaimed.end(Claim(it.token, 0), outcome)
    assert answer is (Ended.ENDED if counts else Ended.LATE)
    assert holder.end(claim) is (Ended.LATE if counts else Ended.ENDED)
    assert ledger.outcome(it.token) is (outcome if counts else Outcome.COMPLETED)


def test_a_heartbeat_needs_a_current_claim(ledger: Contract) -> None:
    """A heartbeat is accepted by token and number, or by job id; otherwise the answer is False."""
    it = ledger.recorded()
    worker = ledger.working()
    assert not ledger.store.heartbeat(SOURCE, job_id="j", progress=0.1)
    claim = worker.start(it.token)
    assert worker.heartbeat(claim)
    assert ledger.store.heartbeat(SOURCE, job_id="j", progress=0.9)
    assert not ledger.store.heartbeat(SOURCE, job_id="unknown", progress=0.9)
    worker.end(claim)
    assert not worker.heartbeat(claim)


def test_a_leader_ends_a_delivery_that_no_worker_runs(ledger: Contract) -> None:
    """A leader can end deliveries that no worker runs; an unknown one does not count."""
    term, it, other = ledger.elected(), delivery("a"), ledger.recorded("b")
    ledger.record(it, outbox=True)
    ledger.leader.suspect(term, SOURCE, [(it.token, Cause.WORKER, "")])
    closings = [
        Closing(it.token, Outcome.DEAD, "killed three workers"),
        Closing(new_token(), Outcome.COMPLETED),
    ]
    assert ledger.leader.close_owed(term, SOURCE, closings) == [it.token]
    assert list(ledger.owed()) == [other.token]
    assert ledger.watched() == {}
    assert ledger.outcome(it.token) is Outcome.DEAD
    assert refused(ledger.working().claim(it.token)) == (Refusal.ENDED, Outcome.DEAD)


def test_a_leader_does_not_end_a_running_delivery(ledger: Contract) -> None:
    """A leader cannot end a delivery with a live claim; it can end one with a dead claim."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    assert ledger.leader.close_owed(term, SOURCE, [Closing(it.token, Outcome.COMPLETED)]) == []
    assert list(ledger.owed()) == [it.token]
    ledger.leader.declare_dead(term, [worker.id])
    assert ledger.leader.close_owed(term, SOURCE, [Closing(it.token, Outcome.COMPLETED)]) == [
        it.token
    ]
    assert ledger.owed() == {}


def test_tombstones_are_those_of_ended_deliveries(ledger: Contract) -> None:
    """Tombstones are returned for ended deliveries, not for owed or unknown ones."""
    ended, owed = ledger.recorded("a"), ledger.recorded("b")
    ledger.cancel(tokens=[ended.token])
    asked = [ended.token, owed.token, new_token()]
    assert ledger.leader.tombstones(SOURCE, asked) == {ended.token: Outcome.CANCELLED}
    assert ledger.leader.tombstones(SOURCE, []) == {}
