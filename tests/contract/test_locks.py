from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from jobguard.model import Claim
from jobguard.store.protocols import Void
from tests.contract.conftest import SOURCE, Contract

if TYPE_CHECKING:
    pass


def locked(ledger: Contract, claim: Claim, name: str = "import") -> bool:
    """Take a lock on behalf of a claim."""
    return ledger.store.lock(SOURCE, name, token=claim.token, number=claim.number)


def test_a_lock_excludes_every_other_live_claim(ledger: Contract) -> None:
    """One claim has the lock, however often it asks, until it unlocks; another name is another lock."""
    one = ledger.working().start(ledger.recorded("a").token)
    two = ledger.working().start(ledger.recorded("b").token)
    assert locked(ledger, one) and locked(ledger, one)
    assert not locked(ledger, two)
    assert locked(ledger, two, "another")
    ledger.store.unlock(SOURCE, "import", token=two.token)
    assert not locked(ledger, two)
    ledger.store.unlock(SOURCE, "import", token=one.token)
    assert locked(ledger, two)
    assert not locked(ledger, one)


@pytest.mark.parametrize("how", ["ended", "voided", "dead", "left", "given back"])
def test_a_lock_dies_with_its_claim(ledger: Contract, how: str) -> None:
    """A lock is free when its claim is gone, for any reason."""
    term, it = ledger.elected(), ledger.recorded("a")
    worker, other = ledger.working(), ledger.working()
    claim = worker.start(it.token)
    assert locked(ledger, claim)
    next_ = other.start(ledger.recorded("b").token)
    assert not locked(ledger, next_)
    if how == "ended":
        worker.end(claim)
    elif how == "voided":
        ledger.leader.void(term, SOURCE, [Void(it.token, claim.number, charge=True, backoff=0)])
    elif how == "dead":
        ledger.leader.declare_dead(term, [worker.id])
    elif how == "left":
        worker.leave()
    else:
        ledger.store.release(SOURCE, it.token, worker.id, number=claim.number)
    assert locked(ledger, next_)
    assert not locked(ledger, claim)


def test_no_lock_without_a_claim(ledger: Contract) -> None:
    """An unclaimed run and a stale claim get no lock; number 0 means the current claim."""
    it = ledger.recorded("a")
    assert not locked(ledger, Claim(it.token, 0))
    claim = ledger.working().start(it.token)
    assert not locked(ledger, Claim(it.token, claim.number + 1))
    assert locked(ledger, Claim(it.token, 0))
