"""A ledger in memory that gives the same answers as Postgres: for our tests, and for yours.

The tables of the schema as dicts, one lock where Postgres has transactions, and a clock that can
be handed in where Postgres has ``now()``::

    ledger = MemoryLedger()
    host, leader = ledger.host(), ledger.leader("default", uuid4())

``ledger.down = True`` is an outage: every call raises StoreUnavailable until it is False again.

Not good for anything that must outlive the process.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from jobguard.errors import BadRow, ConfigurationError, NotLeading, StoreUnavailable
from jobguard.job import (
    Beat,
    Cause,
    Claim,
    Delivery,
    End,
    Ended,
    EndedPart,
    Fate,
    OpenJoin,
    Outcome,
    Owed,
    Parent,
    Part,
    Recorded,
    Refusal,
    Refused,
    Restorable,
    Unknown,
)
from jobguard.store import (
    Ask,
    BeatReply,
    Brake,
    Closing,
    HostStore,
    Incident,
    LeaderStore,
    QueueRow,
    SourceRow,
    Void,
    WorkerRow,
)

_Key = tuple[int, UUID]
"""(source, token), as in every table."""

_WATCHED = 300.0
"""Seconds after a leader's last tick in a source's Redis in which it surely watches it."""
_DAY = 86400.0
_SMALLINT = range(-(2**15), 2**15)
_KEPT = (Outcome.FAILED, Outcome.DEAD)
"""What a person may requeue: the envelope stays in history."""


@dataclass(slots=True)
class _Job:
    delivery: Delivery
    recorded_at: float
    recoveries: int = 0
    crashes: int = 0
    claims: int = 0
    not_before: float | None = None
    declined: int = 0

    def inherit(self, older: _Job) -> None:
        self.recoveries = max(self.recoveries, older.recoveries)
        self.crashes = max(self.crashes, older.crashes)


@dataclass(slots=True)
class _Run:
    number: int
    nonce: UUID
    worker: UUID
    pid: int
    claimed_at: float
    heartbeat_at: float | None = None
    progress: float | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Tombstone:
    outcome: Outcome
    ended_at: float
    job_id: str = ""
    queue: str = ""
    task: str = ""
    attempt: int = 1
    recoveries: int = 0
    crashes: int = 0
    number: int | None = None
    worker: UUID | None = None
    next: UUID | None = None
    error: str | None = None
    envelope: bytes | None = None
    recorded_at: float | None = None
    claimed: bool = False


@dataclass(slots=True)
class _Worker:
    source: int
    beat: Beat
    claims: frozenset[UUID]
    started_at: float
    beat_at: float
    previous_beat_at: float
    left_at: float | None = None
    dead_at: float | None = None

    @property
    def gone(self) -> bool:
        return self.left_at is not None or self.dead_at is not None


@dataclass(frozen=True, slots=True)
class _Suspect:
    cause: Cause
    mark: str
    seen_at: float


@dataclass(slots=True)
class _Join:
    size: int = 0
    state: bytes = b""
    opened_at: float = 0.0
    closed_at: float | None = None
    closed_by: UUID | None = None
    parts: dict[str, tuple[float, EndedPart]] = field(default_factory=dict)
    """By job id: when it ended, and what it left."""


@dataclass(slots=True)
class _Lease:
    term: int
    holder: UUID
    expires_at: float
    held: dict[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(slots=True)
class _Loss:
    source: int
    cause: Cause
    detail: str
    opened_at: float
    epoch: UUID | None
    missing: int = 0
    restored: int = 0
    closed: bool = False


class _Tables:
    """The tables, and what more than one statement asks of them. Use only inside ``open()``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.down = False
        self.lock = threading.RLock()
        self.installation = str(uuid4())
        self.jobs: dict[_Key, _Job] = {}
        self.running: dict[_Key, _Run] = {}
        self.history: dict[_Key, _Tombstone] = {}
        self.workers: dict[UUID, _Worker] = {}
        self.suspects: dict[_Key, _Suspect] = {}
        self.outbox: dict[_Key, tuple[float, bool]] = {}
        """When it was left there, and whether surely nothing was sent."""
        self.leases: dict[str, _Lease] = {}
        self.sources: dict[int, SourceRow] = {}
        self.watched_at: dict[int, float] = {}
        self.incidents: dict[int, _Loss] = {}
        self.queues: dict[tuple[int, str], QueueRow] = {}
        self.joins: dict[tuple[int, str], _Join] = {}

    @contextmanager
    def open(self) -> Iterator[float]:
        """One transaction; gives its time. What raises in it raises before it changes anything."""
        with self.lock:
            if self.down:
                raise StoreUnavailable
            yield self.clock()

    def outcomes(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Which of these have ended, and how."""
        with self.open():
            found = {token: self.history.get((source, token)) for token in tokens}
            return {token: stone.outcome for token, stone in found.items() if stone is not None}

    def led(self, namespace: str, now: float) -> bool:
        """Whether a leader's lease is live."""
        lease = self.leases.get(namespace)
        return lease is not None and lease.expires_at > now

    def lives(self, key: _Key, run: _Run) -> bool:
        """Whether a claim is live, as long as a leader judges who is silent."""
        worker = self.workers.get(run.worker)
        if worker is None or worker.gone:
            return False
        return key[1] in worker.claims or run.claimed_at >= worker.previous_beat_at

    def silent(self, run: _Run, *, now: float, timeout: float) -> bool:
        """Whether the worker of this claim has not beaten for so long."""
        worker = self.workers.get(run.worker)
        return worker is None or now - worker.beat_at > timeout

    def announced(self, run: _Run) -> bool:
        """Whether the worker that holds this claim had said goodbye."""
        worker = self.workers.get(run.worker)
        return worker is not None and worker.left_at is not None

    def bury(
        self,
        key: _Key,
        outcome: Outcome,
        *,
        ended_at: float,
        number: int | None = None,
        worker: UUID | None = None,
        next: UUID | None = None,
        error: str | None = None,
    ) -> None:
        """Move an owed delivery to history; a tombstone that stands there already stays."""
        job, run = self.jobs[key], self.running.get(key)
        if run is not None and number is None:
            number, worker = run.number, run.worker
        self.drop(key)
        tombstone = _Tombstone(
            outcome=outcome,
            ended_at=ended_at,
            job_id=job.delivery.job_id,
            queue=job.delivery.queue,
            task=job.delivery.task,
            attempt=job.delivery.attempt,
            recoveries=job.recoveries,
            crashes=job.crashes,
            number=number,
            worker=worker,
            next=next,
            error=error,
            envelope=job.delivery.envelope if outcome in _KEPT else None,
            recorded_at=job.recorded_at,
            claimed=run is not None,
        )
        self.history.setdefault(key, tombstone)

    def drop(self, key: _Key) -> None:
        """Forget an owed delivery, and all that hangs on it."""
        del self.jobs[key]
        self.running.pop(key, None)
        self.settle(key)

    def settle(self, key: _Key) -> None:
        """Neither suspect nor to be pushed."""
        self.suspects.pop(key, None)
        self.outbox.pop(key, None)

    def one_body(self, source: int) -> bool:
        """Whether the library keeps one body of a job id."""
        row = self.sources.get(source)
        return row is None or row.one_body

    def join(self, source: int, join: str, now: float) -> _Join:
        """Return a join, known or new."""
        return self.joins.setdefault((source, join), _Join(opened_at=now))

    def count(self, key: _Key, ended: Delivery, part: Part, *, now: float) -> None:
        """Note the end of a member of a join that is still open."""
        join = self.join(key[0], part.join, now)
        if join.closed_at is None:
            left = EndedPart(key[1], ended.job_id, ended.queue, part.state, ended.envelope)
            join.parts.setdefault(ended.job_id, (now, left))

    def fill_in(self, key: _Key, envelope: bytes) -> None:
        """The record of a member that had ended has come: it can be told again with its envelope."""
        for join in self.joins.values():
            for job_id, (at, part) in join.parts.items():
                if part.token == key[1] and not part.envelope:
                    join.parts[job_id] = (at, replace(part, envelope=envelope))

    def owed(self, source: int, tokens: Iterable[UUID]) -> list[_Key]:
        """Those of the tokens that are owed, each once."""
        keys = dict.fromkeys((source, token) for token in tokens)
        return [key for key in keys if key in self.jobs]

    def of_job(self, source: int, job_ids: Iterable[str]) -> list[_Key]:
        """Return the owed deliveries of these job ids."""
        wanted = frozenset(job_ids)
        return [
            key
            for key, job in self.jobs.items()
            if key[0] == source and job.delivery.job_id in wanted
        ]


_REMEMBERED = 900.0
"""Seconds for which a worker that is gone is remembered."""


class MemoryLedger:
    """The ledger of one process, with as many hosts and leaders over it as a test needs.

    ``clock`` tells seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._tables = _Tables(clock)

    @property
    def down(self) -> bool:
        """Whether the ledger plays an outage."""
        return self._tables.down

    @down.setter
    def down(self, down: bool) -> None:
        with self._tables.lock:
            self._tables.down = down

    def host(self) -> HostStore:
        """Return the ledger as producers and workers use it."""
        return _Host(self._tables)

    def leader(self, namespace: str, holder: UUID) -> LeaderStore:
        """Return the ledger as one reconciler of the namespace uses it."""
        return _Leader(self._tables, namespace, holder)


class _Host:
    """What processes of the application ask, statement by statement."""

    def __init__(self, tables: _Tables) -> None:
        self._tables = tables
        self.installation: str | None = None

    def conninfo(self) -> str | None:
        return None

    def probe(self) -> bool:
        with self._tables.open():
            return True

    def register(self, source: SourceRow) -> SourceRow:
        with self._tables.open():
            return self._tables.sources.setdefault(source.id, source)

    def record(
        self,
        source: int,
        deliveries: Sequence[Delivery],
        *,
        namespace: str,
        outbox: bool = False,
        replay: bool = False,
        newest: bool = False,
        relaxed: bool = False,
    ) -> Recorded:
        tables = self._tables
        with tables.open() as now:
            for delivery in deliveries:
                _check(delivery)
            refused = set()
            for delivery in deliveries:
                key = (source, delivery.token)
                if key in tables.jobs:
                    if replay:  # a worker met it first, and could not know what it follows
                        self._follow(source, _Job(delivery, recorded_at=now), now=now, replay=True)
                    continue
                if self._never(source, delivery, now=now):
                    if not replay:
                        refused.add(delivery.token)
                    continue
                job = _Job(delivery, recorded_at=now)
                if replay:
                    tables.fill_in(key, delivery.envelope)
                if replay and key in tables.history:
                    # It is over before it was recorded; what it took the place of is not, for that.
                    if self._follow(source, job, now=now, replay=replay):
                        self._supersede_older(source, job, now=now)
                    continue
                if replay and not newest and self._outdated(source, delivery, now=now):
                    continue
                if self._follow(source, job, now=now, replay=replay):
                    self._owe(source, job, now=now, outbox=outbox)
                else:
                    refused.add(delivery.token)
            return Recorded(frozenset(refused), leader_live=tables.led(namespace, now))

    def _never(self, source: int, delivery: Delivery, *, now: float) -> bool:
        """Whether it is not to be owed, whoever holds what; closes the join that it goes on from."""
        tables = self._tables
        late = False
        if delivery.closes is not None:
            join = tables.join(source, delivery.closes, now)
            if join.closed_at is None:
                join.closed_at, join.closed_by = now, delivery.token
            join.parts.clear()
            late = join.closed_by != delivery.token
        return late or (delivery.derived and (source, delivery.token) in tables.history)

    def _outdated(self, source: int, delivery: Delivery, *, now: float) -> bool:
        """Bury a late record whose job id has had a younger life since."""
        tables, token = self._tables, delivery.token
        if not tables.one_body(source):
            return False
        parent = delivery.parent.token if delivery.parent is not None else None
        lives = [t for _, t in tables.of_job(source, [delivery.job_id])] + [
            t
            for (s, t), tombstone in tables.history.items()
            if s == source and tombstone.job_id == delivery.job_id
        ]
        younger = [t for t in lives if t > token and t != parent]
        if younger:
            tables.history[source, token] = _Tombstone(
                outcome=Outcome.SUPERSEDED,
                ended_at=now,
                job_id=delivery.job_id,
                queue=delivery.queue,
                task=delivery.task,
                next=max(younger),
            )
        return bool(younger)

    def _follow(self, source: int, job: _Job, *, now: float, replay: bool) -> bool:
        """Take the parent's place; False: it has ended, has moved on, or is somebody else's."""
        tables, token, parent = self._tables, job.delivery.token, job.delivery.parent
        if parent is None:
            return True
        key = (source, parent.token)
        older = tables.jobs.get(key)
        if older is not None:
            if not self._speaks_for(key, parent, replay=replay):
                return False
            tables.bury(key, parent.outcome, ended_at=now, next=token)
            job.inherit(older)
            return True
        tombstone = tables.history.get(key)
        if tombstone is not None:
            return tombstone.next == token
        # Nobody knows the parent: its record is late. It must not come to life behind its child.
        tables.history[key] = _Tombstone(
            outcome=parent.outcome,
            ended_at=now,
            job_id=job.delivery.job_id,
            queue=job.delivery.queue,
            task=job.delivery.task,
            next=token,
        )
        return True

    def _speaks_for(self, key: _Key, parent: Parent, *, replay: bool) -> bool:
        run = self._tables.running.get(key)
        if parent.claim:
            if run is not None:
                return run.number == parent.claim
            # Of old news: a claim that was taken away, and given to nobody since, still speaks.
            return replay and self._tables.jobs[key].claims == parent.claim
        # Started while the store was away, and perhaps claimed since, by the very one who speaks.
        own = run is not None and run.worker == parent.worker
        return run is None or own or not self._tables.lives(key, run)

    def _owe(self, source: int, job: _Job, *, now: float, outbox: bool) -> None:
        tables, delivery = self._tables, job.delivery
        self._supersede_older(source, job, now=now, younger=True)
        tables.jobs[source, delivery.token] = job
        if outbox:
            tables.outbox[source, delivery.token] = (now, True)

    def _supersede_older(
        self, source: int, job: _Job, *, now: float, younger: bool = False
    ) -> None:
        """Where one body is kept per id, an unclaimed delivery of it is nowhere any more."""
        tables, delivery = self._tables, job.delivery
        if (delivery.fresh and delivery.parent is None) or not tables.one_body(source):
            return
        for key in tables.of_job(source, [delivery.job_id]):
            if key not in tables.running and (younger or key[1] < delivery.token):
                job.inherit(tables.jobs[key])
                tables.bury(key, Outcome.SUPERSEDED, ended_at=now, next=delivery.token)

    def withdraw(self, source: int, tokens: Sequence[UUID]) -> None:
        with self._tables.open():
            for key in self._tables.owed(source, tokens):
                if key not in self._tables.running and not self._tables.jobs[key].claims:
                    self._tables.drop(key)

    def outbox(self, source: int, tokens: Sequence[UUID]) -> None:
        with self._tables.open() as now:
            for key in self._tables.owed(source, tokens):
                self._tables.outbox.setdefault(key, (now, False))

    def claim(self, source: int, ask: Ask) -> Claim | Refused | Unknown:
        tables, key = self._tables, (source, ask.token)
        with tables.open() as now:
            job = tables.jobs.get(key)
            if job is None:
                tombstone = tables.history.get(key)
                if tombstone is None:
                    return Unknown(ask.token)
                return Refused(ask.token, Refusal.ENDED, tombstone.outcome)
            run = tables.running.get(key)
            if run is None:
                return self._grant(key, ask, job, number=job.claims + 1, now=now)
            if run.nonce == ask.nonce:
                return Claim(ask.token, run.number, job.crashes)
            silent = tables.silent(run, now=now, timeout=ask.worker_timeout)
            if tables.lives(key, run) and (tables.led(ask.namespace, now) or not silent):
                if silent:  # the push that is skipped now may have been the only copy
                    tables.suspects.setdefault(key, _Suspect(Cause.WORKER, "", now))
                return Refused(ask.token, Refusal.HELD)
            return self._take_over(key, ask, job, run, now=now)

    def claims(self, source: int, asks: Sequence[Ask]) -> Mapping[UUID, Claim | Refused | Unknown]:
        return {ask.nonce: self.claim(source, ask) for ask in asks}

    def _grant(self, key: _Key, ask: Ask, job: _Job, *, number: int, now: float) -> Claim:
        self._tables.running[key] = _Run(number, ask.nonce, ask.worker, ask.pid, claimed_at=now)
        return Claim(ask.token, number, job.crashes)

    def _take_over(
        self, key: _Key, ask: Ask, job: _Job, run: _Run, *, now: float
    ) -> Claim | Refused:
        job.crashes += 0 if self._tables.announced(run) else 1
        if job.crashes > ask.crash_budget:
            self._tables.bury(key, Outcome.DEAD, ended_at=now)
            return Refused(ask.token, Refusal.SPENT)
        return self._grant(key, ask, job, number=run.number + 1, now=now)

    def give_back(self, source: int, token: UUID, worker: UUID, *, number: int) -> None:
        with self._tables.open():
            run = self._tables.running.get((source, token))
            if run is not None and run.worker == worker and number in (0, run.number):
                job = self._tables.jobs[source, token]
                job.claims = max(job.claims, run.number)
                del self._tables.running[source, token]

    def end(self, source: int, ends: Sequence[End]) -> Sequence[Ended]:
        with self._tables.open() as now:
            for end in ends:
                _check_text(end.job_id, end.queue, end.task, end.error)
            return [self._end((source, end.token), end, now=now) for end in ends]

    def _end(self, key: _Key, end: End, *, now: float) -> Ended:
        tables = self._tables
        if key in tables.jobs:
            if not _counts(end, tables.running.get(key)):
                return Ended.LATE
            if end.part is not None:
                tables.count(key, tables.jobs[key].delivery, end.part, now=now)
            tables.bury(
                key,
                end.outcome,
                ended_at=end.ended_at,
                number=end.number,
                worker=end.worker,
                error=end.error,
            )
            return Ended.ENDED
        stone = tables.history.get(key)
        if stone is not None:
            # What completed as the library shows it has still left something to its join.
            if end.part is not None and {stone.outcome, end.outcome} == {Outcome.COMPLETED}:
                told = Delivery(key[1], stone.job_id, stone.queue, stone.task, b"")
                tables.count(key, told, end.part, now=now)
            return Ended.LATE
        tables.history[key] = _Tombstone(
            outcome=end.outcome,
            ended_at=end.ended_at,
            job_id=end.job_id,
            queue=end.queue,
            task=end.task,
            number=end.number,
            worker=end.worker,
            error=end.error,
        )
        if end.part is not None:
            told = Delivery(end.token, end.job_id, end.queue, end.task, b"")
            tables.count(key, told, end.part, now=now)
        if not tables.one_body(key[0]):
            return Ended.UNKNOWN
        # It ran, so it stood where an older delivery of its id had stood.
        for older in tables.of_job(key[0], [end.job_id]):
            if older not in tables.running and older[1] < end.token:
                tables.bury(older, Outcome.SUPERSEDED, ended_at=now, next=end.token)
        return Ended.UNKNOWN

    def open_join(self, source: int, join: str, *, size: int, state: bytes) -> None:
        with self._tables.open() as now:
            row = self._tables.join(source, join, now)
            if not row.size or row.closed_at is not None:
                row.size, row.state, row.opened_at = size, state, now
                row.closed_at = row.closed_by = None

    def close_join(self, source: int, join: str) -> None:
        with self._tables.open() as now:
            row = self._tables.join(source, join, now)
            row.closed_at = now if row.closed_at is None else row.closed_at
            row.parts.clear()

    def decline(self, source: int, token: UUID, *, most: int, wait: float, error: str) -> int:
        tables, key = self._tables, (source, token)
        with tables.open() as now:
            if key not in tables.jobs or key in tables.running:
                return 0
            job = tables.jobs[key]
            if job.declined == most:
                tables.bury(key, Outcome.DEAD, ended_at=now, error=error)
                return 0
            job.not_before = now + wait * 2**job.declined
            job.declined += 1
            tables.suspects[key] = _Suspect(Cause.WORKER, "", now)
            return most - job.declined

    def cancel(
        self,
        source: int,
        *,
        tokens: Sequence[UUID] = (),
        job_ids: Sequence[str] = (),
        queue: str | None = None,
    ) -> int:
        tables = self._tables
        with tables.open() as now:
            waiting = [
                key
                for key, job in tables.jobs.items()
                if key[0] == source and job.delivery.queue == queue and key not in tables.running
            ]
            keys = {*tables.owed(source, tokens), *tables.of_job(source, job_ids), *waiting}
            for key in keys:
                tables.bury(key, Outcome.CANCELLED, ended_at=now)
            for token in tokens:
                tombstone = _Tombstone(outcome=Outcome.CANCELLED, ended_at=now)
                tables.history.setdefault((source, token), tombstone)
            return len(keys)

    def beat(self, source: int, beat: Beat, *, namespace: str) -> BeatReply:
        tables = self._tables
        with tables.open() as now:
            led = tables.led(namespace, now)
            worker = tables.workers.get(beat.worker)
            if worker is None:
                tables.workers[beat.worker] = _Worker(
                    source=source,
                    beat=beat,
                    claims=frozenset(beat.claims),
                    started_at=now,
                    beat_at=now,
                    previous_beat_at=now,
                )
                return BeatReply(leader_live=led)
            if worker.dead_at is not None:
                return BeatReply(dead=True, leader_live=led)
            worker.beat, worker.claims = beat, frozenset(beat.claims)
            worker.previous_beat_at, worker.beat_at = worker.beat_at, now
            return BeatReply(leader_live=led)

    def leave(self, worker: UUID) -> None:
        with self._tables.open() as now:
            row = self._tables.workers.get(worker)
            if row is not None and row.left_at is None:
                row.left_at = now

    def recoverable(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        with self._tables.open() as now:
            tables = self._tables
            watched = tables.watched_at.get(source, float("-inf"))
            if now - watched > _WATCHED:
                return frozenset()
            owed = {t: tables.jobs[source, t] for t in tokens if (source, t) in tables.jobs}
            queues = {t: tables.queues.get((source, job.delivery.queue)) for t, job in owed.items()}
            return frozenset(
                token
                for token, job in owed.items()
                if (queue := queues[token]) is not None
                and queue.trusted_since is not None
                and queue.trusted_since <= job.recorded_at
            )

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        return self._tables.outcomes(source, tokens)

    def heartbeat(
        self,
        source: int,
        *,
        job_id: str,
        token: UUID | None = None,
        number: int | None = None,
        progress: float | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        tables = self._tables
        with tables.open() as now:
            asked = tables.of_job(source, [job_id]) if token is None else [(source, token)]
            claimed = [tables.running[key] for key in asked if key in tables.running]
            runs = [run for run in claimed if number in (None, run.number)]
            for run in runs:
                run.heartbeat_at = now
                run.progress = run.progress if progress is None else progress
                run.attrs = {**run.attrs, **(attrs or {})}
            return bool(runs)

    def close(self) -> None:
        pass


class _Leader:
    """What the one leader of a namespace asks, statement by statement."""

    def __init__(self, tables: _Tables, namespace: str, holder: UUID) -> None:
        self._tables = tables
        self._namespace = namespace
        self._holder = holder

    @contextmanager
    def _leading(self, term: int) -> Iterator[float]:
        """One transaction of this very term."""
        with self._tables.open() as now:
            self._lease(term)
            yield now

    def _lease(self, term: int) -> _Lease:
        lease = self._tables.leases.get(self._namespace)
        if lease is None or (lease.term, lease.holder) != (term, self._holder):
            raise NotLeading
        return lease

    def elect(self, *, lease: float) -> int | None:
        with self._tables.open() as now:
            if self._tables.led(self._namespace, now):
                return None
            row = self._tables.leases.setdefault(self._namespace, _Lease(0, self._holder, now))
            row.term, row.holder, row.expires_at = row.term + 1, self._holder, now + lease
            return row.term

    def renew(self, term: int, *, lease: float) -> Brake:
        with self._leading(term) as now:
            row = self._unexpired(term, now)
            row.expires_at = now + lease
            return Brake(held=dict(row.held))

    def brake(self, term: int) -> Brake:
        with self._leading(term) as now:
            return Brake(held=dict(self._unexpired(term, now).held))

    def _unexpired(self, term: int, now: float) -> _Lease:
        row = self._lease(term)
        if row.expires_at <= now:
            raise NotLeading
        return row

    def resign(self, term: int) -> None:
        with self._tables.open() as now:
            row = self._tables.leases.get(self._namespace)
            if row is not None and (row.term, row.holder) == (term, self._holder):
                row.expires_at = now

    def now(self) -> float:
        with self._tables.open() as now:
            return now

    def identity(self) -> Mapping[str, str | None]:
        with self._tables.open():
            return {
                "id": self._tables.installation,
                "name": None,
                "system_identifier": "memory",
                "database_oid": "0",
                "system_now": "memory",
                "database_now": "0",
            }

    def settle(self) -> None:
        with self._tables.open():
            pass

    def sources(self) -> Sequence[SourceRow]:
        with self._tables.open():
            rows = self._tables.sources.values()
            ours = [row for row in rows if row.namespace == self._namespace]
            return sorted(ours, key=lambda row: row.id)

    def acknowledge(
        self, term: int, source: int, epoch: UUID, n: int, *, run_id: str | None
    ) -> None:
        with self._leading(term) as now:
            row = self._tables.sources.get(source)
            if row is not None:
                self._tables.sources[source] = replace(
                    row, pulse_epoch=epoch, pulse_n=n, run_id=run_id or row.run_id
                )
                self._tables.watched_at[source] = now

    def open_incident(
        self, term: int, source: int, cause: Cause, detail: str, epoch: UUID | None
    ) -> int:
        with self._leading(term) as now:
            incident = len(self._tables.incidents) + 1
            self._tables.incidents[incident] = _Loss(source, cause, detail, now, epoch)
            return incident

    def incidents(self, source: int) -> Sequence[Incident]:
        with self._tables.open() as now:
            return [
                Incident(
                    id=incident,
                    source=source,
                    cause=loss.cause,
                    detail=loss.detail,
                    age=now - loss.opened_at,
                    missing=loss.missing,
                    restored=loss.restored,
                )
                for incident, loss in self._tables.incidents.items()
                if loss.source == source and not loss.closed
            ]

    def progress(
        self, term: int, incident: int, *, missing: int, restored: int, close: bool
    ) -> None:
        with self._leading(term):
            loss = self._tables.incidents.get(incident)
            if loss is not None:
                loss.missing += missing
                loss.restored += restored
                loss.closed = loss.closed or close

    def workers(self, source: int) -> Sequence[WorkerRow]:
        with self._tables.open():
            held = Counter(run.worker for run in self._tables.running.values())
            rows = sorted(self._tables.workers.items(), key=lambda item: item[0])
            return [
                WorkerRow(
                    id=worker,
                    name=row.beat.name,
                    host=row.beat.host,
                    pid=row.beat.pid,
                    queues=tuple(row.beat.queues),
                    beat=row.beat.counter,
                    started_at=row.started_at,
                    unflushed_since=row.beat.unflushed_since,
                    pulse=row.beat.pulse,
                    left=row.left_at is not None,
                    dead=row.dead_at is not None,
                    claims=held[worker],
                    lists=tuple(row.beat.claims),
                )
                for worker, row in rows
                if row.source == source
            ]

    def declare_dead(self, term: int, workers: Sequence[UUID]) -> None:
        with self._leading(term) as now:
            for worker in workers:
                row = self._tables.workers.get(worker)
                if row is not None and row.dead_at is None:
                    row.dead_at = now

    def forget(self, term: int, workers: Sequence[UUID]) -> None:
        with self._leading(term) as now:
            busy = {run.worker for run in self._tables.running.values()}
            for worker in workers:
                row = self._tables.workers.get(worker)
                if row is None or worker in busy:
                    continue
                gone_at = row.dead_at if row.dead_at is not None else row.left_at
                if gone_at is not None and gone_at < now - _REMEMBERED:
                    del self._tables.workers[worker]

    def page(self, source: int, *, after: UUID | None, limit: int) -> Sequence[Owed]:
        with self._tables.open() as now:
            return [self._owed(key, now) for key in self._after(source, after)[:limit]]

    def _after(self, source: int, after: UUID | None) -> list[_Key]:
        jobs = self._tables.jobs
        return sorted(key for key in jobs if key[0] == source and (after is None or key[1] > after))

    def watched(
        self, source: int, *, limit: int, after: UUID | None = None, urgent: bool = False
    ) -> Sequence[Owed]:
        with self._tables.open() as now:
            keys = [key for key in self._after(source, after) if self._is_watched(key, now)]
            if urgent:
                keys = [key for key in keys if self._is_urgent(key)]
            return [self._pushed(self._owed(key, now), key, now) for key in keys[:limit]]

    def _is_urgent(self, key: _Key) -> bool:
        suspect = self._tables.suspects.get(key)
        told = suspect is not None and suspect.cause is Cause.WORKER and not suspect.mark
        return told or key in self._tables.running or key in self._tables.outbox

    def _is_watched(self, key: _Key, now: float) -> bool:
        not_before = self._tables.jobs[key].not_before
        if not_before is not None and not_before > now:
            return False
        suspect, run = self._tables.suspects.get(key), self._tables.running.get(key)
        return (
            (suspect is not None and suspect.cause is not Cause.UNTRUSTED)
            or key in self._tables.outbox
            or (run is not None and not self._tables.lives(key, run))
        )

    def _pushed(self, owed: Owed, key: _Key, now: float) -> Owed:
        """Say of a delivery in the outbox that its push is to be done, unless more is suspected."""
        if key not in self._tables.outbox:
            return owed
        left_at, unsent = self._tables.outbox[key]
        if owed.suspected is not None:
            return replace(owed, unsent=unsent)
        return replace(owed, suspected=Cause.PUSH, suspected_for=now - left_at, unsent=unsent)

    def _owed(self, key: _Key, now: float) -> Owed:
        tables = self._tables
        job, run = tables.jobs[key], tables.running.get(key)
        delivery, suspect = job.delivery, tables.suspects.get(key)
        owed = Owed(
            token=delivery.token,
            job_id=delivery.job_id,
            queue=delivery.queue,
            task=delivery.task,
            age=now - job.recorded_at,
            due_in=0.0 if delivery.due_at is None else delivery.due_at - now,
            expired=delivery.expires_at is not None and delivery.expires_at <= now,
            crashes=job.crashes,
            recoveries=job.recoveries,
            claims=job.claims,
            backoff=0.0 if job.not_before is None else max(0.0, job.not_before - now),
        )
        if run is not None:
            owed = replace(
                owed,
                claim_number=run.number,
                claim_worker=run.worker,
                claim_live=tables.lives(key, run),
                claim_announced=tables.announced(run),
            )
        if suspect is not None:
            owed = replace(
                owed,
                suspected=suspect.cause,
                suspected_for=now - suspect.seen_at,
                suspected_mark=suspect.mark,
            )
        return owed

    def count(self, source: int) -> Mapping[str, int]:
        with self._tables.open():
            jobs = self._tables.jobs.items()
            return dict(Counter(job.delivery.queue for key, job in jobs if key[0] == source))

    def suspect(self, term: int, source: int, seen: Sequence[tuple[UUID, Cause, str]]) -> None:
        with self._leading(term) as now:
            for token, cause, mark in seen:
                for key in self._tables.owed(source, [token]):
                    before = self._tables.suspects.get(key)
                    self._tables.suspects[key] = _look(before, cause, mark, now)

    def clear(self, term: int, source: int, tokens: Sequence[UUID]) -> None:
        with self._leading(term):
            for token in tokens:
                self._tables.settle((source, token))

    def envelopes(self, source: int, tokens: Sequence[UUID]) -> Sequence[Restorable]:
        tables = self._tables
        with tables.open():
            keys = [key for key in tables.owed(source, tokens) if key not in tables.history]
            found = [tables.jobs[key].delivery for key in sorted(keys)]
            return [
                Restorable(
                    token=delivery.token,
                    job_id=delivery.job_id,
                    queue=delivery.queue,
                    envelope=delivery.envelope,
                    due_at=delivery.due_at,
                    expires_at=delivery.expires_at,
                )
                for delivery in found
            ]

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        return self._tables.outcomes(source, tokens)

    def known(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        with self._tables.open():
            rows = self._tables.jobs.keys() | self._tables.history.keys()
            return frozenset(token for token in tokens if (source, token) in rows)

    def overtaken(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        with self._tables.open():
            tables = self._tables
            if not tables.one_body(source):
                return frozenset()
            begun = [
                (key[0], job.delivery.job_id, job.recorded_at)
                for key, job in tables.jobs.items()
                if key in tables.running
            ] + [
                (owner, stone.job_id, stone.recorded_at)
                for (owner, _), stone in tables.history.items()
                if stone.claimed and stone.recorded_at is not None
            ]
            latest: dict[tuple[int, str], float] = {}
            for owner, job_id, at in begun:
                latest[owner, job_id] = max(at, latest.get((owner, job_id), at))
            return frozenset(
                token
                for (owner, token), job in tables.jobs.items()
                if owner == source
                and token in tokens
                and latest.get((owner, job.delivery.job_id), job.recorded_at) > job.recorded_at
            )

    def fates(self, source: int, job_ids: Sequence[str]) -> Mapping[str, Fate]:
        with self._tables.open():
            owed = {
                self._tables.jobs[key].delivery.job_id
                for key in self._tables.of_job(source, job_ids)
            }
            stones = sorted(
                (
                    stone
                    for (owner, _), stone in self._tables.history.items()
                    if owner == source and stone.outcome is not Outcome.SUPERSEDED
                ),
                key=lambda stone: stone.ended_at,
            )
            last = {stone.job_id: stone.outcome for stone in stones}
            return {job_id: Fate(job_id in owed, last.get(job_id)) for job_id in job_ids}

    def open_joins(self, source: int, *, after: str, limit: int) -> Sequence[OpenJoin]:
        with self._tables.open():
            ids = sorted(id for owner, id in self._tables.joins if owner == source and id > after)
            return [join for id in ids if (join := self._open_join(source, id)) is not None][:limit]

    def complete_joins(self, source: int, *, quiet: float, limit: int) -> Sequence[OpenJoin]:
        with self._tables.open() as now:
            complete = []
            for (owner, id), row in sorted(self._tables.joins.items()):
                done = row.size and len(row.parts) >= row.size
                if (
                    owner == source
                    and done
                    and max(at for at, _ in row.parts.values()) < now - quiet
                ):
                    complete.append(self._open_join(source, id))
            return [join for join in complete if join is not None][:limit]

    def _open_join(self, source: int, id: str) -> OpenJoin | None:
        row = self._tables.joins[source, id]
        if row.closed_at is not None:
            return None
        parts = sorted(row.parts.values(), key=lambda part: (part[0], part[1].token))
        return OpenJoin(id, row.size, row.state, tuple(part for _, part in parts))

    def restored(self, term: int, source: int, tokens: Sequence[UUID]) -> None:
        with self._leading(term):
            for key in self._tables.owed(source, tokens):
                self._tables.jobs[key].recoveries += 1
                self._tables.jobs[key].not_before = None
                self._tables.settle(key)

    def void(self, term: int, source: int, voids: Sequence[Void]) -> Sequence[UUID]:
        with self._leading(term) as now:
            return [void.token for void in voids if self._void((source, void.token), void, now)]

    def _void(self, key: _Key, void: Void, now: float) -> bool:
        run = self._tables.running.get(key)
        if run is None or run.number != void.number:
            return False
        job = self._tables.jobs[key]
        job.claims = void.number
        job.crashes += 1 if void.charge else 0
        job.not_before = now + void.backoff
        del self._tables.running[key]
        self._tables.suspects[key] = _Suspect(Cause.WORKER, "", now)
        return True

    def close_owed(self, term: int, source: int, closings: Sequence[Closing]) -> Sequence[UUID]:
        with self._leading(term) as now:
            return [
                closing.token
                for closing in closings
                if self._close_owed((source, closing.token), closing, now)
            ]

    def _close_owed(self, key: _Key, closing: Closing, now: float) -> bool:
        tables = self._tables
        if key not in tables.jobs:
            return False
        run = tables.running.get(key)
        if run is not None and tables.lives(key, run):
            return False
        if closing.part is not None:
            tables.count(key, tables.jobs[key].delivery, closing.part, now=now)
        tables.bury(key, closing.outcome, ended_at=now, error=closing.error)
        return True

    def queues(self, source: int) -> Sequence[QueueRow]:
        with self._tables.open():
            rows = sorted(self._tables.queues.items())
            return [row for (owner, _), row in rows if owner == source]

    def trust(self, term: int, rows: Sequence[QueueRow]) -> None:
        with self._leading(term):
            for row in rows:
                self._tables.queues[row.source, row.queue] = row

    def hold(self, term: int, source: int, queue: str, reason: str) -> None:
        with self._leading(term) as now:
            since = datetime.fromtimestamp(now, UTC).isoformat()
            self._lease(term).held[f"{source}/{queue}"] = {"since": since, "reason": reason}

    def rotate(self, *, retention: float) -> int:
        if retention < 3600:
            raise ConfigurationError(f"retention must be an hour at least, not {retention} s")
        with self._tables.open() as now:
            history = self._tables.history
            days = {key: int(tombstone.ended_at // _DAY) for key, tombstone in history.items()}
            old = {day for day in days.values() if (day + 1) * _DAY < now - retention}
            self._tables.history = {key: history[key] for key in history if days[key] not in old}
            self._tables.joins = {
                key: join
                for key, join in self._tables.joins.items()
                if (join.closed_at or join.opened_at) >= now - retention
            }
            return len(old)

    def vacuum(self) -> Sequence[str]:
        with self._tables.open():
            return ()

    def close(self) -> None:
        pass


def _counts(end: End, run: _Run | None) -> bool:
    """Whether a reported end of an owed delivery is to be believed."""
    if run is None:
        # Number 0 started while Postgres was away. A zombie's completion, too, contradicts nobody.
        return end.number == 0 or end.outcome is Outcome.COMPLETED
    return end.number == run.number or (end.number == 0 and end.worker == run.worker)


def _look(before: _Suspect | None, cause: Cause, mark: str, now: float) -> _Suspect:
    """Return what is suspected after one more look."""
    if before is None:
        return _Suspect(cause, mark, now)
    if before.cause in (Cause.WORKER, Cause.UNTRUSTED):
        cause = before.cause
    return _Suspect(cause, mark, before.seen_at if before.mark == mark else now)


def _check(delivery: Delivery) -> None:
    """Refuse what Postgres would refuse."""
    _check_text(delivery.job_id, delivery.queue, delivery.task, delivery.key, delivery.trace)
    if delivery.priority not in _SMALLINT:
        raise BadRow(f"priority {delivery.priority} is out of range")


def _check_text(*texts: str | None) -> None:
    for text in texts:
        if text is not None and "\x00" in text:
            raise BadRow(f"text must not contain NUL: {text[:100]!r}")
