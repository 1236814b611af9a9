"""The brake that pulls itself: too many unexplained absences in a queue hold it until a person looks.

A runbook's ``DEL``, a tool that empties queues, a wrong database: they all look like loss. A confirmed
loss has a cause and never gets here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_MINUTE = 60.0
_FEW = 10
"""Below this many the share says nothing: one of twenty jobs is five percent of them."""


class AutomaticHold:
    """Counts unexplained absences by queue, over a minute."""

    def __init__(
        self, *, count: int, share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._count = count
        self._share = share
        self._clock = clock
        self._seen: dict[str, deque[float]] = {}

    def exceeded(self, queue: str, absent: int, owed: int) -> bool:
        """Note that many more absences of a queue with ``owed`` jobs; whether that is too many."""
        now = self._clock()
        seen = self._seen.setdefault(queue, deque())
        seen.extend([now] * absent)
        while seen and now - seen[0] > _MINUTE:
            seen.popleft()
        total = len(seen)
        return total > self._count or (total > _FEW and total > self._share * owed)

    def forget(self, queue: str) -> None:
        """The queue was held, or resumed: count anew."""
        self._seen.pop(queue, None)
