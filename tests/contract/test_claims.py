from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from jobguard.model import (
    Cause,
    Claim,
    End,
    Ended,
    Outcome,
    Refusal,
    Unknown,
    WorkerDeclaredDead,
    new_token,
)
from jobguard.store.protocols import Void
from tests.contract.conftest import (
    CRASH_BUDGET,
    ENDED_COMPLETED,
    SOURCE,
    WORKER_TIMEOUT,
    Contract,
    InPostgres,
    delivery,
    refused,
)
from tests.support import eventually

if TYPE_CHECKING:
    from tests.contract.conftest import Together


def test_the_first_claim_has_number_one(ledger: Contract) -> None:
    """The claims of a delivery are numbered from 1."""
    it = ledger.recorded()
    worker = ledger.working()
    assert worker.claim(it.token) == Claim(it.token, 1, crashes=0)
    row = ledger.owed()[it.token]
    assert (row.claim_number, row.claim_worker, row.claim_live) == (1, worker.id, True)


def test_a_claim_of_an_unrecorded_delivery_is_unknown(ledger: Contract) -> None:
    """A claim of an unrecorded delivery is unknown: the worker records it and claims again."""
    it = delivery()
    worker = ledger.working()
    assert worker.claim(it.token) == Unknown(it.token)
    ledger.record(it, replay=True)
    assert worker.start(it.token).number == 1


def test_no_claim_is_granted_to_a_dead_worker(ledger: Contract) -> None:
    """A worker that was declared dead gets no claim; an ended delivery is still reported as ended."""
    it, done, more = (ledger.recorded(job_id) for job_id in "abc")
    worker, other = ledger.working(), ledger.working()
    other.end(other.start(done.token))
    ledger.leader.declare_dead(ledger.elected(), [worker.id])
    requests = [worker.request(it.token), worker.request(done.token), other.request(more.token)]
    answers = ledger.store.claims(SOURCE, requests)
    assert answers[requests[0].nonce] == worker.claim(it.token) == WorkerDeclaredDead(it.token)
    assert refused(answers[requests[1].nonce]) == (Refusal.ENDED, Outcome.COMPLETED)
    assert answers[requests[2].nonce] == Claim(more.token, 1)
    assert other.start(it.token).number == 1


def test_a_claimed_delivery_is_refused_to_a_dead_worker_too(ledger: Contract) -> None:
    """A worker that was declared dead gets a refusal for a delivery that a live one runs."""
    it, dead, living = ledger.recorded(), ledger.working(), ledger.working()
    ledger.leader.declare_dead(ledger.elected(), [dead.id])
    living.start(it.token)
    assert refused(dead.claim(it.token)) == (Refusal.CLAIMED, None)


def test_a_worker_that_asks_again_under_a_new_id_keeps_its_claim(ledger: Contract) -> None:
    """A worker that asks again under a new id, with the same nonce, gets its claim under that id."""
    it, worker, nonce = ledger.recorded(), ledger.working(), uuid4()
    worker.claim(it.token, nonce=nonce)
    ledger.leader.declare_dead(ledger.elected(), [worker.id])
    assert worker.claim(it.token, nonce=nonce) == WorkerDeclaredDead(it.token)
    renewed = ledger.working()
    assert renewed.claim(it.token, nonce=nonce) == Claim(it.token, 1)
    row = ledger.owed()[it.token]
    assert (row.claim_worker, row.claim_live) == (renewed.id, True)


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED])
def test_a_claim_of_an_ended_delivery_is_refused(ledger: Contract, outcome: Outcome) -> None:
    """A claim of an ended delivery is refused with its outcome."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.end(worker.start(it.token), outcome)
    assert refused(worker.claim(it.token)) == (Refusal.ENDED, outcome)


def test_a_live_claim_is_not_shared(ledger: Contract) -> None:
    """Only one worker runs a delivery; the refusal of another changes nothing of the run."""
    it = ledger.recorded()
    first, second = ledger.working(), ledger.working()
    claim = first.start(it.token)
    assert refused(second.claim(it.token)) == (Refusal.CLAIMED, None)
    assert ledger.watched() == {}
    assert ledger.owed()[it.token].claim_worker == first.id
    assert first.end(claim) is Ended.ENDED


def test_a_worker_does_not_get_its_own_running_delivery_again(ledger: Contract) -> None:
    """Another nonce is another start, even of the same worker."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    worker.beat()
    assert refused(worker.claim(it.token)) == (Refusal.CLAIMED, None)


