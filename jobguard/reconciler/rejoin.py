"""Joins that the library counts in Redis: the results of a chord, the barrier of a group.

A loss of Redis takes these counts as well. The ledger knows which members have ended, and their
results. Therefore the counts are restored before any member is. A join whose members have all
ended, and whose body was never recorded, is reported to the library again.
"""

from __future__ import annotations

from collections.abc import Callable

from jobguard.adapter import Broker
from jobguard.log import log_event
from jobguard.store.protocols import LeaderStore

_PAGE = 500
_RESTORE_AGAIN = 1.0
"""Seconds between two rounds while lost jobs are being restored: Redis may lose the counts again."""
_CHECK_EVERY = 2.0
"""Seconds between two checks for complete joins without a body."""
_REPORT_AGAIN = 30.0
"""Seconds to wait for the body of a join that was reported again; doubled each time."""
_FORGET = 3600.0


class Rejoiner:
    """Restores and completes the joins of one source."""

    def __init__(
        self,
        broker: Broker,
        store: LeaderStore,
        source: int,
        *,
        grace: float,
        clock: Callable[[], float],
    ) -> None:
        self._broker = broker
        self._store = store
        self._source = source
        self._grace = grace
        self._clock = clock
        self._restored_at = float("-inf")
        self._inspected_at = float("-inf")
        # For each join: when it was reported, and how long to wait now.
        self._last_reported: dict[str, tuple[float, float]] = {}

    def restore_counts(self, deadline: float) -> None:
        """Restore the missing counts of every open join. Raises RedisError."""
        if self._clock() - self._restored_at < _RESTORE_AGAIN:
            return
        after, count = "", 0
        while True:
            page = self._store.open_joins(self._source, after=after, limit=_PAGE)
            if page:
                self._broker.rejoin(page, finish=False, deadline=deadline)
                count += len(page)
                after = page[-1].id
            if len(page) < _PAGE:
                break
        self._restored_at = self._clock()
        if count:
            log_event("joins_mended", count=count)

    def finish(self, deadline: Callable[[], float]) -> None:
        """Report joins again whose members have all ended, and whose body was never recorded."""
        now = self._clock()
        if now - self._inspected_at < min(_CHECK_EVERY, self._grace):
            return
        self._inspected_at = now
        complete = self._store.complete_joins(self._source, quiet=self._grace, limit=_PAGE)
        due = [join for join in complete if self._is_due(join.id, now)]
        if due:
            self._broker.rejoin(due, finish=True, deadline=deadline())
            log_event("joins_finished", count=len(due))
        self._last_reported = {
            id: it for id, it in self._last_reported.items() if now - it[0] < _FORGET
        }

    def forget_reports(self) -> None:
        """Report complete joins again without a wait: Redis has lost what was pushed for them."""
        self._last_reported.clear()

    def _is_due(self, join: str, now: float) -> bool:
        at, wait = self._last_reported.get(join, (now, 0.0))
        if now - at < wait:
            return False
        self._last_reported[join] = (now, 2 * wait or _REPORT_AGAIN)
        return True
