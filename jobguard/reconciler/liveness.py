"""Decide which workers are dead, by an exact rule on the leader's own clock.

A worker is dead if, within a window of ``worker_timeout``,

1. the leader polled both stores without a gap of more than a fifth of it,
2. the worker's beat counter changed in neither store,
3. Redis had no incident,
4. and, where workers of two or more hosts were alive and all of them became silent, the window is
   doubled, once.

The window is never longer. A single worker is also dead after ``worker_timeout``. The rule uses
only counters and one local clock, so that steps of the database clock and skew between machines
have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from jobguard.store.protocols import WorkerRow


@dataclass(slots=True)
class _Watched:
    host: str
    beat: int
    redis_beat: int | None
    changed_at: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """The result of one poll."""

    dead: Sequence[UUID]
    """Workers that are newly dead, and are to be declared dead."""
    live: frozenset[UUID]
    """Workers that are neither dead nor have left."""
    silent: frozenset[UUID]
    """Workers without a new beat since the polls began, or began again: their reports may still be
    unwritten."""
    unflushed: bool
    """A live worker has reports that Postgres does not have."""


@dataclass(slots=True)
class Liveness:
    """Watches the beats of one source's workers."""

    timeout: float
    _window: float = field(default=float("-inf"))
    """The time from which silence counts."""
    _introduction: float = field(default=float("-inf"))
    """The time after which every worker must have beaten before its reports are surely written."""
    _polled: float | None = None
    _watched: dict[UUID, _Watched] = field(default_factory=dict)

    def interrupted(self, at: float) -> None:
        """Ignore silence before now: Redis had an incident or cannot be asked."""
        self._window = at

    def poll(
        self, at: float, rows: Sequence[WorkerRow], redis_beats: Mapping[UUID, int] | None
    ) -> Judgement:
        """Compare the beats of both stores with the last poll, and judge the workers.

        ``at`` is monotonic seconds. ``redis_beats`` is None if Redis cannot be asked.
        """
        if self._polled is None or at - self._polled > self.timeout / 5:
            self._window = self._introduction = at
        self._polled = at
        if redis_beats is None:
            self._window = at
            redis_beats = {}
        present = [row for row in rows if not row.left and not row.dead]
        for row in present:
            self._see(at, row, redis_beats.get(row.id))
        for gone in self._watched.keys() - {row.id for row in present}:
            del self._watched[gone]
        timeout = self.timeout * (2 if self._all_fell_silent(at) else 1)
        dead = [
            id for id, w in self._watched.items() if at - max(w.changed_at, self._window) >= timeout
        ]
        live = frozenset(self._watched) - frozenset(dead)
        silent = frozenset(id for id in live if self._watched[id].changed_at <= self._introduction)
        return Judgement(
            dead=dead,
            live=live,
            silent=silent,
            unflushed=any(row.unflushed_since is not None for row in present if row.id in live),
        )

    def _see(self, at: float, row: WorkerRow, redis_beat: int | None) -> None:
        known = self._watched.get(row.id)
        if known is None:
            # The row is new to this leader, but may be old: silence counts from now. A row that
            # appeared after the polls began is the first beat of a worker.
            self._watched[row.id] = _Watched(row.host, row.beat, redis_beat, at)
            return
        if row.beat != known.beat or (redis_beat is not None and redis_beat != known.redis_beat):
            known.changed_at = at
        known.beat = row.beat
        known.redis_beat = redis_beat if redis_beat is not None else known.redis_beat

    def _all_fell_silent(self, at: float) -> bool:
        """Return True if workers of two or more hosts were alive, and all of them have become silent.

        If all of them become silent at once, the cause is probably the network and not the hosts.
        Beats are not simultaneous: a worker that was last heard a third of the window ago has
        missed one beat or more.
        """
        heard = [max(w.changed_at, self._window) for w in self._watched.values()]
        hosts = {w.host for w in self._watched.values()}
        return len(hosts) >= 2 and at - max(heard) >= self.timeout / 3
