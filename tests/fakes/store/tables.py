"""The tables of the schema as dicts, with one lock instead of transactions."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

from jobguard.errors import BadRow, StoreUnavailable
from jobguard.model import (
    Beat,
    Cause,
    Delivery,
    EndedPart,
    Outcome,
    Part,
    RecoverRule,
    Request,
)
from jobguard.store.protocols import QueueRow, ScheduleRow, SourceRow

Key = tuple[int, UUID]
"""(source, token), as in every table."""

_KEPT = (Outcome.FAILED, Outcome.DEAD)
"""Outcomes that a person may requeue: history keeps their envelopes."""


@dataclass(slots=True)
class Job:
    delivery: Delivery
    recorded_at: float
    recoveries: int = 0
    crashes: int = 0
    claims: int = 0
    not_before: float | None = None
    declined: int = 0
    last_worker: UUID | None = None
    recover: RecoverRule | None = None

    def __post_init__(self) -> None:
        self.recover = self.delivery.recover

    def carry_counts(self, older: Job) -> None:
        self.recoveries = max(self.recoveries, older.recoveries)
        self.crashes = max(self.crashes, older.crashes)


@dataclass(slots=True)
class Run:
    number: int
    nonce: UUID
    worker: UUID
    pid: int
    claimed_at: float
    heartbeat_at: float | None = None
    progress: float | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tombstone:
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
class Worker:
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
class Suspect:
    cause: Cause
    mark: str
    seen_at: float


@dataclass(slots=True)
class Effect:
    token: UUID
    number: int
    job_id: str | None
    done: bool = False
    result: str | None = None


@dataclass(slots=True)
class Join:
    size: int = 0
    state: bytes = b""
    opened_at: float = 0.0
    closed_at: float | None = None
    closed_by: UUID | None = None
    parts: dict[str, tuple[float, EndedPart]] = field(default_factory=dict)
    """By job id: when the member ended, and its part."""


@dataclass(slots=True)
class Lease:
    term: int
    holder: UUID
    expires_at: float
    held: dict[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(slots=True)
class Loss:
    source: int
    cause: Cause
    detail: str
    opened_at: float
    epoch: UUID | None
    missing: int = 0
    restored: int = 0
    closed: bool = False


@dataclass(slots=True)
class Schedule:
    namespace: str
    source: int
    row: ScheduleRow
    """As it is planned now; ``next_at`` is the next slot."""
    queue: str = "default"
    task: str = "app.task"
    fire_at: float | None = None
    finished: bool = False
    error: str | None = None
    skipped: int = 0
    paused: bool = False


class Tables:
    """The tables, and the queries that several statements share. Use them only inside ``open()``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.down = False
        self.refuses: Callable[[str], bool] = lambda _text: False
        """Simulates a database that refuses a row for its content."""
        self.lock = threading.RLock()
        self.installation = str(uuid4())
        self.keep_envelopes = False
        self.jobs: dict[Key, Job] = {}
        self.running: dict[Key, Run] = {}
        self.history: dict[Key, Tombstone] = {}
        self.workers: dict[UUID, Worker] = {}
        self.suspects: dict[Key, Suspect] = {}
        self.recoveries: dict[Key, list[float]] = {}
        """When each delivery was restored because it was lost."""
        self.locks: dict[tuple[int, str], tuple[Key, int]] = {}  # by name: the claim and its number
        self.keys: dict[tuple[int, str], tuple[UUID, float]] = {}
        """The delivery that took a key last, and until when the key is throttled."""
        self.effects: dict[tuple[int, str], Effect] = {}
        self.outbox: dict[Key, tuple[float, bool]] = {}
        """When it was left there, and whether it is certain that nothing was sent."""
        self.unseen: dict[Key, float] = {}
        """Of the outbox: until then its process pushes it; infinity: no process has seen its commit."""
        self.leases: dict[str, Lease] = {}
        self.sources: dict[int, SourceRow] = {}
        self.watched_at: dict[int, float] = {}
        self.incidents: dict[int, Loss] = {}
        self.queues: dict[tuple[int, str], QueueRow] = {}
        self.joins: dict[tuple[int, str], Join] = {}
        self.requests: dict[int, Request] = {}
        self.held_requests: dict[int, str] = {}
        """Why a request cannot be rendered."""
        self.schedules: dict[tuple[str, str], Schedule] = {}
        """By namespace and name."""
        self.slots: dict[tuple[str, str, float], str] = {}
        """The job id of each slot that was fired, by namespace, schedule and time."""
        self.tasks: set[tuple[int, str, str]] = set()
        """(source, task, queue) of completed runs."""
        self.retentions: dict[str, float] = {}
        """The wanted retention by namespace."""

    def key_holder(self, source: int, token: UUID) -> UUID | None:
        """Return the owed delivery that took a key, or that replaced the one that took it."""
        seen: UUID | None = token
        while seen is not None and (source, seen) not in self.jobs:
            stone = self.history.get((source, seen))
            seen = None if stone is None else stone.next
        return seen

    def take_key(self, source: int, delivery: Delivery, now: float) -> bool:
        """Take the key of a requested delivery; False: it is held or throttled."""
        if delivery.key is None:
            return True
        taken, until = self.keys.get((source, delivery.key), (delivery.token, 0.0))
        if self.key_holder(source, taken) is not None or until > now:
            return False
        self.keys[source, delivery.key] = (delivery.token, now)
        return True

    @contextmanager
    def open(self) -> Iterator[float]:
        """Run one transaction; give its time. Errors are raised before anything is changed."""
        with self.lock:
            if self.down:
                raise StoreUnavailable
            yield self.clock()

    def check(self, *texts: str | None) -> None:
        """Refuse the texts that the database must refuse."""
        for text in texts:
            if text is not None and self.refuses(text):
                raise BadRow(f"refused: {text[:100]!r}")

    def outcomes(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Return the outcome of each delivery that has ended."""
        with self.open():
            found = {token: self.history.get((source, token)) for token in tokens}
            return {token: stone.outcome for token, stone in found.items() if stone is not None}

    def led(self, namespace: str, now: float) -> bool:
        """Return True if a leader's lease is live."""
        lease = self.leases.get(namespace)
        return lease is not None and lease.expires_at > now

    def claims_of(self, worker: UUID) -> frozenset[UUID]:
        """Return the deliveries that this worker has claimed."""
        return frozenset(key[1] for key, run in self.running.items() if run.worker == worker)

    def lives(self, key: Key, run: Run) -> bool:
        """Return True if a claim is live, as long as a leader decides which workers are silent."""
        worker = self.workers.get(run.worker)
        if worker is None or worker.gone:
            return False
        return key[1] in worker.claims or run.claimed_at >= worker.previous_beat_at

    def silent(self, run: Run, *, now: float, timeout: float) -> bool:
        """Return True if the worker of this claim has not beaten for so long."""
        worker = self.workers.get(run.worker)
        return worker is None or now - worker.beat_at > timeout

    def announced(self, run: Run) -> bool:
        """Return True if the worker of this claim has exited regularly."""
        worker = self.workers.get(run.worker)
        return worker is not None and worker.left_at is not None

    def bury(
        self,
        key: Key,
        outcome: Outcome,
        *,
        ended_at: float,
        number: int | None = None,
        worker: UUID | None = None,
        next: UUID | None = None,
        error: str | None = None,
    ) -> None:
        """Move an owed delivery to history; an existing tombstone stays."""
        job, run = self.jobs[key], self.running.get(key)
        if run is not None and number is None:
            number, worker = run.number, run.worker
        self.drop(key)
        tombstone = Tombstone(
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
            envelope=job.delivery.envelope if outcome in _KEPT or self.keep_envelopes else None,
            recorded_at=job.recorded_at,
            claimed=run is not None,
        )
        self.history.setdefault(key, tombstone)

    def drop(self, key: Key) -> None:
        """Delete an owed delivery, and all rows that belong to it."""
        del self.jobs[key]
        self.running.pop(key, None)
        self.clear_marks(key)

    def was_declined(self, key: Key, now: float) -> bool:
        """Return True if a worker has declined it a moment ago, so that it waits to be restored."""
        job = self.jobs.get(key)
        return job is not None and job.declined > 0 and (job.not_before or 0.0) > now

    def clear_marks(self, key: Key) -> None:
        """Delete the suspicion and the outbox row."""
        self.suspects.pop(key, None)
        self.outbox.pop(key, None)
        self.unseen.pop(key, None)

    def supersede_others(self, key: Key) -> None:
        """Supersede the other unclaimed deliveries of its job id, if there is one body per job id."""
        if not self.one_body(key[0]):
            return
        job = self.jobs[key]
        for other in self.of_job(key[0], [job.delivery.job_id]):
            later = self.unseen.get(other) == math.inf and other[1] > key[1]
            if other != key and other not in self.running and not later:
                job.carry_counts(self.jobs[other])
                self.bury(other, Outcome.SUPERSEDED, ended_at=self.clock(), next=key[1])

    def one_body(self, source: int) -> bool:
        """Return True if the library keeps one body per job id."""
        row = self.sources.get(source)
        return row is None or row.one_body

    def join(self, source: int, join: str, now: float) -> Join:
        """Return a join, known or new."""
        return self.joins.setdefault((source, join), Join(opened_at=now))

    def count(self, key: Key, ended: Delivery, part: Part, *, now: float) -> None:
        """Store the end of a member of a join that is still open."""
        join = self.join(key[0], part.join, now)
        if join.closed_at is None:
            left = EndedPart(key[1], ended.job_id, ended.queue, part.state, ended.envelope)
            join.parts.setdefault(ended.job_id, (now, left))

    def fill_in(self, key: Key, envelope: bytes) -> None:
        """Add the envelope to the part of a member whose record came late."""
        for join in self.joins.values():
            for job_id, (at, part) in join.parts.items():
                if part.token == key[1] and not part.envelope:
                    join.parts[job_id] = (at, replace(part, envelope=envelope))

    def owed(self, source: int, tokens: Iterable[UUID]) -> list[Key]:
        """Return those tokens that are owed, each once."""
        keys = dict.fromkeys((source, token) for token in tokens)
        return [key for key in keys if key in self.jobs]

    def of_job(self, source: int, job_ids: Iterable[str]) -> list[Key]:
        """Return the owed deliveries of these job ids."""
        wanted = frozenset(job_ids)
        return [
            key
            for key, job in self.jobs.items()
            if key[0] == source and job.delivery.job_id in wanted
        ]
