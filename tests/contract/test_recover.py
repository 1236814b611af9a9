"""A lost run that must not be repeated is dead, also if only its record or its claim has the rule."""

from __future__ import annotations

from jobguard.job_keys import KeyRule
from jobguard.model import Claim, Delivery, Outcome, Refusal, Refused
from jobguard.store.protocols import Closing, Void
from tests.contract.conftest import NAMESPACE, SOURCE, Contract, delivery, retry_of


def rules(ledger: Contract, *deliveries: Delivery) -> list[str | None]:
    """Return the rules of these that a leader finds."""
    found = ledger.leader.rules(SOURCE, [one.token for one in deliveries])
    return [found.get(one.token) for one in deliveries]


def test_a_rule_is_recorded_with_its_delivery(ledger: Contract) -> None:
    """The leader finds it, however the delivery was recorded; a retry has that of its own record."""
    plain, dead = delivery("a"), delivery("b", recover="dead", fresh=True)
    ledger.record(plain, dead)
    keyed = delivery("c", recover="never", rule=KeyRule("k"))
    ledger.store.record_keyed(SOURCE, keyed, namespace=NAMESPACE, deadline=5.0)
    sent = delivery("d", recover="dead")
    ledger.backend.commit([sent])
    assert rules(ledger, plain, dead, keyed, sent) == [None, "dead", "never", "dead"]
    claim = ledger.working().start(dead.token)
    retry, other = retry_of(claim, "b", recover="never"), retry_of(claim, "b")
    ledger.record(retry)
    assert rules(ledger, dead, retry, other) == [None, "never", None]


def test_the_run_of_a_dead_worker_is_not_taken_over(ledger: Contract) -> None:
    """The next start buries it with its evidence, although the crash budget is not spent."""
    term, it = ledger.elected(), delivery("a", recover="dead")
    ledger.record(it)
    victim, other = ledger.working(), ledger.working()
    victim.start(it.token)
    assert other.claim(it.token) == Refused(it.token, Refusal.CLAIMED)
    ledger.leader.declare_dead(term, [victim.id])
    assert other.claim(it.token) == Refused(it.token, Refusal.SPENT)
    assert ledger.outcome(it.token) is Outcome.DEAD
    assert ledger.owed() == {}


def test_the_run_of_a_worker_that_left_is_not_taken_over(ledger: Contract) -> None:
    """No worker died, but the run began."""
    ledger.elected()
    it = delivery("a", recover="dead")
    ledger.record(it)
    victim, other = ledger.working(), ledger.working()
    victim.start(it.token)
    ledger.store.leave(victim.id)
    assert other.claim(it.token) == Refused(it.token, Refusal.SPENT)


def test_the_worker_that_starts_it_knows_the_rule(ledger: Contract) -> None:
    """A producer without the setting, SQL and a requeue record no rule: the claim stores it."""
    term, it = ledger.elected(), ledger.recorded()
    victim = ledger.working()
    nonce = victim.request(it.token).nonce
    for _ in range(2):  # the answer was lost, and the worker asks again
        assert victim.claim(it.token, nonce=nonce, recover="dead") == Claim(it.token, 1)
    assert rules(ledger, it) == ["dead"]
    ledger.leader.declare_dead(term, [victim.id])
    assert ledger.working().claim(it.token) == Refused(it.token, Refusal.SPENT)


def test_several_claims_of_one_process_have_their_own_rules(ledger: Contract) -> None:
    """Requests that share a statement do not share a rule."""
    one, two = ledger.recorded("a"), ledger.recorded("b")
    worker = ledger.working()
    asked = [worker.request(one.token, recover="never"), worker.request(two.token)]
    ledger.store.claims(SOURCE, asked)
    assert rules(ledger, one, two) == ["never", None]


def test_an_interrupted_run_keeps_its_claim(ledger: Contract) -> None:
    """A release before the run, or without a rule, lets any worker start; one after it does not."""
    ledger.elected()
    ruled, free = delivery("a", recover="dead"), delivery("b")
    ledger.record(ruled, free)
    worker, other = ledger.working(), ledger.working()
    worker.start(ruled.token)
    ledger.store.release(SOURCE, ruled.token, worker.id, number=1)
    assert worker.start(ruled.token).number == 2
    worker.start(free.token)
    for it in (ruled, free):
        ledger.store.release(SOURCE, it.token, worker.id, number=0, interrupted=True)
    assert other.start(free.token).number == 2
    worker.holds.clear()
    for _ in range(2):
        ledger.advance(3)
        worker.beat()
    assert other.claim(ruled.token) == Refused(ruled.token, Refusal.SPENT)


def test_what_died_before_its_run_caused_no_death(ledger: Contract) -> None:
    """A leader buries what Redis lost; only a claim is charged."""
    term, it = ledger.elected(), delivery("a", recover="never")
    ledger.record(it)
    closing = Closing(it.token, Outcome.DEAD, "lost before its run")
    assert list(ledger.leader.close_owed(term, SOURCE, [closing])) == [it.token]
    assert ledger.outcome(it.token) is Outcome.DEAD
    assert ledger.leader.void(term, SOURCE, [Void(it.token, 1, charge=True, backoff=0)]) == []
