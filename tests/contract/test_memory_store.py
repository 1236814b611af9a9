from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from jobguard.errors import StoreUnavailable
from tests.contract.conftest import NAMESPACE, SOURCE, delivery
from tests.fakes.store import MemoryLedger

if TYPE_CHECKING:
    pass


def test_the_ledger_in_memory_can_be_down() -> None:
    """While the memory store is down every call raises StoreUnavailable, and nothing is lost."""
    ledger = MemoryLedger()
    host, leader = ledger.host(), ledger.leader(NAMESPACE, uuid4())
    it = delivery()
    host.record(SOURCE, [it], namespace=NAMESPACE)
    ledger.down = True
    assert ledger.down
    with pytest.raises(StoreUnavailable):
        host.record(SOURCE, [delivery()], namespace=NAMESPACE)
    with pytest.raises(StoreUnavailable):
        leader.elect(lease=10)
    with pytest.raises(StoreUnavailable):
        leader.page(SOURCE, after=None, limit=10)
    ledger.down = False
    assert [row.token for row in leader.page(SOURCE, after=None, limit=10)] == [it.token]
