"""The automatic hold: too many unexplained absences in a queue hold it until a person resumes it.

A ``DEL`` of an operator, a tool that empties queues, and a wrong database all look like a loss. A
confirmed loss has a cause and is not counted here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_MINUTE = 60.0
_FEW = 10
"""Up to this count the share is not checked: one of twenty jobs is already five percent."""


class AutomaticHold:
    """Counts unexplained absences for each queue, over one minute."""

    def __init__(
        self, *, count: int, share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._count = count
        self._share = share
        self._clock = clock
        self._seen: dict[str, deque[float]] = {}

    def exceeded(self, queue: str, absent: int, owed: int) -> bool:
        """Count new absences of a queue with ``owed`` jobs; return True if there are too many."""
        now = self._clock()
        seen = self._seen.setdefault(queue, deque())
        seen.extend([now] * absent)
        while seen and now - seen[0] > _MINUTE:
            seen.popleft()
        total = len(seen)
        return total > self._count or (total > _FEW and total > self._share * owed)

    def forget(self, queue: str) -> None:
        """Start the count again, after the queue was held or resumed."""
        self._seen.pop(queue, None)
