"""The workers of one source, as both stores see them: which beat, which are dead, and into which Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import redis

from jobguard.log import log_event
from jobguard.model import DROPPED_BY_LIVE_WORKER, Owed
from jobguard.pulse import beat_key
from jobguard.reconciler.liveness import Judgement, Liveness
from jobguard.redis_values import number_in
from jobguard.settings import Settings
from jobguard.store.protocols import LeaderStore, WorkerRow

_POLL = 0.5
"""Seconds between two polls of the workers' beats."""
_FORGET = 50.0
"""Seconds between two searches for rows of workers that left or died long ago."""
_SHOWN_AFTER_DEATH = 15.0
"""Seconds for which Redis may show a worker as alive that has ended."""
_NO_JUDGEMENT = Judgement(dead=(), live=frozenset(), silent=frozenset(), unflushed=False)


@dataclass(slots=True)
class _Elsewhere:
    """A worker that reads another pulse than that of this Redis."""

    since: float
    beat: int
    beats: int = 0
    """How often it has beaten since."""

    def see(self, beat: int) -> None:
        """Note its beat of now."""
        if beat != self.beat:
            self.beat, self.beats = beat, self.beats + 1

    def is_certain(self, now: float, timeout: float) -> bool:
        """Return True if it would have read the pulse of this Redis by now."""
        return self.beats >= 2 and now - self.since >= timeout


