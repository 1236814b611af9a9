"""The store of the host's processes: records, claims, ends and beats, one round trip each.

The SQL is in ``schema/queries.sql`` and, where a rule needs several queries, in the functions of
``schema/migrations``. This module builds the parameters and reads the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from uuid import UUID

from jobguard.errors import BadRow, JobguardError
from jobguard.model import (
    Beat,
    Claim,
    ClaimAnswer,
    Delivery,
    End,
    Ended,
    Outcome,
    Recorded,
    Refusal,
    Refused,
    Unknown,
    WorkerDeclaredDead,
)
from jobguard.schema import statements
from jobguard.sealing import Sealer
from jobguard.settings import Settings
from jobguard.store import texts
from jobguard.store.connection import Database, Flight
from jobguard.store.protocols import BeatReply, ClaimRequest, SourceRow

_SOURCE = (
    *("id", "namespace", "library", "address", "prefix"),
    *("name", "settings", "one_body", "serializer"),
)
_TASKS = 1_000
"""Largest number of tasks that a process remembers to have reported."""
_BATCH = 250
"""Largest number of deliveries in one statement: a larger one saves nothing and keeps its locks longer.
"""
_AMENDED_AT_MOST = 3
"""Number of tries to change an envelope that other processes change at the same time."""


class PostgresStore:
    """HostStore over one connection of this process."""

    def __init__(self, conninfo: Callable[[], str], settings: Settings) -> None:
        self._conninfo = conninfo
        self._db = Database(
            conninfo,
            connect_timeout=settings.connect_timeout,
            call_timeout=settings.call_timeout,
            pooler=settings.pooler,
        )
        self._sealer = Sealer(settings.encrypt)
        self._sql = statements()
        self.installation: str | None = None
        self._tasks: set[tuple[int, str, str]] = set()

    def conninfo(self) -> str | None:
        """Return the conninfo for another process; see HostStore."""
        return self._conninfo()

    def probe(self) -> bool:
        """Return True if PostgreSQL accepts a connection, without waiting; see HostStore."""
        return self._db.probe()

    def register(self, source: SourceRow) -> SourceRow:
        """Register the source; see HostStore."""
        values = {name: getattr(source, name) for name in _SOURCE}
        rows = self._db.execute(self._sql["register"], values)
        settings, epoch, n, run_id, self.installation = rows[0]
        return replace(
            source,
            settings=settings or source.settings,
            pulse_epoch=epoch,
            pulse_n=n,
            run_id=run_id,
        )

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
        """Commit deliveries as owed; see HostStore."""
        common = {
            "source": source,
            "namespace": namespace,
            "commit": "off" if relaxed and not outbox else None,
        }
        plain = not outbox and not replay and all(delivery.is_plain for delivery in deliveries)
        if plain and len(deliveries) == 1:
            rows = self._db.execute(
                self._sql["record_one"],
                common | self._row(deliveries[0]),
                payload=len(deliveries[0].envelope),
            )
            return Recorded(leader_live=rows[0][0])
        if plain:
            return self._record_fresh(deliveries, common)
        refused: set[UUID] = set()
        led = False
        for batch in _batches(deliveries):
            columns = common | self._columns(batch)
            payload = sum(len(d.envelope) for d in batch)
            rows = self._db.execute(
                self._sql["record"],
                columns
                | self._lineage(batch)
                | {
                    "outbox": outbox,
                    "replay": replay,
                    "newest": newest,
                    "ruled": any(d.recover for d in batch),
                },
                payload=payload,
            )
            refused.update(rows[0][0])
            led = rows[0][1]
        return Recorded(refused=frozenset(refused), leader_live=led)

    def record_keyed(
        self, source: int, delivery: Delivery, *, namespace: str, deadline: float
    ) -> tuple[str, str | None, bool]:
        """Commit a delivery if its key allows it; see HostStore."""
        assert delivery.rule is not None
        rows = self._db.execute(
            self._sql["record_keyed"],
            self._row(delivery)
            | {
                "source": source,
                "namespace": namespace,
                "key": texts.key(delivery.rule.key),
                "replace": delivery.rule.on_conflict == "replace",
                "window": delivery.rule.throttle,
                "deadline": deadline,
                "fresh": delivery.fresh,
                "derived": delivery.derived,
            },
            payload=len(delivery.envelope),
        )
        verdict, holder, refused, led, _ = rows[0]
        return "ended" if refused else verdict, holder, led

    def installation_id(self) -> str:
        """Return the identity of this ledger; see HostStore."""
        return str(self._db.execute(self._sql["installation_id"])[0][0])

    def take_committed(
        self, source: int, tokens: Sequence[UUID], *, deadline: float
    ) -> frozenset[UUID]:
        """Take the push of deliveries that were recorded in a transaction; see HostStore."""
        rows = self._db.execute(
            self._sql["take_committed"],
            {"source": source, "tokens": list(tokens), "deadline": deadline},
        )
        return frozenset(rows[0][0])

    def _record_fresh(self, deliveries: Sequence[Delivery], common: dict[str, Any]) -> Recorded:
        """Record deliveries that nothing can refuse; one statement commits while the next is made."""
        flight: Flight | None = None
        led = False
        for batch in _batches(deliveries):
            columns = common | self._columns(batch)
            payload = sum(len(d.envelope) for d in batch)
            before, flight = (
                flight,
                self._db.begin(self._sql["record_fresh"], columns, payload=payload),
            )
            if before is not None:
                before.read()
        if flight is not None:
            led = flight.read()[0][0]
        return Recorded(leader_live=led)

    def record_beside(
        self, source: int, delivery: Delivery, *, namespace: str, relaxed: bool = False
    ) -> Callable[[], Recorded]:
        """Send the record of a delivery, and return a function that waits for its commit; see HostStore."""
        common = {"source": source, "namespace": namespace, "commit": "off" if relaxed else None}
        flight = self._db.begin(
            self._sql["record_beside"], common | self._row(delivery), payload=len(delivery.envelope)
        )
        return lambda: Recorded(leader_live=flight.read()[0][1])

    def withdraw(self, source: int, tokens: Sequence[UUID]) -> None:
        """Delete deliveries that were never pushed; see HostStore."""
        self._db.execute(self._sql["withdraw"], {"source": source, "tokens": list(tokens)})

    def refuse(self, source: int, deliveries: Sequence[Delivery]) -> None:
        """Write tombstones for pushed deliveries whose records were refused; see HostStore."""
        columns = {
            "token": [one.token for one in deliveries],
            "parent": [one.parent and one.parent.token for one in deliveries],
            "job_id": [one.job_id for one in deliveries],
            "queue": [one.queue for one in deliveries],
            "task": [one.task for one in deliveries],
            "attempt": [one.attempt for one in deliveries],
        }
        self._db.execute(self._sql["refuse"], {"source": source, **columns})

    def outbox(self, source: int, tokens: Sequence[UUID]) -> None:
        """Leave the push to the leader; see HostStore."""
        self._db.execute(self._sql["outbox"], {"source": source, "tokens": list(tokens)})

    def claim(self, source: int, request: ClaimRequest) -> ClaimAnswer:
        """Grant a claim, or return why not; see HostStore."""
        rows = self._db.execute(
            self._sql["claim"],
            {
                "source": source,
                "token": request.token,
                "nonce": request.nonce,
                "worker": request.worker,
                "pid": request.pid,
                "namespace": request.namespace,
                "timeout": request.worker_timeout,
                "budget": request.crash_budget - 1,  # number of deaths that a delivery survives
                "recover": request.recover,
            },
        )
        return _claim_answer(request.token, *rows[0])

    def claims(self, source: int, requests: Sequence[ClaimRequest]) -> Mapping[UUID, ClaimAnswer]:
        """Answer several claim requests; see HostStore."""
        one = requests[0]
        rows = self._db.execute(
            self._sql["claims"],
            {
                "source": source,
                "token": [request.token for request in requests],
                "nonce": [request.nonce for request in requests],
                "worker": [request.worker for request in requests],
                "pid": one.pid,
                "namespace": one.namespace,
                "timeout": one.worker_timeout,
                "budget": one.crash_budget - 1,
                "recover": [request.recover for request in requests],
            },
        )
        return {nonce: _claim_answer(token, *found) for nonce, token, *found in rows}

    def predecessor(self, source: int, token: UUID) -> UUID | None:
        """Return the worker whose claim was taken away last; see HostStore."""
        rows = self._db.execute(self._sql["predecessor"], {"source": source, "token": token})
        return rows[0][0] if rows else None

    def lock(self, source: int, name: str, *, token: UUID, number: int) -> bool:
        """Take a lock on behalf of a claim; see HostStore."""
        return bool(
            self._db.execute(
                self._sql["lock"],
                {"source": source, "name": texts.key(name), "token": token, "number": number},
            )
        )

    def unlock(self, source: int, name: str, *, token: UUID) -> None:
        """Release a lock; see HostStore."""
        self._db.execute(
            self._sql["unlock"], {"source": source, "name": texts.key(name), "token": token}
        )

    def begin_effect(
        self, source: int, name: str, *, job_id: str | None, token: UUID, number: int, again: bool
    ) -> tuple[str, str | None]:
        """Begin an effect on behalf of a claim; see HostStore."""
        rows = self._db.execute(
            self._sql["begin_effect"],
            {
                "source": source,
                "key": texts.key(name),
                "job_id": job_id,
                "token": token,
                "number": number,
                "again": again,
            },
        )
        return rows[0][0], rows[0][1]

    def finish_effect(
        self, source: int, name: str, *, token: UUID, number: int, result: str | None
    ) -> None:
        """Store that an effect is done; see HostStore."""
        self._db.execute(
            self._sql["finish_effect"],
            {
                "source": source,
                "key": texts.key(name),
                "token": token,
                "number": number,
                "result": result,
            },
        )

    def forget_effect(self, source: int, name: str, *, token: UUID, number: int) -> None:
        """Delete an effect that is not done; see HostStore."""
        self._db.execute(
            self._sql["forget_effect"],
            {"source": source, "key": texts.key(name), "token": token, "number": number},
        )

    def release(
        self, source: int, token: UUID, worker: UUID, *, number: int, interrupted: bool = False
    ) -> None:
        """Remove this worker's claim; see HostStore."""
        self._db.execute(
            self._sql["release"],
            {
                "source": source,
                "token": token,
                "worker": worker,
                "number": number,
                "interrupted": interrupted,
            },
        )

    def end(self, source: int, ends: Sequence[End]) -> Sequence[Ended]:
        """Move deliveries to history; see HostStore."""
        if not ends:
            return []
        rows = self._db.execute(
            self._sql["end"],
            {
                "source": source,
                "token": [e.token for e in ends],
                "number": [e.number for e in ends],
                "outcome": [e.outcome.value for e in ends],
                "worker": [e.worker for e in ends],
                "ended": [e.ended_at for e in ends],
                "job_id": [e.job_id for e in ends],
                "queue": [e.queue for e in ends],
                "task": [e.task for e in ends],
                "error": [self._sealer.seal_text(e.error) for e in ends],
                "join": [texts.key(e.part.join) if e.part else None for e in ends],
                "part": [self._sealer.seal(e.part.state) if e.part else None for e in ends],
            },
            payload=sum(len(e.error or "") + len(e.part.state if e.part else b"") for e in ends),
        )
        answers = [Ended(answer) for answer in rows[0][0]]
        self._know_tasks(source, ends)
        late = [
            end
            for end, answer in zip(ends, answers, strict=True)
            if answer is Ended.LATE and end.outcome is Outcome.COMPLETED
        ]
        if not late:
            return answers
        completed = self._completed_after_all(source, late)
        return [
            Ended.ENDED if end in late and end.token in completed else answer
            for end, answer in zip(ends, answers, strict=True)
        ]

    def _know_tasks(self, source: int, ends: Sequence[End]) -> None:
        """Remember the tasks that completed, once for each process: SQL callers are warned of others."""
        done = {(source, e.task, e.queue) for e in ends if e.outcome is Outcome.COMPLETED}
        fresh = sorted(done - self._tasks)
        if not fresh or len(self._tasks) >= _TASKS:
            return
        self._tasks |= done
        # The ends are committed: an error here must not make the caller report them again.
        with suppress(JobguardError):
            self._db.execute(
                self._sql["know_tasks"],
                {
                    "source": source,
                    "task": [texts.key(task) for _, task, _ in fresh],
                    "queue": [texts.key(queue) for _, _, queue in fresh],
                },
            )

    def _completed_after_all(self, source: int, ends: Sequence[End]) -> set[UUID]:
        """Change tombstones from cancelled to completed for runs that were cancelled but completed."""
        rows = self._db.execute(
            self._sql["completed_after_all"],
            {
                "source": source,
                "token": [end.token for end in ends],
                "number": [end.number for end in ends],
                "worker": [end.worker for end in ends],
            },
        )
        completed = {row[0] for row in rows}
        # These deliveries now count as completed, so their joins get their parts.
        self.end(source, [end for end in ends if end.part and end.token in completed])
        return completed

    def now(self) -> float:
        """Return the database's clock; see HostStore."""
        return float(self._db.execute(self._sql["now"])[0][0])

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
        """Write tombstones; see HostStore."""
        rows = self._db.execute(
            self._sql["cancel"],
            {
                "source": source,
                "tokens": list(tokens),
                "job_ids": list(job_ids),
                "queue": queue,
                "meant": meant,
                "until": until,
                "waiting": list(waiting),
            },
        )
        return int(rows[0][0])

    def open_join(self, source: int, join: str, *, size: int, state: bytes, namespace: str) -> bool:
        """Store a join; see HostStore."""
        rows = self._db.execute(
            self._sql["open_join"],
            {
                "source": source,
                "join": texts.key(join),
                "name": texts.name(join),
                "size": size,
                "state": self._sealer.seal(state),
                "namespace": namespace,
            },
            payload=len(state),
        )
        return bool(rows[0][0])

    def close_join(self, source: int, join: str) -> None:
        """Close a join that will have no continuation; see HostStore."""
        self._db.execute(self._sql["close_join"], {"source": source, "join": texts.key(join)})

    def decline(self, source: int, token: UUID, *, most: int, wait: float, error: str) -> int:
        """Put a delivery back after a delay, or bury it in the end; see HostStore."""
        rows = self._db.execute(
            self._sql["decline"],
            {
                "source": source,
                "token": token,
                "most": most,
                "wait": wait,
                "error": self._sealer.seal_text(error),
            },
        )
        return int(rows[0][0])

    def beat(self, source: int, beat: Beat, *, namespace: str) -> BeatReply:
        """Store a worker's beat; see HostStore."""
        epoch, n = beat.pulse or (None, None)
        rows = self._db.execute(
            self._sql["beat"],
            {
                "source": source,
                "namespace": namespace,
                "worker": beat.worker,
                "name": beat.name,
                "host": beat.host,
                "pid": beat.pid,
                "queues": list(beat.queues),
                "claims": list(beat.claims),
                "beat": beat.counter,
                "unflushed": beat.unflushed_since,
                "epoch": epoch,
                "n": n,
            },
        )
        return BeatReply(dead=rows[0][0], leader_live=rows[0][1])

    def leave(self, worker: UUID) -> None:
        """Store that a worker has exited regularly; see HostStore."""
        self._db.execute(self._sql["leave"], {"worker": worker})

    def report_death(self, worker: UUID) -> None:
        """Store that a worker's process is gone; see HostStore."""
        self._db.execute(self._sql["report_death"], {"worker": worker})

    def recoverable(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those deliveries that a leader will restore; see HostStore."""
        rows = self._db.execute(
            self._sql["recoverable"], {"source": source, "tokens": list(tokens)}
        )
        return frozenset(token for (token,) in rows)

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Return the outcome of each delivery that has ended; see HostStore."""
        rows = self._db.execute(self._sql["tombstones"], {"source": source, "tokens": list(tokens)})
        return {token: Outcome(outcome) for token, outcome in rows}

    def amend(self, source: int, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change an envelope; see HostStore."""
        for _ in range(_AMENDED_AT_MOST):
            key: dict[str, Any] = {"source": source, "token": token}
            rows = self._db.execute(self._sql["envelope_of"], key)
            if not rows:
                return False
            stored = bytes(rows[0][0])
            before = self._sealer.unseal(stored)
            after = change(before)
            changed = {**key, "before": stored, "envelope": self._sealer.seal(after)}
            if after == before or self._db.execute(self._sql["amend"], changed):
                return True
        return False

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
        """Store a running job's progress; see HostStore."""
        tokens = [token] if token is not None else self._owed_of(source, job_id)
        rows = self._db.execute(
            self._sql["heartbeat"],
            {
                "source": source,
                "tokens": tokens,
                "number": number,
                "progress": progress,
                "attrs": None if attrs is None else texts.json_text(attrs),
            },
        )
        return bool(rows)

    def _owed_of(self, source: int, job_id: str) -> list[UUID]:
        rows = self._db.execute(self._sql["owed_of"], {"source": source, "job_id": job_id})
        return [token for (token,) in rows]

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def _row(self, delivery: Delivery) -> dict[str, Any]:
        if not -32768 <= delivery.priority <= 32767:
            raise BadRow(f"priority {delivery.priority} is out of range")
        return {
            "token": delivery.token,
            "job_id": delivery.job_id,
            "queue": delivery.queue,
            "task": delivery.task,
            "priority": delivery.priority,
            "attempt": min(delivery.attempt, 32767),
            "due": texts.moment(delivery.due_at),
            "expires": texts.moment(delivery.expires_at),
            "key": delivery.key,
            "trace": delivery.trace,
            "recover": delivery.recover,
            "envelope": self._sealer.seal(delivery.envelope),
        }

    def _columns(self, batch: Sequence[Delivery]) -> dict[str, Any]:
        rows = [self._row(d) for d in batch]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _lineage(self, batch: Sequence[Delivery]) -> dict[str, Any]:
        seal = self._sealer.seal_text
        return {
            "parent": [d.parent.token if d.parent else None for d in batch],
            "speaker": [d.parent.worker if d.parent else None for d in batch],
            # 0: the run was started while PostgreSQL was away, and has no claim.
            "claim": [d.parent.claim or None if d.parent else None for d in batch],
            "outcome": [d.parent.outcome.value if d.parent else None for d in batch],
            "fresh": [d.fresh for d in batch],
            "derived": [d.derived for d in batch],
            "error": [seal(d.parent.error) if d.parent else None for d in batch],
            "closes": [d.closes and texts.key(d.closes) for d in batch],
        }


def _claim_answer(
    token: UUID, kind: str, number: int, crashes: int, outcome: str | None
) -> ClaimAnswer:
    if kind == "granted":
        return Claim(token, number, crashes)
    if kind == "unknown":
        return Unknown(token)
    if kind == "disowned":
        return WorkerDeclaredDead(token)
    return Refused(token, Refusal(kind), Outcome(outcome) if outcome else None)


def _batches(deliveries: Sequence[Delivery]) -> Iterator[Sequence[Delivery]]:
    """Split the deliveries into statements of a good size, none of which has a job id twice.

    The order of the records decides which delivery of a job id is owed, and one statement has no order.
    """
    batch: list[Delivery] = []
    ids: set[str] = set()
    for delivery in deliveries:
        if len(batch) == _BATCH or delivery.job_id in ids:
            yield batch
            batch, ids = [], set()
        batch.append(delivery)
        ids.add(delivery.job_id)
    if batch:
        yield batch
