"""Run a job alone in its process after a worker died while it held that job.

Several jobs share a process where a pool of threads or greenlets runs them. If the process dies, the
ledger cannot tell which of them killed it, and charges each of them once. A job that is charged already
runs alone from then on: it starts when nothing else of ours runs in the process, and nothing else of
ours starts beside it. The leader then charges it again only if it was alone at the next death.

A job that waits here holds no claim: it must not look as if it ran. Every wait has a bound, because a
running job may wait for a job that waits here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

from jobguard import os_threads

PATIENCE = 300.0
"""Seconds for which a start waits for its turn at most."""
_DRAIN = 60.0
"""Seconds for which nothing else starts while a charged job waits for the running ones."""
_STEP = 0.02
"""Seconds between two looks."""


class Alone:
    """Which deliveries run in this process, and which of them runs alone."""

    def __init__(
        self,
        *,
        patience: float = PATIENCE,
        drain: float = _DRAIN,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._patience, self._drain = patience, drain
        self._clock = clock
        self._sleep = sleep
        self._lock = os_threads.lock()
        self._inside: list[UUID] = []
        """One entry for each start: two copies of one delivery may start at once."""
        self._only: UUID | None = None
        """The delivery that runs alone, or waits until it can."""
        self._open_at = 0.0
        """From then on others start beside it."""

    def after_fork(self) -> None:
        """In a forked child: nothing runs here yet, and no thread of the parent holds the lock."""
        self._lock = os_threads.lock()
        self._inside, self._only = [], None

    def enter(self, token: UUID) -> None:
        """Wait while another delivery runs alone; then count this start."""
        until = self._clock() + self._patience
        while not self.enters(token, anyway=self._clock() >= until):
            self._wait()

    def enters(self, token: UUID, *, anyway: bool = False) -> bool:
        """Count this start; False: it has to wait, because another delivery runs alone."""
        with self._lock:
            if self._only is not None and not anyway and self._clock() < self._open_at:
                return False
            self._inside.append(token)
            return True

    def leave(self, token: UUID) -> None:
        """One start of it is over."""
        with self._lock:
            if token in self._inside:
                self._inside.remove(token)
            if self._only == token and token not in self._inside:
                self._only = None

    def take(self, token: UUID) -> bool:
        """Keep all others out if nothing else runs; False: something else does."""
        with self._lock:
            if self._inside != [token] or self._only is not None:
                return False
            self._reserve(token, self._patience)
            return True

    def wait(self, token: UUID) -> None:
        """Leave, and enter again when nothing else runs; later than that in company."""
        self.leave(token)
        until = self._clock() + self._patience
        while not self._reserved(token):
            if self._clock() >= until:
                self.enters(token, anyway=True)
                return
            self._wait()
        drained = self._clock() + self._drain
        while not self._took_over(token, late=self._clock() >= drained):
            self._wait()

    def _reserved(self, token: UUID) -> bool:
        with self._lock:
            if self._only is not None and self._clock() < self._open_at:
                return False
            self._reserve(token, self._drain + self._patience)
            return True

    def _took_over(self, token: UUID, *, late: bool) -> bool:
        """Enter; ``late``: beside what runs, and let others in again."""
        with self._lock:
            if self._inside and not late:
                return False
            if self._inside and self._only == token:
                self._only = None
            self._inside.append(token)
            return True

    def _reserve(self, token: UUID, seconds: float) -> None:
        self._only, self._open_at = token, self._clock() + seconds

    def _wait(self) -> None:
        (self._sleep or time.sleep)(_STEP)
