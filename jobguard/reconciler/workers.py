"""The workers of one source, as both stores see them: who beats, who is dead, and into which Redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

import redis

from jobguard.log import log_event
from jobguard.model import DROPPED_BY_LIVE_WORKER
from jobguard.pulse import beat_key
from jobguard.reconciler.liveness import Judgement, Liveness
from jobguard.redis_values import number_in
from jobguard.settings import Settings
from jobguard.store.protocols import LeaderStore, WorkerRow

_POLL = 0.5
"""Seconds between two polls of the workers' beats."""
_FORGET = 50.0
"""Seconds between two looks for rows of workers that are long gone."""
_NOBODY = Judgement(dead=(), live=frozenset(), silent=frozenset(), unflushed=False)


class Workers:
    """Polls the beats of one source's workers, and declares dead who is."""

    def __init__(
        self,
        client: redis.Redis,
        store: LeaderStore,
        source: int,
        settings: Settings,
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._store = store
        self._source = source
        self._clock = clock
        # Polls further apart than a fifth of the timeout would prove nobody dead.
        self._interval = min(_POLL, settings.worker_timeout / 10)
        self._liveness = Liveness(settings.worker_timeout)
        self._poll_at = 0.0
        self._forget_at = clock() + _FORGET
        self._beats: Mapping[UUID, int] = {}  # in this Redis
        self._first_beats: dict[UUID, int] = {}  # as this leader found them
        self._gone: set[UUID] = set()
        self._held: dict[UUID, int] = {}  # by the dead: how many claims, when that was first seen
        self._timeout = settings.worker_timeout
        self._strangers: dict[str, float] = {}  # ids that the ledger did not know, and since when
        self.rows: Sequence[WorkerRow] = ()
        self.judgement = _NOBODY
        self.polled = False
        """Whether anything is known yet."""
        self.deaths: dict[str, float] = {}
        """When a consumer of a queue last died or left."""

    def interrupted(self, now: float) -> None:
        """Redis had an incident: silence before now does not count."""
        self._liveness.interrupted(now)

    def poll(self, term: int, now: float, *, ask_redis: bool) -> bool:
        """See who beats, if it is time; True if somebody is newly gone."""
        if now < self._poll_at:
            return False
        self._poll_at = now + self._interval
        self.rows = self._store.workers(self._source)
        present = [row.id for row in self.rows if not row.left and not row.dead]
        beats = self._read_beats(present) if ask_redis else None
        self.judgement = self._liveness.poll(now, self.rows, beats)
        self._beats = beats or {}
        for id in present:
            self._first_beats.setdefault(id, self._beats.get(id, -1))
        if self.judgement.dead:
            self._store.declare_dead(term, self.judgement.dead)
        missed = self._record_deaths(now)
        if now >= self._forget_at:
            self._forget_at = now + _FORGET
            self._store.forget(term, [row.id for row in self.rows if row.left or row.dead])
            known = {row.id.hex for row in self.rows}
            self._held = {id: held for id, held in self._held.items() if id.hex in known}
            self._strangers = {id: at for id, at in self._strangers.items() if id not in known}
        self.polled = True
        return missed

    def _read_beats(self, present: Sequence[UUID]) -> dict[UUID, int] | None:
        if not present:
            return {}
        try:
            answers = self._client.mget([beat_key(id) for id in present])
        except redis.RedisError:
            return None
        beats: dict[UUID, int] = {}
        for id, answer in zip(present, answers, strict=True):
            beat = number_in(answer)
            if beat is not None:
                beats[id] = beat
            elif answer is not None:
                log_event("value_unreadable", source=self._source, key=beat_key(id))
        return beats

    def _record_deaths(self, now: float) -> bool:
        dead = frozenset(self.judgement.dead)
        missed = False
        for row in self.rows:
            if not (row.id in dead or row.dead or row.left) or row.id in self._gone:
                continue
            self._gone.add(row.id)
            self._held[row.id] = row.claims
            missed = True
            if self.polled:  # else it was gone when we came, nobody knows since when
                self.deaths.update((queue, now) for queue in row.queues)
            if row.id in dead:
                log_event(
                    "worker_dead",
                    worker=row.id,
                    name=row.name,
                    host=row.host,
                    pid=row.pid,
                    claims=row.claims,
                )
        return missed

    def alive(self) -> list[WorkerRow]:
        """Those that are neither gone nor dead, as far as is known."""
        return [row for row in self.rows if row.id in self.judgement.live]

    def is_silent(self, row: WorkerRow) -> bool:
        """Whether it has not been heard of since this leader began to listen."""
        return row.id in self.judgement.silent

    def beats_here(self, row: WorkerRow) -> bool:
        """Whether it beats into this very Redis; an old master has an old beat of it."""
        return self._beats.get(row.id, -1) > self._first_beats.get(row.id, -1)

    def listed(self) -> set[UUID]:
        """What the living list: they may be running it, claimed or not."""
        return {token for row in self.alive() for token in row.lists}

    def have_reported(self) -> bool:
        """Whether nobody alive may have reports that Postgres does not have."""
        return self.polled and not self.judgement.unflushed and not self.judgement.silent

    def may_be_dead(self) -> bool:
        """Whether one that holds claims has not been heard of since we began to listen."""
        return any(row.claims for row in self.rows if row.id in self.judgement.silent)

    def gone(self, name: str) -> bool:
        """Whether the worker of this name, or id in hex, is known to be dead or to have left.

        An id that the ledger does not know is that of a worker that is long gone, and forgotten; or of
        one that could not introduce itself yet, for Postgres was away. That it must have done by and by.
        """
        if not self.polled:
            return False
        if name == DROPPED_BY_LIVE_WORKER:
            return True
        rows = [row for row in self.rows if name in (row.name, row.id.hex)]
        if not rows:
            return _is_id(name) and self._is_unknown_for_long(name)
        dead = frozenset(self.judgement.dead)
        return all(row.left or row.dead or row.id in dead for row in rows)

    def died_alone(self, worker: UUID) -> bool:
        """Whether this worker held no more than one claim when it was found dead.

        Its claims are taken away page by page: what is left of them later says nothing.
        """
        return self._held.get(worker, 2) <= 1

    def _is_unknown_for_long(self, name: str) -> bool:
        now = self._clock()
        return now - self._strangers.setdefault(name, now) >= self._timeout

    def names(self) -> dict[str, frozenset[str]]:
        """The library's names of guarded workers by queue, the gone included: it names them, too."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            for queue in row.queues:
                found.setdefault(queue, set()).add(row.name)
        return {queue: frozenset(names) for queue, names in found.items()}


def _is_id(name: str) -> bool:
    try:
        return UUID(name).hex == name
    except ValueError:
        return False