class Workers:
    """Polls the beats of one source's workers, and declares workers dead."""

    def __init__(
        self,
        client: redis.Redis,
        store: LeaderStore,
        source: int,
        settings: Settings,
        clock: Callable[[], float],
        epoch: UUID | None = None,
    ) -> None:
        """``epoch``: that of the pulse, as the leader before left it."""
        self._client = client
        self._store = store
        self._source = source
        self._clock = clock
        self._epoch = epoch
        self._epoch_at = float("-inf")  # When the pulse got its epoch, if that was since.
        self._elsewhere: dict[UUID, _Elsewhere] = {}  # Workers of another pulse.
        # With more than a fifth of the timeout between two polls, no worker could be proved dead.
        self._interval = min(_POLL, settings.worker_timeout / 10)
        self._liveness = Liveness(settings.worker_timeout)
        self._poll_at = 0.0
        self._forget_at = clock() + _FORGET
        self._beats: Mapping[UUID, int] = {}  # In this Redis.
        self._first_beats: dict[UUID, int] = {}  # The beats that this leader found first.
        self._gone: set[UUID] = set()
        # For each dead worker: its number of claims when it was found dead, counted up to two.
        self._claims_at_death: dict[UUID, int] = {}
        # And how often its jobs were charged by then: the two highest numbers.
        self._charges_at_death: dict[UUID, Sequence[int]] = {}
        self._timeout = settings.worker_timeout
        # Ids that the ledger does not know, and since when.
        self._unknown_ids: dict[str, float] = {}
        # Names of live workers without a row, and since when; and all names that had one.
        self._unlisted: dict[str, float] = {}
        self._listed: set[str] = set()
        self.rows: Sequence[WorkerRow] = ()
        self.judgement = _NO_JUDGEMENT
        self.polled = False
        """True after the first poll."""
        self.deaths: dict[str, float] = {}
        """For each queue: when a consumer last left, or was last found dead."""

    def interrupted(self, now: float) -> None:
        """Ignore silence before now: Redis had an incident."""
        self._liveness.interrupted(now)

    def poll(self, term: int, now: float, *, ask_redis: bool, judge_redis: bool = True) -> bool:
        """Read the beats, if it is time; return True if a worker is newly dead or has newly left.

        ``judge_redis``: silence in this Redis may show a death; if not, nobody is declared dead.
        """
        if now < self._poll_at:
            return False
        self._poll_at = now + self._interval
        self.rows = self._store.workers(self._source)
        present = [row.id for row in self.rows if not row.left and not row.dead]
        beats = self._read_beats(present) if ask_redis else None
        self.judgement = self._liveness.poll(now, self.rows, beats if judge_redis else None)
        self._beats = beats or {}
        for id in present:
            self._first_beats.setdefault(id, self._beats.get(id, -1))
        declared: Mapping[UUID, int] = {}
        if self.judgement.dead:
            declared = self._store.declare_dead(term, self.judgement.dead)
        missed = self._record_deaths(now, declared)
        if now >= self._forget_at:
            self._forget_at = now + _FORGET
            self._store.forget(term, [row.id for row in self.rows if row.left or row.dead])
            self._forget_unlisted()
        self.polled = True
        return missed

    def poll_for(self, term: int, now: float, page: Iterable[Owed]) -> bool:
        """Poll at once if a claim of this page is void that was live at the last poll; see poll.

        Its worker may have died or left since then, and a death must be known with all claims that the
        worker had, before the first of them is removed.
        """
        live = self.judgement.live
        if not any(owed.claim_worker in live and not owed.claim_live for owed in page):
            return False
        self._poll_at = now
        return self.poll(term, now, ask_redis=True)

    def _forget_unlisted(self) -> None:
        """Forget workers whose rows are deleted, and unknown ids that have a row by now."""
        known = {row.id for row in self.rows}
        self._gone &= known
        memories: tuple[dict[UUID, Any], ...] = (
            self._first_beats,
            self._claims_at_death,
            self._charges_at_death,
        )
        for memory in memories:
            for id in memory.keys() - known:
                del memory[id]
        for name in self._unknown_ids.keys() & {id.hex for id in known}:
            del self._unknown_ids[name]

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

    def _record_deaths(self, now: float, claims: Mapping[UUID, int]) -> bool:
        dead = frozenset(self.judgement.dead)
        gone = [
            row
            for row in self.rows
            if (row.id in dead or row.dead or row.left) and row.id not in self._gone
        ]
        # Ask first, because this can fail: a worker in ``_gone`` is not inspected again.
        several = [row.id for row in gone if row.claims > 1 and not row.left]
        if several:
            self._charges_at_death.update(self._store.charges(self._source, several))
        for row in gone:
            self._gone.add(row.id)
            self._claims_at_death[row.id] = row.claims
            # Nobody knows when one died that was dead before this leader began.
            if row.left_age is not None or self.polled:
                self._note_departure(row, now - (row.left_age or 0.0))
            if row.id in dead or (row.dead and self.polled):
                log_event(
                    "worker_dead",
                    worker=row.id,
                    name=row.name,
                    host=row.host,
                    pid=row.pid,
                    claims=claims.get(row.id, row.claims),
                )
        return bool(gone)

    def _note_departure(self, row: WorkerRow, at: float) -> None:
        for queue in row.queues:
            self.deaths[queue] = max(at, self.deaths.get(queue, at))

    def alive(self) -> list[WorkerRow]:
        """Return the workers that have neither left nor died, as far as is known."""
        return [row for row in self.rows if row.id in self.judgement.live]

    def is_silent(self, row: WorkerRow) -> bool:
        """Return True if no beat of it was seen since this leader began to poll."""
        return row.id in self.judgement.silent

    def beats_here(self, row: WorkerRow) -> bool:
        """Return True if it beats into this Redis; an old master has an old beat of it."""
        return self._beats.get(row.id, -1) > self._first_beats.get(row.id, -1)

    def have_reported(self) -> bool:
        """Return True if every live worker has flushed its reports."""
        return self.polled and not self.judgement.unflushed and not self.judgement.silent

    def may_be_dead(self) -> bool:
        """Return True if a worker that has claims has not beaten since this leader began to poll."""
        return any(row.claims for row in self.rows if row.id in self.judgement.silent)

    def gone(self, name: str) -> bool:
        """Return True if the worker with this name, or this id in hex, is known to be dead or to have left.

        An unknown id belongs to a worker that is long gone and was forgotten, or to one that could
        not register yet because Postgres was away. The second kind registers within
        ``worker_timeout``; only after that time an unknown id counts as gone.
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

    def is_unregistered(self, worker: UUID) -> bool:
        """Return True if this worker is not in the ledger, and may be alive and register soon.

        It started while Postgres was away, and its claim was in the stream.
        """
        return all(row.id != worker for row in self.rows) and not self.gone(worker.hex)

    def is_cause(self, worker: UUID, crashes: int) -> bool:
        """Return True if a job that is charged this often has caused the death of its worker.

        The worker had no other claim when it was found dead, or only claims of jobs that are charged
        less often. Its claims are voided page by page, so that a later count would be too low.
        """
        if self._claims_at_death.get(worker, 2) <= 1:
            return True
        highest, second = (*self._charges_at_death.get(worker, ()), crashes, crashes)[:2]
        return second < crashes == highest

    def _is_unknown_for_long(self, name: str) -> bool:
        now = self._clock()
        return now - self._unknown_ids.setdefault(name, now) >= self._timeout

    def named_by(self, sessions: Mapping[str, str]) -> frozenset[str]:
        """Return the names of these workers that the ledger knows by the id in hex of their session."""
        known = {row.id.hex for row in self.rows}
        return frozenset(name for name, session in sessions.items() if session in known)

    def not_in_ledger(self, alive: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        """Return the guarded workers without a row: those that may register soon, and all others.

        ``alive``: the names of the guarded workers that Redis shows to be alive. One that never registers
        reports to another ledger or namespace: here it is as good as unguarded.
        """
        if not self.polled:
            return frozenset(), frozenset()
        self._listed = (self._listed & alive) | {row.name for row in self.rows}
        unlisted, now = alive - self._listed, self._clock()
        self._unlisted = {name: self._unlisted.get(name, now) for name in unlisted}
        bound = self._timeout + _SHOWN_AFTER_DEATH
        soon = frozenset(name for name, since in self._unlisted.items() if now - since < bound)
        return soon, unlisted - soon

    def elsewhere(self, epoch: UUID | None) -> tuple[list[WorkerRow], list[WorkerRow]]:
        """Return the live workers of another Redis: those that may see the pulse soon, and all others.

        ``epoch``: that of the pulse in this Redis. A worker of another Redis reads another pulse there, or
        none. A worker of this Redis reads a new pulse within two beats, unless it dies before them.
        """
        now = self._clock()
        if epoch != self._epoch:
            self._epoch, self._epoch_at = epoch, now
            self._elsewhere = {}  # None of them can have read this pulse yet.
        found = [row for row in self.alive() if row.pulse is not None and row.pulse[0] != epoch]
        self._elsewhere = {
            row.id: self._elsewhere.get(row.id) or _Elsewhere(now, row.beat) for row in found
        }
        for row in found:
            self._elsewhere[row.id].see(row.beat)
        certain = [row for row in found if self._elsewhere[row.id].is_certain(now, self._timeout)]
        if now - self._epoch_at < self._timeout:
            return [], certain
        return [row for row in found if row not in certain], certain

    def names(self) -> dict[str, frozenset[str]]:
        """Return the library's names of guarded workers by queue.

        Workers that are gone are included, because the library still names them.
        """
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
