"""Who is dead: the exact rule, on the leader's own clock.

A worker is dead if, within a window of ``worker_timeout``,

1. the leader polled both stores without a gap of more than a fifth of it,
2. the worker's beat counter changed in neither store,
3. Redis had no incident,
4. and, where workers of two or more hosts were alive and all of them fell silent, the window is
   doubled, once.

Never longer. A single worker, too, is dead after ``worker_timeout``. Counters and one local clock
leave no room for steps of the database's clock or for skew between machines.
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
    """What one poll showed."""

    dead: Sequence[UUID]
    """Newly dead: to be declared so."""
    live: frozenset[UUID]
    """Neither dead nor gone."""
    silent: frozenset[UUID]
    """Not heard of since the polls began, or began again: their reports may still wait."""
    unflushed: bool
    """A live worker has reports that Postgres does not have."""


@dataclass(slots=True)
class Liveness:
    """Watches the beats of one source's workers."""

    timeout: float
    _window: float = field(default=float("-inf"))
    """Since when silence counts."""
    _introduction: float = field(default=float("-inf"))
    """Since when every worker must have been heard before its reports are surely written."""
    _polled: float | None = None
    _watched: dict[UUID, _Watched] = field(default_factory=dict)

    def interrupted(self, at: float) -> None:
        """Redis had an incident or cannot be asked: silence before now does not count."""
        self._window = at

    def poll(
        self, at: float, rows: Sequence[WorkerRow], redis_beats: Mapping[UUID, int] | None
    ) -> Judgement:
        """Take what both stores say now (monotonic seconds; None: Redis cannot be asked) and judge."""
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
            # News to this leader, but perhaps an old row: silence counts from now. A row that came
            # after the polls began is a worker's first beat.
            self._watched[row.id] = _Watched(row.host, row.beat, redis_beat, at)
            return
        if row.beat != known.beat or (redis_beat is not None and redis_beat != known.redis_beat):
            known.changed_at = at
        known.beat = row.beat
        known.redis_beat = redis_beat if redis_beat is not None else known.redis_beat

    def _all_fell_silent(self, at: float) -> bool:
        """Whether workers of two hosts or more were alive, and all of them have fallen silent.

        All of them at once is rather a network's doing than that of their hosts. Beats are not
        simultaneous: who was heard a third of the window ago has missed a beat or more by now.
        """
        heard = [max(w.changed_at, self._window) for w in self._watched.values()]
        hosts = {w.host for w in self._watched.values()}
        return len(hosts) >= 2 and at - max(heard) >= self.timeout / 3
