"""Bound the rate of restores with token buckets, and share it fairly between queues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_BEGIN = 1 << 20
_LEAST = 1 << 10
_MOST = 8 << 20
_SHORT = 0.01
_LONG = 0.04
"""Seconds of one statement: the pulse, the beats and the urgent inspections wait for it."""
_FAST = 0.25
_SLOW = 1.0
"""Seconds for one slice: the deadline of a push and the timeout of the Redis client are little
longer."""


class TokenBucket:
    """Grants ``rate`` permits in each second, and the permits of one second at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._burst = max(rate, 1.0)
        self._level = self._burst
        self._at = clock()

    def available(self) -> int:
        """Return how many permits could be granted now."""
        return int(min(self._burst, self._level + (self._clock() - self._at) * self._rate))

    def take(self, wanted: int) -> int:
        """Grant the available permits, ``wanted`` at most."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        granted = min(wanted, int(self._level))
        self._level -= granted
        return granted

    def release(self, unused: int) -> None:
        """Return unused permits."""
        self._level = min(self._burst, self._level + unused)


class Slice:
    """The number of bytes in one slice: smaller after a miss, larger after each fast slice."""

    def __init__(self) -> None:
        self.most_bytes = _BEGIN

    def missed(self) -> None:
        """Make the slice smaller, because a push was too late or too slow."""
        self.most_bytes = max(_LEAST, self.most_bytes // 4)

    def took(self, size: int, seconds: float) -> None:
        """Adapt the slice after ``size`` bytes were pushed in so many seconds."""
        if seconds > _SLOW:
            self.missed()
        elif seconds < _FAST and size >= self.most_bytes // 4:
            self.most_bytes = min(_MOST, 2 * self.most_bytes)


class RowSlice:
    """The number of rows in one statement: more after a fast one, fewer after a slow one."""

    def __init__(self, *, begin: int, most: int) -> None:
        self.rows = begin
        self._most = most

    def took(self, seconds: float) -> None:
        """Adapt the number after a statement took so many seconds."""
        if seconds > _LONG:
            self.rows = max(1, self.rows // 2)
        elif seconds < _SHORT:
            self.rows = min(self._most, 2 * self.rows)


def round_robin(items: Iterable[T], queue_of: Callable[[T], str]) -> Iterator[T]:
    """Yield the items queue by queue, so that no queue waits behind a longer one.

    The order within a queue is kept.
    """
    by_queue: dict[str, list[T]] = {}
    for item in items:
        by_queue.setdefault(queue_of(item), []).append(item)
    places = max((len(items) for items in by_queue.values()), default=0)
    for nth in range(places):
        for column in by_queue.values():
            if nth < len(column):
                yield column[nth]
