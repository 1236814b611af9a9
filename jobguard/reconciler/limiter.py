"""How many jobs may go back now: token buckets, and a fair order over queues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_BEGIN = 1 << 20
_LEAST = 1 << 10
_MOST = 8 << 20
_FAST = 0.25
_SLOW = 1.0
"""Seconds for one slice: the deadline of a push and the timeout of our client are not far beyond."""


class TokenBucket:
    """Grants ``rate`` permits a second, and a second's worth at once."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._burst = max(rate, 1.0)
        self._level = self._burst
        self._at = clock()

    def take(self, wanted: int) -> int:
        """Grant as many as there are, ``wanted`` at most."""
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        granted = min(wanted, int(self._level))
        self._level -= granted
        return granted

    def release(self, unused: int) -> None:
        """Take back permits that were not used."""
        self._level = min(self._burst, self._level + unused)


class Slice:
    """How many bytes go back in one go: fewer after a miss, more again after each that was fast."""

    def __init__(self) -> None:
        self.most_bytes = _BEGIN

    def missed(self) -> None:
        """It came too late, or took too long."""
        self.most_bytes = max(_LEAST, self.most_bytes // 4)

    def took(self, size: int, seconds: float) -> None:
        """So many bytes went back in this time."""
        if seconds > _SLOW:
            self.missed()
        elif seconds < _FAST and size >= self.most_bytes // 4:
            self.most_bytes = min(_MOST, 2 * self.most_bytes)


def round_robin(items: Iterable[T], queue_of: Callable[[T], str]) -> Iterator[T]:
    """Deal the items out queue by queue, so that no queue waits behind a longer one.

    Within a queue their order is kept.
    """
    by_queue: dict[str, list[T]] = {}
    for item in items:
        by_queue.setdefault(queue_of(item), []).append(item)
    places = max((len(items) for items in by_queue.values()), default=0)
    for nth in range(places):
        for column in by_queue.values():
            if nth < len(column):
                yield column[nth]
