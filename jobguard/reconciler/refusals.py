"""Jobs that cannot be put back: one state, with one log line, one incident, and one probe a second.

Redis takes no writes, or this reconciler cannot unseal the envelopes.

During this state one job is tried each second. After each job that is stored, twice as many are
tried. The state ends when nothing was refused for a while, or when no job is left to restore.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jobguard.log import log_event
from jobguard.model import Cause
from jobguard.store.protocols import LeaderStore

_PROBE = 1.0
"""Seconds from a refusal to the next try."""
_QUIET = 5.0
"""Seconds without a refusal after which the state ends, if a job was stored."""
_ALL = 1 << 30


class Kind(NamedTuple):
    """Why jobs cannot be put back, in the incident and in the log."""

    detail: str
    begins: Callable[..., None]
    ends: Callable[..., None]
    forget: float
    """Seconds without a refusal after which the state ends, if no job was tried."""


REFUSED = Kind(
    "Redis refuses to store jobs: ",
    partial(log_event, "redis_refuses"),
    partial(log_event, "redis_accepts"),
    60.0,
)
# Longer than the time between two tries of one job; see restore.py.
SEALED = Kind(
    "envelopes cannot be unsealed: ",
    partial(log_event, "envelopes_sealed"),
    partial(log_event, "envelopes_unsealed"),
    150.0,
)


class Refusals:
    """The state of one source."""

    def __init__(
        self,
        store: LeaderStore,
        source: int,
        address: str,
        clock: Callable[[], float],
        kind: Kind = REFUSED,
    ) -> None:
        self._kind = kind
        self._store = store
        self._source = source
        self._address = address
        self._clock = clock
        self._since: float | None = None
        self._last = float("-inf")
        self._most = _ALL
        self._count = 0
        self._incident: int | None = None
        self._resume()

    def _resume(self) -> None:
        """Continue from the incident that an earlier leader recorded."""
        for incident in self._store.incidents(self._source):
            if incident.cause is Cause.PUSH and incident.detail.startswith(self._kind.detail):
                self._incident = incident.id
                self._since = self._clock() - incident.age
                self._last = self._clock() - self._kind.forget / 2
                self._most = 1

    @property
    def open(self) -> bool:
        """True if Redis refuses writes, as far as is known."""
        return self._since is not None

    def most(self) -> int:
        """Return how many jobs may be tried now."""
        if self._since is None:
            return _ALL
        return 0 if self._clock() - self._last < _PROBE else self._most

    def refused(self, term: int, reason: str, waiting: int) -> None:
        """Record that Redis refused a write just now, while ``waiting`` jobs wait."""
        now = self._clock()
        self._last, self._most = now, 1
        self._count += 1
        self._kind.begins(source=self._address, error=reason, waiting=waiting)
        if self._since is None:
            self._since, self._count = now, 1
        if self._incident is None:
            self._incident = self._store.open_incident(
                term, self._source, Cause.PUSH, f"{self._kind.detail}{reason}", None
            )
            self._store.progress(term, self._incident, missing=waiting, restored=0, close=False)

    def stored(self, term: int, count: int) -> None:
        """Record that Redis stored ``count`` jobs just now."""
        if self._since is None or not count:
            return
        self._most = min(_ALL, max(2 * self._most, 2 * count))
        if self._incident is not None:
            self._store.progress(term, self._incident, missing=0, restored=count, close=False)
        if self._clock() - self._last >= _QUIET:
            self._over(term)

    def step(self, term: int, *, waits: bool) -> None:
        """End the state if nothing was refused for a long time.

        ``waits``: jobs are left to try.
        """
        if (
            self._since is not None
            and not waits
            and self._clock() - self._last >= self._kind.forget
        ):
            self._over(term)

    def _over(self, term: int) -> None:
        assert self._since is not None
        self._kind.ends(
            source=self._address,
            seconds=round(self._clock() - self._since, 1),
            refused=self._count,
        )
        if self._incident is not None:
            self._store.progress(term, self._incident, missing=0, restored=0, close=True)
        self._since, self._incident, self._most, self._count = None, None, _ALL, 0
