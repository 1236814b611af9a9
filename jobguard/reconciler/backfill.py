"""Record what waits in Redis and is not in the ledger, page by page.

Such jobs were pushed by a program that is not guarded, before the first guard of their queue, or by
a process that died before its record was written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobguard.errors import BadRow
from jobguard.log import log_event
from jobguard.model import Delivery

if TYPE_CHECKING:
    from jobguard.adapter import Broker
    from jobguard.store.protocols import HostStore, LeaderStore, SourceRow


@dataclass(slots=True)
class BackfillCounts:
    """The jobs that a walk has found in Redis."""

    waiting: int = 0
    recorded: int = 0
    """Jobs that the ledger did not know; in a dry run: that it does not know."""
    unmarked: int = 0
    """Jobs without a token that got none, because this walk marks nothing."""
    unreadable: int = 0
    """Jobs of which no record can be made, because their data cannot be read."""


class Backfill:
    """One walk over the waiting jobs of some queues of a source.

    ``mark``: give a token to jobs that have none, so that they can be recorded. ``dry``: write
    nothing, neither to Redis nor to the ledger; count only. ``drain``: write the reports that wait in
    Redis, and return True if none is left. A process reports a job before it pushes it, so after a drain
    the ledger knows each job that was read before, and what it replaces, if its process reported it.
    """

    def __init__(
        self,
        broker: Broker,
        store: LeaderStore,
        host: HostStore,
        source: SourceRow,
        queues: Collection[str],
        *,
        page: int,
        mark: bool = True,
        dry: bool = False,
        drain: Callable[[], bool] = lambda: True,
    ) -> None:
        self._broker = broker
        self._store = store
        self._host = host
        self._source = source
        self._queues = sorted(queues)
        self._page = page
        self._mark = mark and not dry
        self._dry = dry
        self._drain = drain
        self._after: str | None = ""
        self.counts = BackfillCounts()

    @property
    def finished(self) -> bool:
        """True if the walk is over."""
        return self._after is None

    def step(self) -> int:
        """Record one page; return how many jobs the page had.

        Raises StoreUnavailable and RedisError; then the same page can be tried again.
        """
        if self._after is None:
            return 0
        page = self._broker.backlog(
            self._queues, after=self._after, limit=self._page, mark=self._mark
        )
        if page.deliveries and not self._drain():
            return 0
        found = {delivery.token: delivery for delivery in page.deliveries}
        known = self._store.known(self._source.id, list(found))
        unknown = [delivery for token, delivery in found.items() if token not in known]
        recorded = len(unknown) if self._dry else self._record(unknown)
        self.counts.waiting += len(found) + page.unmarked + page.unreadable
        self.counts.recorded += recorded
        self.counts.unmarked += page.unmarked
        self.counts.unreadable += page.unreadable
        self._after = page.after
        return len(found) + page.unmarked + page.unreadable

    def _record(self, deliveries: Sequence[Delivery]) -> int:
        """Record these; one that Postgres refuses for its content does not stop the others."""
        if not deliveries:
            return 0
        try:
            # A job may have ended since it was read: ``replay`` makes the ledger look for that.
            self._host.record(
                self._source.id, deliveries, namespace=self._source.namespace, replay=True
            )
        except BadRow as error:
            if len(deliveries) > 1:
                return sum(self._record([delivery]) for delivery in deliveries)
            log_event("row_refused", job_id=deliveries[0].job_id, error=str(error))
            return 0
        return len(deliveries)