def test_the_same_nonce_is_the_same_claim(ledger: Contract) -> None:
    """A claim whose answer was lost can be asked for again."""
    it = ledger.recorded()
    worker = ledger.working()
    nonce = uuid4()
    assert worker.claim(it.token, nonce=nonce) == Claim(it.token, 1)
    assert worker.claim(it.token, nonce=nonce) == Claim(it.token, 1)
    assert ledger.owed()[it.token].crashes == 0


def test_the_same_nonce_after_a_takeover_is_another_start(ledger: Contract) -> None:
    """After a takeover the nonce of the old claim gets a refusal."""
    it = ledger.recorded()
    slow, quick = ledger.working(), ledger.working()
    nonce = uuid4()
    slow.claim(it.token, nonce=nonce)
    slow.leave()
    quick.start(it.token)
    assert refused(slow.claim(it.token, nonce=nonce)) == (Refusal.CLAIMED, None)


def test_a_claim_that_a_beating_worker_does_not_list_is_taken_over(ledger: Contract) -> None:
    """A killed child's claim, which its beating parent no longer lists, can be taken over."""
    it = ledger.recorded()
    worker = ledger.working()
    worker.start(it.token)
    worker.forget_by_beats(it.token)
    assert not ledger.owed()[it.token].claim_live
    assert worker.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_claim_younger_than_the_last_two_beats_is_live(ledger: Contract) -> None:
    """A claim is live until two beats without it.

    The first beat may have begun before the claim.
    """
    it = ledger.recorded()
    worker, other = ledger.working(), ledger.working()
    ledger.advance(1)
    worker.start(it.token)
    ledger.advance(1)
    worker.beat(claims=set())
    assert ledger.owed()[it.token].claim_live
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    ledger.advance(1)
    worker.beat(claims=set())
    assert not ledger.owed()[it.token].claim_live
    assert other.start(it.token).number == 2


def test_a_claim_that_is_listed_is_live_however_old(ledger: Contract) -> None:
    """A claim that its worker lists is live for hours."""
    it = ledger.recorded()
    worker, other = ledger.working(), ledger.working()
    claim = worker.start(it.token)
    for _ in range(3):
        ledger.advance(3600)
        worker.beat()
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    assert worker.end(claim) is Ended.ENDED


def test_a_silent_worker_is_dead_without_a_leader(ledger: Contract) -> None:
    """Without a leader, a worker that is silent for the timeout is dead, by the database's clock."""
    it = ledger.recorded()
    silent, other = ledger.working(), ledger.working()
    silent.start(it.token)
    ledger.advance(WORKER_TIMEOUT - 5)
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    ledger.advance(10)
    assert other.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_silent_worker_is_alive_until_the_leader_declares_it_dead(ledger: Contract) -> None:
    """With a leader, a silent worker is alive until it is declared dead; the refusal makes a suspect."""
    term, it = ledger.elected(), ledger.recorded()
    silent, other = ledger.working(), ledger.working()
    silent.start(it.token)
    ledger.advance(WORKER_TIMEOUT + 1)
    assert refused(other.claim(it.token)) == (Refusal.CLAIMED, None)
    assert ledger.watched()[it.token].suspected is Cause.WORKER
    ledger.leader.declare_dead(term, [silent.id])
    assert other.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_claim_of_a_worker_that_left_is_taken_over_for_free(ledger: Contract) -> None:
    """A claim of a worker that exited regularly can be taken over at once, without a crash."""
    it = ledger.recorded()
    leaving, other = ledger.working(), ledger.working()
    leaving.start(it.token)
    leaving.leave()
    row = ledger.owed()[it.token]
    assert (row.claim_live, row.claim_announced) == (False, True)
    assert other.start(it.token) == Claim(it.token, 2, crashes=0)


def test_a_claim_of_a_worker_that_never_beat_is_taken_over(ledger: Contract) -> None:
    """A claim of a worker without a row is dead at once."""
    it = ledger.recorded()
    unseen, other = ledger.worker(), ledger.working()
    assert isinstance(unseen.claim(it.token), Claim)
    assert not ledger.owed()[it.token].claim_live
    assert list(ledger.watched()) == [it.token]
    assert other.start(it.token) == Claim(it.token, 2, crashes=1)


