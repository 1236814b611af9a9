"""The ledger in memory as a reconciler uses it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from uuid import UUID, uuid4

from jobguard.errors import ConfigurationError, NotLeading
from jobguard.model import (
    RAN_BEFORE_RECORD,
    Cause,
    Delivery,
    LastOutcome,
    OpenJoin,
    Outcome,
    Owed,
    RecoverRule,
    Request,
    Restorable,
)
from jobguard.store.protocols import (
    Brake,
    Closing,
    Incident,
    Plan,
    Pulse,
    QueueRow,
    ScheduleRow,
    Signs,
    SourceRow,
    Void,
    WorkerRow,
)
from tests.fakes.store.tables import Job, Key, Lease, Loss, Run, Suspect, Tables, Tombstone

_DAY = 86400.0
_RETENTION = 7 * _DAY
"""The retention of a namespace that has set none."""
_REMEMBERED = 900.0
"""Seconds for which a gone worker is kept."""


class MemoryLeaderStore:
    """The calls of the one leader of a namespace, statement by statement."""

    def __init__(self, tables: Tables, namespace: str, holder: UUID) -> None:
        self._tables = tables
        self._namespace = namespace
        self._holder = holder

    @contextmanager
    def _leading(self, term: int) -> Iterator[float]:
        """Run one transaction of this term."""
        with self._tables.open() as now:
            self._lease(term)
            yield now

    def _lease(self, term: int) -> Lease:
        lease = self._tables.leases.get(self._namespace)
        if lease is None or (lease.term, lease.holder) != (term, self._holder):
            raise NotLeading
        return lease

    def elect(self, *, lease: float, patience: float = 0.0) -> int | None:
        with self._tables.open() as now:
            before = self._tables.leases.get(self._namespace)
            mine = before is not None and before.holder == self._holder
            if before is not None and before.expires_at > now - patience and not mine:
                return None
            row = self._tables.leases.setdefault(self._namespace, Lease(0, self._holder, now))
            row.term, row.holder, row.expires_at = row.term + 1, self._holder, now + lease
            return row.term

    def renew(self, term: int, *, lease: float) -> Brake:
        with self._leading(term) as now:
            row = self._unexpired(term, now)
            row.expires_at = now + lease
            return Brake(held=dict(row.held))

    def signs(self, term: int) -> Signs:
        tables, here = self._tables, self._namespace
        with self._leading(term) as now:
            brake = Brake(held=dict(self._unexpired(term, now).held))
            owed = bool(tables.jobs) or any(j.closed_at is None for j in tables.joins.values())
            requested = bool(tables.requests.keys() - tables.held_requests.keys())
            sources = sum(row.namespace == here for row in tables.sources.values())
        return Signs(brake, owed, requested or bool(self.due_schedules(limit=1)), sources)

    def _unexpired(self, term: int, now: float) -> Lease:
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

    def sources(self) -> Sequence[SourceRow]:
        with self._tables.open():
            rows = self._tables.sources.values()
            watched = self._tables.watched_at
            ours = [
                replace(row, watched_at=watched.get(row.id))
                for row in rows
                if row.namespace == self._namespace
            ]
            return sorted(ours, key=lambda row: row.id)

    def acknowledge(
        self, term: int, source: int, known: Pulse, pulse: Pulse, *, run_id: str | None
    ) -> bool:
        with self._leading(term) as now:
            row = self._tables.sources.get(source)
            if row is None:
                return False
            stored, (epoch, n) = (row.pulse_epoch, row.pulse_n), pulse
            repeated = stored[0] == epoch and (known[1] or 0) <= (stored[1] or 0) <= (n or 0)
            if stored != known and not repeated:
                return False
            self._tables.sources[source] = replace(
                row, pulse_epoch=epoch, pulse_n=n, run_id=run_id or row.run_id
            )
            self._tables.watched_at[source] = now
            return True

    def open_incident(
        self, term: int, source: int, cause: Cause, detail: str, epoch: UUID | None
    ) -> int:
        with self._leading(term) as now:
            incident = len(self._tables.incidents) + 1
            self._tables.incidents[incident] = Loss(source, cause, detail, now, epoch)
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
            claims = Counter(run.worker for run in self._tables.running.values())
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
                    left_age=None if row.left_at is None else self._tables.clock() - row.left_at,
                    dead=row.dead_at is not None,
                    claims=min(2, claims[worker]),
                )
                for worker, row in rows
                if row.source == source
            ]

    def charges(self, source: int, workers: Sequence[UUID]) -> Mapping[UUID, Sequence[int]]:
        with self._tables.open():
            found: dict[UUID, list[int]] = {}
            for (of, token), run in self._tables.running.items():
                if of == source and run.worker in workers:
                    found.setdefault(run.worker, []).append(self._tables.jobs[of, token].crashes)
            return {worker: sorted(many, reverse=True)[:2] for worker, many in found.items()}

    def listed(self, source: int, tokens: Sequence[UUID]) -> tuple[frozenset[UUID], bool]:
        with self._tables.open():
            workers = self._tables.workers.values()
            live = [row for row in workers if row.source == source and not row.gone]
            listed = {token for row in live for token in row.claims if token in tokens}
            return frozenset(listed), any(row.beat.unflushed_since is not None for row in live)

    def declare_dead(self, term: int, workers: Sequence[UUID]) -> Mapping[UUID, int]:
        with self._leading(term) as now:
            declared = {}
            for worker in workers:
                row = self._tables.workers.get(worker)
                if row is not None and row.dead_at is None:
                    row.dead_at, row.claims = now, self._tables.claims_of(worker)
                    declared[worker] = len(row.claims)
            return declared

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
            keys = [key for key in self._after(source, after) if not self._is_pushed_now(key, now)]
            return [self._owed(key, now) for key in keys[:limit]]

    def see_committed(self, term: int, source: int, *, wait: float) -> int:
        with self._leading(term) as now:
            unseen = self._tables.unseen
            seen = sorted(k for k, until in unseen.items() if k[0] == source and until == math.inf)
            for key in seen:
                if key in unseen:
                    self._tables.supersede_others(key)
                    unseen[key] = now + wait
            return len(seen)

    def _is_pushed_now(self, key: Key, now: float) -> bool:
        """Return True if the process that recorded it pushes it, and not the leader."""
        return self._tables.unseen.get(key, 0.0) > now

    def _after(self, source: int, after: UUID | None) -> list[Key]:
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

    def _is_urgent(self, key: Key) -> bool:
        suspect = self._tables.suspects.get(key)
        delivery_like = suspect is not None and suspect.cause is Cause.WORKER and not suspect.mark
        run = self._tables.running.get(key)
        gone = run is not None and self._is_gone(run)
        return delivery_like or gone or key in self._tables.outbox

    def _is_watched(self, key: Key, now: float) -> bool:
        not_before = self._tables.jobs[key].not_before
        if (not_before is not None and not_before > now) or self._is_pushed_now(key, now):
            return False
        suspect, run = self._tables.suspects.get(key), self._tables.running.get(key)
        return (
            (suspect is not None and suspect.cause is not Cause.UNTRUSTED)
            or key in self._tables.outbox
            or (run is not None and self._is_gone(run))
        )

    def _is_gone(self, run: Run) -> bool:
        worker = self._tables.workers.get(run.worker)
        return worker is not None and worker.gone

    def unheld(
        self, source: int, *, after: UUID | None, workers: int, limit: int
    ) -> tuple[Sequence[Owed], UUID | None]:
        tables = self._tables
        with tables.open() as now:
            claimants = sorted({run.worker for run in tables.running.values()})
            some = [id for id in claimants if after is None or id > after][:workers]
            keys = [
                key
                for key in self._after(source, None)
                if (run := tables.running.get(key)) is not None
                and run.worker in some
                and not self._is_gone(run)
                and not tables.lives(key, run)
            ]
            rows = [self._pushed(self._owed(key, now), key, now) for key in keys]
            left = [row for row in rows if row.backoff <= 0]
            return left[:limit], some[-1] if len(some) == workers else None

    def _pushed(self, owed: Owed, key: Key, now: float) -> Owed:
        """Give a delivery of the outbox the cause PUSH, unless it has another suspicion."""
        if key not in self._tables.outbox:
            return owed
        left_at, unsent = self._tables.outbox[key]
        if owed.suspected is not None:
            return replace(owed, unsent=unsent)
        return replace(owed, suspected=Cause.PUSH, suspected_for=now - left_at, unsent=unsent)

    def _owed(self, key: Key, now: float) -> Owed:
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

    def tally(
        self, source: int, *, after: UUID | None, limit: int
    ) -> tuple[Mapping[str, int], UUID | None]:
        with self._tables.open():
            keys = self._after(source, after)[:limit]
            counts = Counter(self._tables.jobs[key].delivery.queue for key in keys)
            return dict(counts), keys[-1][1] if len(keys) == limit else None

    def suspect(self, term: int, source: int, seen: Sequence[tuple[UUID, Cause, str]]) -> None:
        with self._leading(term) as now:
            for token, cause, mark in seen:
                for key in self._tables.owed(source, [token]):
                    before = self._tables.suspects.get(key)
                    self._tables.suspects[key] = _suspected(before, cause, mark, now)

    def clear(self, term: int, source: int, tokens: Sequence[UUID]) -> None:
        with self._leading(term) as now:
            for token in tokens:
                if not self._tables.was_declined((source, token), now):
                    self._tables.clear_marks((source, token))

    def envelopes(
        self, source: int, tokens: Sequence[UUID], *, most_bytes: int | None = None
    ) -> Sequence[Restorable]:
        tables = self._tables
        with tables.open():
            keys = [key for key in tables.owed(source, tokens) if key not in tables.history]
            found = [tables.jobs[key].delivery for key in keys]
            if most_bytes is not None:
                ends = accumulate(len(delivery.envelope) for delivery in found)
                found = [
                    delivery
                    for nth, (delivery, end) in enumerate(zip(found, ends, strict=True))
                    if end <= most_bytes or nth == 0
                ]
            return [
                Restorable(
                    token=delivery.token,
                    job_id=delivery.job_id,
                    queue=delivery.queue,
                    envelope=delivery.envelope,
                    due_at=delivery.due_at,
                    expires_at=delivery.expires_at,
                    trace=delivery.trace,
                )
                for delivery in found
            ]

    def rules(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, RecoverRule]:
        with self._tables.open():
            jobs = {t: self._tables.jobs.get((source, t)) for t in tokens}
            return {t: job.recover for t, job in jobs.items() if job and job.recover}

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

    def sharing_job_id(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        tables = self._tables
        with tables.open():
            found = set()
            for key in tables.owed(source, tokens):
                job = tables.jobs[key]
                id = job.delivery.job_id
                ended = any(
                    stone.job_id == id
                    and owner == source
                    and token != key[1]
                    and stone.outcome is not Outcome.SUPERSEDED
                    and stone.ended_at > job.recorded_at - RAN_BEFORE_RECORD
                    for (owner, token), stone in tables.history.items()
                )
                if ended or tables.of_job(source, [id]) != [key]:
                    found.add(key[1])
            return frozenset(found)

    def last_outcomes(self, source: int, job_ids: Sequence[str]) -> Mapping[str, LastOutcome]:
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
            return {job_id: LastOutcome(job_id in owed, last.get(job_id)) for job_id in job_ids}

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

    def restored(
        self,
        term: int,
        source: int,
        tokens: Sequence[UUID],
        *,
        causes: Mapping[UUID, Cause] | None = None,
    ) -> None:
        with self._leading(term) as now:
            for key in self._tables.owed(source, tokens):
                self._tables.jobs[key].recoveries += 1
                if causes and key[1] in causes:
                    self._tables.recoveries.setdefault(key, []).append(now)
                if not self._tables.was_declined(key, now):
                    self._tables.jobs[key].not_before = None
                    self._tables.clear_marks(key)

    def restores(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, int]:
        with self._tables.open():
            found = {}
            for key in self._tables.owed(source, tokens):
                stones = self._tables.history.items()
                before = (
                    s.recoveries for (of, _), s in stones if of == source and s.next == key[1]
                )
                job = self._tables.jobs[key]
                count = job.recoveries - job.declined - max(before, default=0)
                found[key[1]] = count - self._followed_by_deaths(key)
            return found

    def _followed_by_deaths(self, key: Key) -> int:
        """Return after how many restores of this delivery a worker of its queue died that had claims."""
        queue = self._tables.jobs[key].delivery.queue
        dead = [
            (row.beat_at, row.dead_at)
            for row in self._tables.workers.values()
            if row.dead_at is not None
            and row.claims
            and row.source == key[0]
            and queue in row.beat.queues
        ]
        restored = self._tables.recoveries.get(key, [])
        return sum(
            any(died > since and beat < absent for beat, died in dead)
            for since, absent in pairwise([*restored, self._tables.clock()])
        )

    def void(self, term: int, source: int, voids: Sequence[Void]) -> Sequence[UUID]:
        with self._leading(term) as now:
            return [void.token for void in voids if self._void((source, void.token), void, now)]

    def _void(self, key: Key, void: Void, now: float) -> bool:
        run = self._tables.running.get(key)
        if run is None or run.number != void.number:
            return False
        job = self._tables.jobs[key]
        job.claims = void.number
        job.last_worker = run.worker
        job.crashes += 1 if void.charge else 0
        job.not_before = now + void.backoff
        del self._tables.running[key]
        self._tables.suspects[key] = Suspect(Cause.WORKER, "", now)
        return True

    def close_owed(self, term: int, source: int, closings: Sequence[Closing]) -> Sequence[UUID]:
        with self._leading(term) as now:
            return [
                closing.token
                for closing in closings
                if self._close_owed((source, closing.token), closing, now)
            ]

    def _close_owed(self, key: Key, closing: Closing, now: float) -> bool:
        tables = self._tables
        if key not in tables.jobs:
            return False
        run = tables.running.get(key)
        if run is not None and tables.lives(key, run):
            return False
        if closing.part is not None:
            tables.count(key, tables.jobs[key].delivery, closing.part, now=now)
        if (
            closing.outcome is Outcome.DEAD and run is not None
        ):  # it has caused one more death than was charged
            tables.jobs[key].crashes += 1
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

    def requests(self, sources: Sequence[int], *, limit: int, most_bytes: int) -> Sequence[Request]:
        with self._tables.open():
            waiting = [
                replace(request, serializer=self._tables.sources[request.source].serializer)
                for id, request in sorted(self._tables.requests.items())
                if request.source in sources and id not in self._tables.held_requests
            ]
        sizes = accumulate(len(repr(r.args)) + len(repr(r.kwargs)) for r in waiting)
        fits = [r for r, size in zip(waiting, sizes, strict=True) if size <= most_bytes]
        return (fits or waiting[:1])[:limit]

    def accept(self, term: int, source: int, rendered: Sequence[tuple[int, Delivery]]) -> int:
        tables = self._tables
        with self._leading(term) as now:
            for _, delivery in rendered:
                tables.check(delivery.job_id, delivery.queue, delivery.task)
            waiting = tables.requests.keys() - tables.held_requests.keys()
            taken = [(id, d) for id, d in rendered if id in waiting]
            for id, _ in taken:
                del tables.requests[id]
            for _, delivery in taken:
                if not tables.take_key(source, delivery, now):
                    tables.history[source, delivery.token] = Tombstone(
                        Outcome.CANCELLED, ended_at=now, job_id=delivery.job_id
                    )
                    continue
                tables.jobs[source, delivery.token] = Job(delivery, now)
                tables.outbox[source, delivery.token] = (now, True)
            return len(taken)

    def hold_request(self, term: int, request: int, error: str) -> None:
        with self._leading(term):
            if request in self._tables.requests:
                self._tables.held_requests[request] = error

    def due_schedules(self, *, limit: int) -> Sequence[ScheduleRow]:
        with self._tables.open() as now:
            due = [
                schedule
                for schedule in self._tables.schedules.values()
                if schedule.namespace == self._namespace
                and not (schedule.finished or schedule.paused or schedule.error)
                and (schedule.fire_at is None or schedule.fire_at <= now)
            ]
            return [s.row for s in sorted(due, key=lambda s: s.fire_at or 0.0)][:limit]

    def fire(self, term: int, schedule: ScheduleRow, plan: Plan) -> int:
        tables = self._tables
        with self._leading(term) as now:
            held = tables.schedules.get((self._namespace, schedule.name))
            if held is None or held.paused or held.row != schedule:
                return 0
            fired = 0
            for slot in plan.slots:
                key = (self._namespace, schedule.name, slot)
                if key not in tables.slots:
                    id = len(tables.slots) + 1_000_000
                    tables.slots[key] = job_id = str(uuid4())
                    tables.requests[id] = Request(
                        id, held.source, job_id, held.queue, held.task, [], {}, now
                    )
                    fired += 1
            held.row = replace(schedule, next_at=plan.next_at)
            held.fire_at, held.finished = plan.fire_at, plan.next_at is None
            held.skipped += plan.skipped
            return fired

    def fail_schedule(self, term: int, schedule: ScheduleRow, error: str) -> None:
        with self._leading(term):
            held = self._tables.schedules.get((self._namespace, schedule.name))
            if held is not None and held.row.version == schedule.version:
                held.error = error

    def forget_slots(self) -> None:
        pass

    def rotate(self, *, retention: float, keep_envelopes: bool = False) -> int:
        if retention < 3600:
            raise ConfigurationError(f"retention must be an hour at least, not {retention} s")
        with self._tables.open() as now:
            self._tables.retentions[self._namespace] = retention
            self._tables.keep_envelopes = keep_envelopes
            # History that the other namespaces want is not dropped.
            others = {row.namespace for row in self._tables.sources.values()}
            wishes = self._tables.retentions
            retention = max(wishes.get(one, _RETENTION) for one in {*others, *wishes})
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

    def count_up(self, term: int, *, seconds: float) -> None:
        with self._leading(term):
            pass  # only people read the counts, and nobody looks at this ledger

    def vacuum(self) -> Sequence[str]:
        with self._tables.open():
            return ()

    def close(self) -> None:
        pass


def _suspected(before: Suspect | None, cause: Cause, mark: str, now: float) -> Suspect:
    """Return the suspicion after one more inspection."""
    if before is None:
        return Suspect(cause, mark, now)
    if before.cause in (Cause.WORKER, Cause.UNTRUSTED):
        cause = before.cause
    return Suspect(cause, mark, before.seen_at if before.mark == mark else now)
