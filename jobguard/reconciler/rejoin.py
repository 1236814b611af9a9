"""Joins that the library counts in Redis: a chord's results, a group's barrier.

What it has counted is lost with Redis. The ledger knows which members have ended and what they left; so
the count is put back before any member is, and a join whose members have all ended, of which nothing
has come, is told to the library once more.
"""

from __future__ import annotations

from collections.abc import Callable

from jobguard.adapter import Broker
from jobguard.log import log_event
from jobguard.store.protocols import LeaderStore

_PAGE = 500
_MEND_AGAIN = 1.0
"""Seconds between two rounds while what was lost is being put back: it may be lost once more."""
_CHECK_EVERY = 2.0
"""Seconds between two looks for joins of which nothing has come."""
_TELL_AGAIN = 30.0
"""Seconds in which something should have come of a join that was told again; doubled each time."""
_FORGET = 3600.0


class Rejoiner:
    """Sees to one source's joins."""

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
        self._mended_at = float("-inf")
        self._inspected_at = float("-inf")
        self._last_told: dict[
            str, tuple[float, float]
        ] = {}  # by join: when, and how long to wait now

    def mend(self, deadline: float) -> None:
        """Put back what is missing of every open join. Raises RedisError."""
        if self._clock() - self._mended_at < _MEND_AGAIN:
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
        self._mended_at = self._clock()
        if count:
            log_event("joins_mended", count=count)

    def finish(self, deadline: Callable[[], float]) -> None:
        """Tell the library again of joins whose members have all ended, of which nothing has come."""
        now = self._clock()
        if now - self._inspected_at < min(_CHECK_EVERY, self._grace):
            return
        self._inspected_at = now
        complete = self._store.complete_joins(self._source, quiet=self._grace, limit=_PAGE)
        due = [join for join in complete if self._is_due(join.id, now)]
        if due:
            self._broker.rejoin(due, finish=True, deadline=deadline())
            log_event("joins_finished", count=len(due))
        self._last_told = {id: it for id, it in self._last_told.items() if now - it[0] < _FORGET}

    def _is_due(self, join: str, now: float) -> bool:
        at, wait = self._last_told.get(join, (now, 0.0))
        if now - at < wait:
            return False
        self._last_told[join] = (now, 2 * wait or _TELL_AGAIN)
        return True
