"""Effects of jobs: which run may do them, and what the others learn."""

from __future__ import annotations

import pytest

from jobguard.model import Claim, Outcome
from jobguard.store.protocols import Void
from tests.contract.conftest import SOURCE, Contract, retry_of


def begun(
    ledger: Contract,
    claim: Claim,
    *,
    job_id: str | None = "j",
    again: bool = False,
    name: str = "mail",
) -> tuple[str, str | None]:
    """Begin an effect on behalf of a claim."""
    return ledger.store.begin_effect(
        SOURCE, name, job_id=job_id, token=claim.token, number=claim.number, again=again
    )


def finish(ledger: Contract, claim: Claim, result: str | None = "7", *, name: str = "mail") -> None:
    """Store that an effect is done."""
    ledger.store.finish_effect(SOURCE, name, token=claim.token, number=claim.number, result=result)


def test_an_effect_is_done_once(ledger: Contract) -> None:
    """A done effect is done for the retries of its job, with its result; another name is another effect."""
    worker = ledger.working()
    claim = worker.start(ledger.recorded().token)
    assert begun(ledger, claim) == ("first", None)
    finish(ledger, claim)
    assert begun(ledger, claim) == ("done", "7")
    assert begun(ledger, claim, name="x" * 5000) == ("first", None)
    retry = retry_of(claim)
    ledger.record(retry)
    assert begun(ledger, worker.start(retry.token)) == ("done", "7")


def test_a_completed_job_ends_its_effects(ledger: Contract) -> None:
    """A job sent again under the id of a completed one does its effects; after a failure they stay done."""
    worker = ledger.working()
    claim = worker.start(ledger.recorded().token)
    begun(ledger, claim)
    finish(ledger, claim)
    worker.end(claim, Outcome.FAILED)
    again = worker.start(ledger.recorded().token)
    assert begun(ledger, again) == ("done", "7")
    worker.end(again, Outcome.COMPLETED)
    third = worker.start(ledger.recorded().token)
    assert begun(ledger, third) == ("first", None)
    finish(ledger, third, "8")
    assert begun(ledger, third) == ("done", "8")


def test_a_live_claim_excludes_all_others(ledger: Contract) -> None:
    """While a live worker does an effect of a key, other jobs are told to wait."""
    one = ledger.working().start(ledger.recorded("a").token)
    two = ledger.working().start(ledger.recorded("b").token)
    assert begun(ledger, one, job_id=None) == ("first", None)
    assert begun(ledger, two, job_id=None, again=True) == ("busy", None)
    finish(ledger, two)
    assert begun(ledger, two, job_id=None) == ("busy", None)
    ledger.store.forget_effect(SOURCE, "mail", token=two.token, number=two.number)
    assert begun(ledger, two, job_id=None) == ("busy", None)
    ledger.store.forget_effect(SOURCE, "mail", token=one.token, number=one.number)
    assert begun(ledger, two, job_id=None) == ("first", None)


@pytest.mark.parametrize("again", [False, True])
def test_a_dead_claim_leaves_its_effect_behind(ledger: Contract, again: bool) -> None:
    """The effect of a dead worker is in doubt; the policy says whether the next run does it again."""
    term, it = ledger.elected(), ledger.recorded()
    worker = ledger.working()
    claim = worker.start(it.token)
    begun(ledger, claim)
    ledger.leader.declare_dead(term, [worker.id])
    ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    next_ = ledger.working().start(it.token)
    assert begun(ledger, next_, again=again) == ("first" if again else "left", None)
    finish(ledger, claim)
    expected = ("left", None) if again else ("done", "7")
    assert begun(ledger, next_) == expected
    finish(ledger, next_, "8")
    assert begun(ledger, next_)[0] == "done"


def test_no_effect_without_a_claim(ledger: Contract) -> None:
    """A stale claim begins no effect; number 0 stands for the claim of the delivery."""
    it = ledger.recorded()
    assert begun(ledger, Claim(it.token, 0)) == ("unclaimed", None)
    claim = ledger.working().start(it.token)
    assert begun(ledger, Claim(it.token, claim.number + 1)) == ("unclaimed", None)
    assert begun(ledger, Claim(it.token, 0)) == ("first", None)
    finish(ledger, Claim(it.token, 0))
    assert begun(ledger, claim) == ("done", "7")
