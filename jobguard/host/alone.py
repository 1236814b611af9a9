"""Run a job alone in its process after a worker died while that job ran.

Several jobs share a process where a pool of threads or greenlets runs them. If the process dies,
the ledger cannot tell which of the jobs killed it, and charges each of them once. A job that is
already charged runs alone from then on: it starts when no other guarded job runs in the process,
and no other guarded job starts beside it. The leader then charges the job again only if it was
alone at the next death.

A job that waits here has no claim, because it must not look as if it ran. Every wait has a bound,
because a running job may wait for a job that waits here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from uuid import UUID

from jobguard import os_threads

PATIENCE = 300.0
"""The maximum seconds that a start waits for its turn."""
_DRAIN = 60.0
"""Seconds for which no other job starts while a charged job waits for the running jobs."""
_STEP = 0.02
"""Seconds between two checks."""


class Alone:
    """The deliveries that run in this process, and the one that runs alone."""

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
        """One entry for each start, because two copies of one delivery may start at once."""
        self._only: UUID | None = None
        """The delivery that runs alone, or waits until it can."""
        self._open_at = 0.0
        """The time from which other deliveries may start beside the one that runs alone."""

    def after_fork(self) -> None:
        """Reset the state in a forked child: no delivery runs there, and no thread of the parent."""
        self._lock = os_threads.lock()
        self._inside, self._only = [], None

    def enter(self, token: UUID) -> None:
        """Wait while another delivery runs alone; then count this start."""
        until = self._clock() + self._patience
        while not self.enters(token, anyway=self._clock() >= until):
            self._wait()

    def enters(self, token: UUID, *, anyway: bool = False) -> bool:
        """Count this start; return False if it must wait because another delivery runs alone."""
        with self._lock:
            if self._only is not None and not anyway and self._clock() < self._open_at:
                return False
            self._inside.append(token)
            return True

    def leave(self, token: UUID) -> None:
        """Record that one start of this delivery is over."""
        with self._lock:
            if token in self._inside:
                self._inside.remove(token)
            if self._only == token and token not in self._inside:
                self._only = None

    def take(self, token: UUID) -> bool:
        """Reserve the process for this delivery; return False if another delivery runs here."""
        with self._lock:
            if self._inside != [token] or self._only is not None:
                return False
            self._reserve(token, self._patience)
            return True

    def wait(self, token: UUID) -> None:
        """Leave, and enter again when no other delivery runs, or, after the time limit, beside others."""
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
        """Count this start; if ``late``, start beside the running deliveries and admit others again."""
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
