"""Count the owed deliveries by queue, in slices: a count of ten million rows would miss its deadline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from uuid import UUID

from jobguard.reconciler.limiter import RowSlice
from jobguard.store.protocols import LeaderStore

_EVERY = 2.0
"""Seconds between two counts, at least."""
_SHARE = 50
"""A count takes at most one part in this many of the time."""


class Tally:
    """The number of owed deliveries in each queue of one source, some seconds old."""

    def __init__(self, store: LeaderStore, source: int, clock: Callable[[], float]) -> None:
        self._store = store
        self._source = source
        self._clock = clock
        self._slice = RowSlice(begin=5_000, most=100_000)
        self._counts: Mapping[str, int] = {}
        self._seen: set[str] = set()  # Queues of inspected deliveries, since the last count began.
        self._counting: Counter[str] = Counter()
        self._after: UUID | None = None
        self._took = 0.0
        self._due = float("-inf")
        self.total = 0
        """The number of all owed deliveries."""

    @property
    def queues(self) -> set[str]:
        """The queues that have owed deliveries, as far as is known."""
        return self._seen.union(self._counts)

    def of(self, queue: str) -> int:
        """Return the number of owed deliveries of a queue."""
        return self._counts.get(queue, 0)

    def saw(self, queues: Iterable[str]) -> None:
        """Record that a delivery of each of these queues is owed."""
        self._seen.update(queues)

    def step(self) -> None:
        """Count one slice, if a count is due. Raises StoreUnavailable."""
        began = self._clock()
        if began < self._due:
            return
        if self._after is None:
            self._counting = Counter()
            self._took = 0.0
            self._seen.clear()
        rows = self._slice.rows
        counts, self._after = self._store.tally(self._source, after=self._after, limit=rows)
        self._counting.update(counts)
        took = self._clock() - began
        self._slice.took(took)
        self._took += took
        if self._after is None:
            self._counts, self.total = self._counting, self._counting.total()
            self._due = began + max(_EVERY, _SHARE * self._took)
