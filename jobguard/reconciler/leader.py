"""Leadership: a lease with terms.

::

    standby ──elect: the lease is free──► leads term n ──renew every lease/3──► leads term n
       ▲                                       │
       └── the lease was not renewed in ───────┘
           time, or another process has
           a newer term

The lease is a row in Postgres, and its end is a time of the Postgres clock. The leader trusts its
term only until shortly before the lease can end. It counts that time on its own monotonic clock,
from *before* it sent the request. Therefore a leader that was stopped, or whose answer was slow,
steps down before another process can be elected. Every write of a leader names its term and locks
the lease row, and every push into Redis carries a deadline in the Redis clock: a stale leader
changes neither store.

A process whose election fails stays a standby. A leader whose renewal fails leads on until its
trust ends, because Postgres may only have been slow.

A standby that has watched the consumers of the last term can vouch for them (see
reconciler/vigil.py); a process that has just started, or could not watch in an outage, cannot.
Therefore such a process leaves a lease that has just become free to the others for a moment.

If the answer to an election was lost, the process has the lease without knowing it. Its next election
takes the lease again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from jobguard.errors import NotLeading, StoreUnavailable
from jobguard.log import log_event, remind
from jobguard.store.protocols import LeaderStore

_HOLD_OFF = 2.0
"""Seconds in which other processes may be elected after this one gave up."""
_MARGIN = 0.1
"""Fraction of the lease: how much earlier than its end the leader steps down."""
_PRECEDENCE = 0.1
"""Fraction of the lease: how long only those that have watched may take a lease that has become free.
It is longer than two of their attempts are apart."""
_WATCHED = 2.0
"""Length of a sufficient watch, in leases: a time without a leader is about one lease long."""


class Leadership:
    """Holds the lease of one namespace, in its own thread, until stopped."""

    def __init__(
        self,
        store: LeaderStore,
        *,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
        healthy: Callable[[], bool] = lambda: True,
        watched_for: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """Create a standby. ``watched_for``: for how long this process has watched the consumers."""
        self._store = store
        self._lease = lease
        self._clock = clock
        self._term: int | None = None
        self._trusted_until = float("-inf")
        self._away = False
        self._answered_at: float | None = None
        self._healthy = healthy
        self._watched_for = watched_for
        self._not_before = float("-inf")
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def term(self) -> int:
        """The term that this process surely holds now. Raises NotLeading."""
        if self._term is None or self._clock() >= self._trusted_until:
            raise NotLeading
        return self._term

    @property
    def leads(self) -> bool:
        """True if this process surely holds a term now."""
        return self._term is not None and self._clock() < self._trusted_until

    def seek(self) -> None:
        """Renew the term, or try to be elected.

        Do neither while this process is stuck, and do not stand for election shortly after it gave
        up.
        """
        asked = self._clock()
        if not self._healthy():
            log_event("lease_unrenewed", error="this process is stuck")
            return
        if self._term is None and asked < self._not_before:
            return
        try:
            if self._term is not None:
                self._store.renew(self._term, lease=self._lease)
            else:
                self._term = self._store.elect(lease=self._lease, patience=self._patience())
                if self._term is None:
                    self._answered()
                    return
                log_event("leader_elected", term=self._term)
        except NotLeading:
            log_event("leader_lost", term=self._term)
            self._term = None
            return
        except StoreUnavailable as error:
            self._away = True
            log_event("lease_unrenewed", error=str(error))
            return
        self._answered()
        self._trusted_until = asked + self._lease * (1 - _MARGIN)
        self._changed.set()

    def _patience(self) -> float:
        """Return how long the lease must have been free: a process without a watch lets others go first.

        A process that makes one pass has no time for that.
        """
        if self._thread is None or self._watched_for() >= _WATCHED * self._lease:
            return 0.0
        return _PRECEDENCE * self._lease

    def silent_for(self) -> float | None:
        """Return the seconds since Postgres last answered; None: it never has."""
        return None if self._answered_at is None else self._clock() - self._answered_at

    def _answered(self) -> None:
        self._answered_at = self._clock()
        if self._away:
            self._away = False
            log_event("postgres_back")

    def start(self) -> None:
        """Start the thread that seeks and keeps the lease."""
        self._thread = threading.Thread(target=self._keep, name="jobguard-lease", daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait until this process leads; return False after ``timeout`` seconds."""
        deadline = self._clock() + timeout
        while not self.leads and not self._stop.is_set():
            left = deadline - self._clock()
            if left <= 0:
                return False
            self._changed.wait(left)
            self._changed.clear()
        return self.leads

    def _keep(self) -> None:
        while not self._stop.is_set():
            try:
                self.seek()
            except Exception as error:
                log_event("step_failed", part="lease", error=str(error), exc_info=True)
            remind()
            # A standby asks more often, because users wait during the time without a leader.
            self._stop.wait(self._lease * (0.3 if self._term is not None else 0.03))

    def give_up(self) -> None:
        """Resign, and let any other process lead first: this one makes no progress in this term."""
        self._not_before = self._clock() + _HOLD_OFF
        self._resign()

    def stop(self) -> None:
        """Resign, so that another process can lead at once."""
        self._stop.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join(timeout=self._lease)
        self._resign()

    def _resign(self) -> None:
        term, self._term = self._term, None
        if term is None:
            return
        try:
            self._store.resign(term)
            log_event("leader_resigned", term=term)
        except StoreUnavailable as error:
            log_event("lease_unrenewed", error=str(error))