def test_a_spent_crash_budget_buries_the_delivery(ledger: Contract) -> None:
    """After the last death that the budget allows, the job is dead, and kept."""
    term, it = ledger.elected(), ledger.recorded()
    for crashes in range(CRASH_BUDGET):
        victim = ledger.working()
        assert victim.start(it.token) == Claim(it.token, crashes + 1, crashes=crashes)
        ledger.leader.declare_dead(term, [victim.id])
    other = ledger.working()
    assert refused(other.claim(it.token))[0] is Refusal.SPENT
    assert ledger.owed() == {}
    assert ledger.watched() == {}
    assert refused(other.claim(it.token)) == (Refusal.ENDED, Outcome.DEAD)


def test_the_charges_of_a_workers_claims_are_known(ledger: Contract) -> None:
    """For each worker the two highest numbers of deaths with which its claimed jobs are charged."""
    term = ledger.elected()
    poison, first, second = (ledger.recorded(name) for name in ("poison", "first", "second"))
    victim = ledger.working()
    claim = victim.start(poison.token)
    ledger.leader.declare_dead(term, [victim.id])
    ledger.leader.void(term, SOURCE, [Void(poison.token, claim.number, charge=True, backoff=0)])
    worker, idle, other = ledger.working(), ledger.working(), ledger.working()
    for it in (poison, first):
        worker.start(it.token)
    other.start(second.token)
    charges = ledger.leader.charges(SOURCE, [worker.id, idle.id, other.id])
    assert {worker: list(two) for worker, two in charges.items()} == {
        worker.id: [1, 0],
        other.id: [0],
    }
    assert ledger.leader.charges(SOURCE + 1, [worker.id]) == {}


def test_a_claim_after_a_void_has_the_next_number(ledger: Contract) -> None:
    """After a void the next claim has the next number."""
    term, it = ledger.elected(), ledger.recorded()
    first, second = ledger.working(), ledger.working()
    stale = first.start(it.token)
    ledger.leader.declare_dead(term, [first.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, stale.number, charge=True, backoff=0)])
    assert second.start(it.token) == Claim(it.token, 2, crashes=1)


def test_two_claims_at_once(ledger: Contract, together: Together) -> None:
    """Of many workers that claim one delivery at the same moment, one gets it."""
    for _ in range(5):
        it = ledger.recorded(fresh=True)
        asked = []
        for _ in range(8):
            worker, host = ledger.working(), ledger.backend.host()
            asked.append(together.call(host.claim, SOURCE, worker.request(it.token)))
        together.wait()
        answers = [answer for (answer,) in asked]
        granted = [answer for answer in answers if isinstance(answer, Claim)]
        assert granted == [Claim(it.token, 1)]
        others = [refused(answer) for answer in answers if not isinstance(answer, Claim)]
        assert others == [(Refusal.CLAIMED, None)] * 7


def test_a_claim_that_races_an_uncommitted_end(
    ledger_in_postgres: Contract, together: Together
) -> None:
    """A claim during the commit of an end waits for it, and is refused."""
    ledger = ledger_in_postgres
    assert isinstance(ledger.backend, InPostgres)
    it = ledger.recorded()
    runner, other = ledger.working(), ledger.working()
    claim = runner.start(it.token)
    end = End(it.token, claim.number, Outcome.COMPLETED, runner.id)
    with ledger.backend.commits_held_back() as waiting:
        ends = together.call(ledger.backend.host().end, SOURCE, [end])
        eventually(lambda: waiting() >= 1)
        answers = together.call(ledger.backend.host().claim, SOURCE, other.request(it.token))
        eventually(lambda: waiting() >= 2 or answers)
        assert not answers, "the claim did not wait for the end"
    together.wait()
    assert ends == [[Ended.ENDED]]
    assert refused(answers[0]) == ENDED_COMPLETED


def test_the_worker_of_a_voided_claim_is_known_to_the_next_run(ledger: Contract) -> None:
    """The worker of the last voided claim is known; without a void there is none."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    assert ledger.store.predecessor(SOURCE, it.token) is None
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    assert ledger.store.predecessor(SOURCE, it.token) == worker.id
    assert ledger.store.predecessor(SOURCE, new_token()) is None


def test_the_worker_of_a_claim_that_was_taken_over_is_known_to_the_next_run(
    ledger: Contract,
) -> None:
    """A start that takes over the claim of a dead worker itself knows that worker."""
    term, it = ledger.elected(), ledger.recorded()
    victim, other = ledger.working(), ledger.working()
    victim.start(it.token)
    ledger.leader.declare_dead(term, [victim.id])
    assert other.start(it.token).number == 2
    assert ledger.store.predecessor(SOURCE, it.token) == victim.id
