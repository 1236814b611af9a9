"""A ledger in memory that gives the same answers as Postgres: for our tests, and for yours.

The tables of the schema as dicts, one lock where Postgres has transactions, and a clock that can
be handed in where Postgres has ``now()``::

    ledger = MemoryLedger()
    host, leader = ledger.host(), ledger.leader("default", uuid4())

``ledger.down = True`` is an outage: every call raises StoreUnavailable until it is False again.

Not good for anything that must outlive the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

from jobguard.store.protocols import HostStore, LeaderStore
from tests.fakes.store.host import MemoryHostStore
from tests.fakes.store.leader import MemoryLeaderStore
from tests.fakes.store.tables import Tables


class MemoryLedger:
    """The ledger of one process, with as many hosts and leaders over it as a test needs.

    ``clock`` tells seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._tables = Tables(clock)

    @property
    def down(self) -> bool:
        """Whether the ledger plays an outage."""
        return self._tables.down

    @down.setter
    def down(self, down: bool) -> None:
        with self._tables.lock:
            self._tables.down = down

    def refuse(self, refuses: Callable[[str], bool]) -> None:
        """Refuse rows with such a text from now on, as Postgres refuses rows for what is in them."""
        self._tables.refuses = refuses

    def host(self) -> HostStore:
        """Return the ledger as producers and workers use it."""
        return MemoryHostStore(self._tables)

    def leader(self, namespace: str, holder: UUID) -> LeaderStore:
        """Return the ledger as one reconciler of the namespace uses it."""
        return MemoryLeaderStore(self._tables, namespace, holder)
