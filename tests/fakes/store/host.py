"""The ledger in memory as producers and workers use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from jobguard.errors import BadRow
from jobguard.model import (
    Beat,
    Cause,
    Claim,
    ClaimAnswer,
    Delivery,
    End,
    Ended,
    Outcome,
    Parent,
    Recorded,
    Refusal,
    Refused,
    Unknown,
    WorkerDeclaredDead,
)
from jobguard.store.protocols import BeatReply, ClaimRequest, SourceRow
from tests.fakes.store.tables import Effect, Job, Key, Run, Suspect, Tables, Tombstone, Worker

_WATCHED = 300.0
"""Seconds after a leader's last tick in a source during which the source counts as watched."""
_MARGIN = 0.25
"""Seconds before the leader's turn in which a process no longer takes a push."""
_SMALLINT = range(-(2**15), 2**15)


class MemoryHostStore:
    """The calls of the application's processes, statement by statement."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.installation: str | None = None

    def conninfo(self) -> str | None:
        return None

    def probe(self) -> bool:
        with self._tables.open():
            return True

    def register(self, source: SourceRow) -> SourceRow:
        with self._tables.open():
            row = self._tables.sources.setdefault(source.id, source)
            if source.serializer:
                row = self._tables.sources[source.id] = replace(row, serializer=source.serializer)
            return row

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
                tables.check(delivery.job_id, delivery.queue, delivery.task)
                if delivery.priority not in _SMALLINT:
                    raise BadRow(f"priority {delivery.priority} is out of range")
            refused = set()
            for delivery in deliveries:
                key = (source, delivery.token)
                if key in tables.jobs:
                    if replay:  # a worker recorded it first, without knowing its parent
                        self._follow(source, Job(delivery, recorded_at=now), now=now, replay=True)
                    continue
                if self._is_excluded(source, delivery, now=now):
                    if not replay:
                        refused.add(delivery.token)
                    continue
                job = Job(delivery, recorded_at=now)
                if replay:
                    tables.fill_in(key, delivery.envelope)
                if replay and key in tables.history:
                    # It ended before its record; its parent may still be owed.
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

    def record_beside(
        self, source: int, delivery: Delivery, *, namespace: str, relaxed: bool = False
    ) -> Callable[[], Recorded]:
        recorded = self.record(source, [delivery], namespace=namespace, replay=True, newest=True)
        return lambda: recorded

    def _is_excluded(self, source: int, delivery: Delivery, *, now: float) -> bool:
        """Return True if it must not be owed, whether or not a worker has a claim; close its join."""
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
        """Write a tombstone for a late record whose job id has a younger delivery."""
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
            tables.history[source, token] = Tombstone(
                outcome=Outcome.SUPERSEDED,
                ended_at=now,
                job_id=delivery.job_id,
                queue=delivery.queue,
                task=delivery.task,
                next=max(younger),
            )
        return bool(younger)

    def _follow(self, source: int, job: Job, *, now: float, replay: bool) -> bool:
        """Supersede the parent.

        Return False if it has ended, has another child, or is claimed by another worker.
        """
        tables, token, parent = self._tables, job.delivery.token, job.delivery.parent
        if parent is None:
            return True
        key = (source, parent.token)
        older = tables.jobs.get(key)
        if older is not None:
            if not self._is_valid_parent(key, parent, replay=replay):
                return False
            tables.bury(key, parent.outcome, ended_at=now, next=token, error=parent.error)
            job.carry_counts(older)
            return True
        tombstone = tables.history.get(key)
        if tombstone is not None:
            return tombstone.next == token
        # The parent is not recorded yet. It must not be owed beside its child when its record
        # arrives.
        tables.history[key] = Tombstone(
            outcome=parent.outcome,
            ended_at=now,
            job_id=job.delivery.job_id,
            queue=job.delivery.queue,
            task=job.delivery.task,
            next=token,
            error=parent.error,
        )
        return True

    def _is_valid_parent(self, key: Key, parent: Parent, *, replay: bool) -> bool:
        run = self._tables.running.get(key)
        if parent.claim:
            if run is not None:
                return run.number == parent.claim
            # In a replay, a voided claim counts while no other worker has got one since.
            return replay and self._tables.jobs[key].claims == parent.claim
        # The run started while the store was away; perhaps the same worker has claimed it since. In a
        # replay its retry is in Redis already, and the worker that has the claim is probably dead.
        own = run is not None and (
            run.worker == parent.worker or (replay and parent.worker is not None)
        )
        return run is None or own or not self._tables.lives(key, run)

    def _owe(self, source: int, job: Job, *, now: float, outbox: bool) -> None:
        tables, delivery = self._tables, job.delivery
        self._supersede_older(source, job, now=now, younger=True)
        tables.jobs[source, delivery.token] = job
        if outbox:
            tables.outbox[source, delivery.token] = (now, True)

    def _supersede_older(self, source: int, job: Job, *, now: float, younger: bool = False) -> None:
        """Supersede unclaimed deliveries of the same job id, if the library keeps one body per job id."""
        tables, delivery = self._tables, job.delivery
        if (delivery.fresh and delivery.parent is None) or not tables.one_body(source):
            return
        for key in tables.of_job(source, [delivery.job_id]):
            if key not in tables.running and (younger or key[1] < delivery.token):
                job.carry_counts(tables.jobs[key])
                tables.bury(key, Outcome.SUPERSEDED, ended_at=now, next=delivery.token)

    def record_keyed(
        self, source: int, delivery: Delivery, *, namespace: str, deadline: float
    ) -> tuple[str, str | None, bool]:
        tables, rule = self._tables, delivery.rule
        assert rule is not None
        with tables.open() as now:
            led = tables.led(namespace, now)
            taken, until = tables.keys.get((source, rule.key), (delivery.token, 0.0))
            holder = None if taken == delivery.token else tables.key_holder(source, taken)
            verdict, parent = "free", None
            if holder is not None:
                owner = tables.jobs[source, holder].delivery.job_id
                if rule.on_conflict != "replace":
                    return "held", owner, led
                if (source, holder) not in tables.running:
                    verdict, parent = "replaced", Parent(holder)
                    tables.outbox[source, delivery.token] = (now, False)
                    tables.unseen[source, delivery.token] = now + deadline
            elif taken != delivery.token and until > now:
                return "throttled", None, led
            tables.keys[source, rule.key] = (delivery.token, now + rule.throttle)
            made = replace(delivery, parent=parent)
            if self.record(source, [made], namespace=namespace).refused:
                return "ended", None, led
            return verdict, None if holder is None else owner, led

    def installation_id(self) -> str:
        return self._tables.installation

    def record_in_transaction(self, source: int, deliveries: Sequence[Delivery]) -> None:
        """Record deliveries as a transaction of the application does that is committed."""
        tables = self._tables
        with tables.open() as now:
            for delivery in deliveries:
                key = (source, delivery.token)
                if key in tables.jobs or (delivery.derived and key in tables.history):
                    continue
                tables.jobs[key] = Job(delivery, recorded_at=now)
                tables.outbox[key], tables.unseen[key] = (now, True), math.inf

    def take_committed(
        self, source: int, tokens: Sequence[UUID], *, deadline: float
    ) -> frozenset[UUID]:
        tables = self._tables
        with tables.open() as now:
            keys = [(source, token) for token in tokens]
            keys = [key for key in keys if tables.unseen.get(key, 0.0) > now + _MARGIN]
            for key in keys:
                tables.supersede_others(key)
            taken = [key for key in keys if key in tables.unseen]
            for key in taken:
                tables.outbox[key] = (tables.outbox[key][0], False)
                tables.unseen[key] = now + deadline
            return frozenset(token for _, token in taken)

    def withdraw(self, source: int, tokens: Sequence[UUID]) -> None:
        with self._tables.open():
            for key in self._tables.owed(source, tokens):
                if key in self._tables.unseen:
                    continue
                if key not in self._tables.running and not self._tables.jobs[key].claims:
                    self._tables.drop(key)

    def refuse(self, source: int, deliveries: Sequence[Delivery]) -> None:
        tables = self._tables
        with tables.open() as now:
            for delivery in deliveries:
                key = (source, delivery.token)
                if key in tables.jobs or key in tables.history:
                    continue
                parent = delivery.parent and tables.history.get((source, delivery.parent.token))
                cancelled = parent is not None and parent.outcome is Outcome.CANCELLED
                tables.history[key] = Tombstone(
                    outcome=Outcome.CANCELLED if cancelled else Outcome.SUPERSEDED,
                    ended_at=now,
                    job_id=delivery.job_id,
                    queue=delivery.queue,
                    task=delivery.task,
                    attempt=delivery.attempt,
                )

    def outbox(self, source: int, tokens: Sequence[UUID]) -> None:
        with self._tables.open() as now:
            for key in self._tables.owed(source, tokens):
                self._tables.outbox.setdefault(key, (now, False))
                if key in self._tables.unseen:
                    self._tables.unseen[key] = now

    def claim(self, source: int, request: ClaimRequest) -> ClaimAnswer:
        tables, key = self._tables, (source, request.token)
        with tables.open() as now:
            job = tables.jobs.get(key)
            if job is None:
                tombstone = tables.history.get(key)
                if tombstone is None:
                    return Unknown(request.token)
                return Refused(request.token, Refusal.ENDED, tombstone.outcome)
            job.recover = request.recover or job.recover
            asker, run = tables.workers.get(request.worker), tables.running.get(key)
            dead = asker is not None and asker.dead_at is not None
            if run is None:
                if dead:
                    return WorkerDeclaredDead(request.token)
                return self._grant(key, request, job, number=job.claims + 1, now=now)
            if run.nonce == request.nonce and not dead:
                if run.worker != request.worker:
                    run.worker, run.claimed_at = request.worker, now
                return Claim(request.token, run.number, job.crashes)
            silent = tables.silent(run, now=now, timeout=request.worker_timeout)
            if tables.lives(key, run) and (tables.led(request.namespace, now) or not silent):
                if silent:  # the push that is skipped now may have been the only copy
                    tables.suspects.setdefault(key, Suspect(Cause.WORKER, "", now))
                return Refused(request.token, Refusal.CLAIMED)
            if dead:
                return WorkerDeclaredDead(request.token)
            return self._take_over(key, request, job, run, now=now)

    def claims(self, source: int, requests: Sequence[ClaimRequest]) -> Mapping[UUID, ClaimAnswer]:
        return {request.nonce: self.claim(source, request) for request in requests}

    def _grant(
        self, key: Key, request: ClaimRequest, job: Job, *, number: int, now: float
    ) -> Claim:
        self._tables.running[key] = Run(
            number, request.nonce, request.worker, request.pid, claimed_at=now
        )
        return Claim(request.token, number, job.crashes)

    def _take_over(
        self, key: Key, request: ClaimRequest, job: Job, run: Run, *, now: float
    ) -> Claim | Refused:
        job.crashes += 0 if self._tables.announced(run) else 1
        if job.crashes >= request.crash_budget or job.recover is not None:
            self._tables.bury(key, Outcome.DEAD, ended_at=now)
            return Refused(request.token, Refusal.SPENT)
        job.last_worker = run.worker
        return self._grant(key, request, job, number=run.number + 1, now=now)

    def predecessor(self, source: int, token: UUID) -> UUID | None:
        with self._tables.open():
            job = self._tables.jobs.get((source, token))
            return None if job is None else job.last_worker

    def lock(self, source: int, name: str, *, token: UUID, number: int) -> bool:
        tables = self._tables
        with tables.open():
            run = tables.running.get((source, token))
            if run is None or number not in (0, run.number):
                return False
            key, theirs = tables.locks.get((source, name), ((source, token), run.number))
            other = tables.running.get(key)
            stands = other is not None and other.number == theirs and tables.lives(key, other)
            if stands and (key, theirs) != ((source, token), run.number):
                return False
            tables.locks[source, name] = ((source, token), run.number)
            return True

    def unlock(self, source: int, name: str, *, token: UUID) -> None:
        with self._tables.open():
            lock = self._tables.locks.get((source, name))
            if lock is not None and lock[0] == (source, token):
                del self._tables.locks[source, name]

    def begin_effect(
        self, source: int, name: str, *, job_id: str | None, token: UUID, number: int, again: bool
    ) -> tuple[str, str | None]:
        tables = self._tables
        with tables.open():
            run = tables.running.get((source, token))
            if run is None or number not in (0, run.number):
                return "unclaimed", None
            mine = Effect(token, run.number, job_id)
            effect = tables.effects.setdefault((source, name), mine)
            if effect is mine:
                return "first", None
            over = (Outcome.COMPLETED, Outcome.CANCELLED)
            another_job = job_id is not None and any(
                key[0] == source
                and stone.job_id == job_id
                and stone.outcome in over
                and token != key[1] >= effect.token
                for key, stone in tables.history.items()
            )
            if not another_job:
                if effect.done:
                    return "done", effect.result
                theirs = tables.running.get((source, effect.token))
                stands = theirs is not None and theirs.number == effect.number
                other = (effect.token, effect.number) != (token, run.number)
                held = theirs is not None and tables.lives((source, effect.token), theirs)
                if other and stands and held:
                    return "busy", None
                if not again:
                    return "left", None
            tables.effects[source, name] = mine
            return "first", None

    def finish_effect(
        self, source: int, name: str, *, token: UUID, number: int, result: str | None
    ) -> None:
        with self._tables.open():
            effect = self._tables.effects.get((source, name))
            if effect is not None and effect.token == token and number in (0, effect.number):
                effect.done, effect.result = True, result

    def forget_effect(self, source: int, name: str, *, token: UUID, number: int) -> None:
        with self._tables.open():
            effect = self._tables.effects.get((source, name))
            mine = effect is not None and (effect.token, effect.done) == (token, False)
            if effect is not None and mine and number in (0, effect.number):
                del self._tables.effects[source, name]

    def release(
        self, source: int, token: UUID, worker: UUID, *, number: int, interrupted: bool = False
    ) -> None:
        with self._tables.open():
            run = self._tables.running.get((source, token))
            if run is not None and run.worker == worker and number in (0, run.number):
                job = self._tables.jobs[source, token]
                if interrupted and job.recover is not None:
                    return
                job.claims = max(job.claims, run.number)
                del self._tables.running[source, token]

    def end(self, source: int, ends: Sequence[End]) -> Sequence[Ended]:
        with self._tables.open() as now:
            for end in ends:
                self._tables.check(end.job_id, end.queue, end.task, end.error)
            self._tables.tasks |= {
                (source, end.task, end.queue) for end in ends if end.outcome is Outcome.COMPLETED
            }
            return [self._end((source, end.token), end, now=now) for end in ends]

    def _end(self, key: Key, end: End, *, now: float) -> Ended:
        tables = self._tables
        if key in tables.jobs:
            run = tables.running.get(key)
            if not _counts(end, run, lives=run is not None and tables.lives(key, run)):
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
            reported_by = (stone.outcome, stone.number, stone.worker)
            cancelled = reported_by == (Outcome.CANCELLED, end.number, end.worker)
            to_its_end = cancelled and end.outcome is Outcome.COMPLETED
            if to_its_end:
                stone = tables.history[key] = replace(stone, outcome=Outcome.COMPLETED)
            # A completed delivery that was closed by observation still adds its part to its join.
            if end.part is not None and {stone.outcome, end.outcome} == {Outcome.COMPLETED}:
                delivery_like = Delivery(key[1], stone.job_id, stone.queue, stone.task, b"")
                tables.count(key, delivery_like, end.part, now=now)
            return Ended.ENDED if to_its_end else Ended.LATE
        tables.history[key] = Tombstone(
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
            delivery_like = Delivery(end.token, end.job_id, end.queue, end.task, b"")
            tables.count(key, delivery_like, end.part, now=now)
        if not tables.one_body(key[0]):
            return Ended.UNKNOWN
        # It ran, so it had replaced an older delivery of its job id.
        for older in tables.of_job(key[0], [end.job_id]):
            if older not in tables.running and older[1] < end.token:
                tables.bury(older, Outcome.SUPERSEDED, ended_at=now, next=end.token)
        return Ended.UNKNOWN

    def open_join(self, source: int, join: str, *, size: int, state: bytes, namespace: str) -> bool:
        with self._tables.open() as now:
            row = self._tables.join(source, join, now)
            if not row.size or row.closed_at is not None:
                row.size, row.state, row.opened_at = size, state, now
                row.closed_at = row.closed_by = None
            return self._tables.led(namespace, now)

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
            job.not_before = now + min(wait * 2 ** min(job.declined, 20), 300.0)
            job.declined += 1
            tables.suspects[key] = Suspect(Cause.WORKER, "", now)
            return most - job.declined

    def now(self) -> float:
        with self._tables.open() as now:
            return now

    def cancel(
        self,
        source: int,
        *,
        tokens: Sequence[UUID] = (),
        job_ids: Sequence[str] = (),
        queue: str | None = None,
        meant: float | None = None,
        until: UUID | None = None,
        waiting: Sequence[UUID] = (),
    ) -> int:
        tables = self._tables
        with tables.open() as now:
            unclaimed = [
                key
                for key, job in tables.jobs.items()
                if key[0] == source and job.delivery.queue == queue and key not in tables.running
            ]
            named = [
                key
                for key in (*tables.of_job(source, job_ids), *unclaimed)
                if key[1] in waiting
                or (
                    meant is not None
                    and tables.jobs[key].recorded_at <= meant
                    and (until is None or key[1] <= until)
                )
            ]
            if until is not None and not tables.one_body(source):
                named += self._successors(source, job_ids, meant, until, waiting)
            keys = {*tables.owed(source, tokens), *named}
            for key in keys:
                tables.bury(key, Outcome.CANCELLED, ended_at=now)
            for token in tokens:
                tombstone = Tombstone(outcome=Outcome.CANCELLED, ended_at=now)
                tables.history.setdefault((source, token), tombstone)
            return len(keys)

    def _successors(
        self,
        source: int,
        job_ids: Sequence[str],
        meant: float | None,
        until: UUID,
        waiting: Sequence[UUID],
    ) -> list[Key]:
        """Return what is owed now and came of deliveries that a late cancel means."""
        tables = self._tables
        later = {
            stone.next
            for (owner, token), stone in tables.history.items()
            if owner == source
            and stone.job_id in job_ids
            and stone.outcome is Outcome.SUPERSEDED
            and (
                token in waiting
                or (
                    meant is not None
                    and (stone.recorded_at is None or stone.recorded_at <= meant)
                    and token <= until
                )
            )
        }
        found: list[Key] = []
        while later:
            token = later.pop()
            if token is None:
                continue
            found += tables.owed(source, [token])
            stone = tables.history.get((source, token))
            if stone is not None and stone.outcome is Outcome.SUPERSEDED:
                later.add(stone.next)
        return found

    def beat(self, source: int, beat: Beat, *, namespace: str) -> BeatReply:
        tables = self._tables
        with tables.open() as now:
            led = tables.led(namespace, now)
            worker = tables.workers.get(beat.worker)
            if worker is None:
                tables.workers[beat.worker] = Worker(
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
            if beat.counter >= worker.beat.counter:
                worker.beat, worker.claims = beat, frozenset(beat.claims)
                worker.previous_beat_at, worker.beat_at = worker.beat_at, now
            return BeatReply(leader_live=led)

    def leave(self, worker: UUID) -> None:
        with self._tables.open() as now:
            row = self._tables.workers.get(worker)
            if row is not None and row.left_at is None:
                row.left_at = now

    def report_death(self, worker: UUID) -> None:
        with self._tables.open() as now:
            row = self._tables.workers.get(worker)
            if row is not None and row.left_at is None and row.dead_at is None:
                row.dead_at, row.claims = now, self._tables.claims_of(worker)

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
                and queue.trusted_since
                <= (now if (source, token) in tables.running else job.recorded_at)
            )

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        return self._tables.outcomes(source, tokens)

    def amend(self, source: int, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        with self._tables.open():
            job = self._tables.jobs.get((source, token))
            if job is None:
                return False
            job.delivery = replace(job.delivery, envelope=change(job.delivery.envelope))
            return True

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


def _counts(end: End, run: Run | None, *, lives: bool) -> bool:
    """Return True if the reported end of an owed delivery counts; ``lives``: its claim is live."""
    completed = end.outcome is Outcome.COMPLETED
    if end.number == 0:  # it started while PostgreSQL was away
        return completed or not lives or run is None or end.worker == run.worker
    if run is None:
        return completed  # a zombie's completion contradicts no other claim
    return end.number == run.number
