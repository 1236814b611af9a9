"""A ledger in memory that gives the same answers as PostgreSQL, for tests.

It has the tables of the schema as dicts, one lock instead of transactions, and a clock that a test can
pass in instead of ``now()``::

    ledger = MemoryLedger()
    host, leader = ledger.host(), ledger.leader("default", uuid4())

``ledger.down = True`` simulates an outage: every call raises StoreUnavailable until it is False again.

The data is lost when the process ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

from jobguard.store.protocols import LeaderStore
from tests.fakes.store.host import MemoryHostStore
from tests.fakes.store.leader import MemoryLeaderStore
from tests.fakes.store.tables import Tables


class MemoryLedger:
    """The ledger of one process, with as many hosts and leaders as a test needs.

    ``clock`` returns seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._tables = Tables(clock)

    @property
    def down(self) -> bool:
        """Whether the ledger simulates an outage."""
        return self._tables.down

    @down.setter
    def down(self, down: bool) -> None:
        with self._tables.lock:
            self._tables.down = down

    def refuse(self, refuses: Callable[[str], bool]) -> None:
        """Refuse rows with certain texts from now on, as PostgreSQL refuses rows for their content."""
        self._tables.refuses = refuses

    def host(self) -> MemoryHostStore:
        """Return the ledger as producers and workers use it."""
        return MemoryHostStore(self._tables)

    def leader(self, namespace: str, holder: UUID) -> LeaderStore:
        """Return the ledger as one reconciler of the namespace uses it."""
        return MemoryLeaderStore(self._tables, namespace, holder)
