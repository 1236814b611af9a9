"""The store of the leader: the lease, the inspections, and the actions of the leader.

Every write names the term and locks the lease row (``for share``). So a takeover waits for the write,
and a leader whose term is over changes no row.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from jobguard.errors import BadRow, KeysUnavailable, NotLeading, NotWritten, Unsealable
from jobguard.log import log_event
from jobguard.model import (
    RAN_BEFORE_RECORD,
    Cause,
    Delivery,
    EndedPart,
    LastOutcome,
    OpenJoin,
    Outcome,
    Owed,
    RecoverRule,
    Request,
    Restorable,
    token_at,
)
from jobguard.schema import statements
from jobguard.scripts import chunks
from jobguard.sealing import Sealer
from jobguard.settings import Settings
from jobguard.store import texts
from jobguard.store.connection import Database, Row
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

_FIRST = token_at(0)
_LEAST = UUID(int=0)
_NO_BOUND = 1 << 62
_JOINED = 250
"""Rows of one statement that joins them with what it locked. If the planner is wrong about their number,
it compares each with each.
"""
_TRUSTED = 500
"""Queues of one statement."""
_CALL_TIMEOUT = 5.0
"""A leader may wait longer than a host, but not longer than half its lease."""
_COUNTING = 30.0
"""Seconds for a count of all rows, which decides nothing."""
_STEPS = 100
"""Largest number of retention steps of one kind in one call, each a transaction of its own. The next call
does the rest.
"""
_ROTATING = 60.0
"""Seconds after which a call begins no further retention step: its process must not look stuck."""


class PostgresLeaderStore:
    """LeaderStore over one connection."""

    def __init__(
        self, conninfo: Callable[[], str], namespace: str, holder: UUID, settings: Settings
    ) -> None:
        patient = with_patience(settings)
        self._db = Database(
            conninfo,
            connect_timeout=patient.connect_timeout,
            call_timeout=patient.call_timeout,
            pooler=settings.pooler,
            application_name="jobguard reconciler",
        )
        self._sealer = Sealer(settings.encrypt)
        self._sql = statements()
        self._namespace = namespace
        self._holder = holder
        self._logged_identity = False

    def _ask(self, name: str, **values: Any) -> list[Row]:
        return self._db.execute(self._sql[name], values)

    def _write(self, name: str, term: int, *, payload: int = 0, **values: Any) -> list[Row]:
        """Run a write of the leader. An empty answer means that the term was refused."""
        return self._db.execute(
            self._sql[name], values | {"namespace": self._namespace, "term": term}, payload=payload
        )

    def elect(self, *, lease: float, patience: float = 0.0) -> int | None:
        """Take the lease if it has been free for ``patience`` seconds; see LeaderStore."""
        rows = self._ask(
            "elect",
            namespace=self._namespace,
            holder=self._holder,
            host=socket.gethostname(),
            pid=os.getpid(),
            lease=lease,
            patience=patience,
        )
        return int(rows[0][0]) if rows else None

    def renew(self, term: int, *, lease: float) -> Brake:
        """Extend the lease of this term and return the brake; see LeaderStore."""
        rows = self._write("renew", term, holder=self._holder, lease=lease)
        if not rows:
            raise NotLeading(f"term {term} is over")
        return Brake(paused=rows[0][0], held=rows[0][1])

    def signs(self, term: int) -> Signs:
        """Return the brake, and whether there is anything to do; see LeaderStore."""
        rows = self._write("signs", term, holder=self._holder)
        if not rows:
            raise NotLeading(f"term {term} is over")
        paused, held, owed, requested, sources = rows[0]
        return Signs(Brake(paused=paused, held=held), owed, requested, sources)

    def resign(self, term: int) -> None:
        """Give up the lease; see LeaderStore."""
        self._write("resign", term, holder=self._holder)

    def now(self) -> float:
        """Return the database's clock; see LeaderStore."""
        return float(self._ask("now")[0][0])

    def identity(self) -> Mapping[str, str | None]:
        """Return the installation as it was stored and as it is now; see LeaderStore."""
        try:
            row = self._ask("identity")[0]
        except (NotWritten, BadRow) as error:
            # Database hosting services refuse the system identifier with different errors. If the
            # error has another cause, the next statement fails too.
            row = self._ask("identity_without_control")[0]
            if not self._logged_identity:
                self._logged_identity = True
                log_event("identity_partial", error=str(error))
        names = ("id", "name", "system_identifier", "database_oid", "system_now", "database_now")
        return dict(zip(names, row, strict=True))

    def sources(self) -> Sequence[SourceRow]:
        """Return the sources of the namespace; see LeaderStore."""
        return [SourceRow(*row) for row in self._ask("sources", namespace=self._namespace)]

    def acknowledge(
        self, term: int, source: int, known: Pulse, pulse: Pulse, *, run_id: str | None
    ) -> bool:
        """Store the pulse of Redis; see LeaderStore."""
        (known_epoch, known_n), (epoch, n) = known, pulse
        rows = self._write(
            "acknowledge",
            term,
            source=source,
            known_epoch=known_epoch,
            known_n=known_n,
            epoch=epoch,
            n=n,
            run_id=run_id,
        )
        return bool(self._led(rows)[0][0])

    @staticmethod
    def _led(rows: list[Row]) -> list[Row]:
        if not rows:
            raise NotLeading("the term is over: nothing was changed")
        return rows

    def open_incident(
        self, term: int, source: int, cause: Cause, detail: str, epoch: UUID | None
    ) -> int:
        """Store a loss; see LeaderStore."""
        rows = self._write(
            "open_incident", term, source=source, cause=cause.value, detail=detail, epoch=epoch
        )
        return int(self._led(rows)[0][0])

    def incidents(self, source: int) -> Sequence[Incident]:
        """Return the open incidents; see LeaderStore."""
        return [
            Incident(id, where, Cause(cause), *rest)
            for id, where, cause, *rest in self._ask("incidents", source=source)
        ]

    def progress(
        self, term: int, incident: int, *, missing: int, restored: int, close: bool
    ) -> None:
        """Add to an incident's counts; see LeaderStore."""
        self._led(
            self._write(
                "incident_progress",
                term,
                incident=incident,
                missing=missing,
                restored=restored,
                close=close,
            )
        )

    def workers(self, source: int) -> Sequence[WorkerRow]:
        """Return the workers that have not been forgotten; see LeaderStore."""
        return [
            WorkerRow(
                id=id,
                name=name,
                host=host,
                pid=pid,
                queues=queues,
                beat=beat,
                started_at=started,
                unflushed_since=unflushed,
                pulse=None if epoch is None else (epoch, n),
                left_age=left,
                dead=dead,
                claims=claims,
            )
            for (
                id, name, host, pid, queues, beat, started, unflushed, epoch, n, left, dead, claims,
            ) in self._ask("workers", source=source)
        ]  # fmt: skip

    def charges(self, source: int, workers: Sequence[UUID]) -> Mapping[UUID, Sequence[int]]:
        """Return how often the jobs of these workers are charged; see LeaderStore."""
        return dict(self._ask("charges", source=source, workers=list(workers)))

    def listed(self, source: int, tokens: Sequence[UUID]) -> tuple[frozenset[UUID], bool]:
        """Return those that a live worker lists; see LeaderStore."""
        listed, unflushed = self._ask("listed", source=source, tokens=list(tokens))[0]
        return frozenset(listed), unflushed

    def declare_dead(self, term: int, workers: Sequence[UUID]) -> Mapping[UUID, int]:
        """Declare these workers dead: their claims are void from now on; see LeaderStore."""
        rows = self._led(self._write("declare_dead", term, workers=list(workers)))
        return {worker: int(claims) for worker, claims in rows if worker is not None}

    def forget(self, term: int, workers: Sequence[UUID]) -> None:
        """Delete rows of workers that have no claims; see LeaderStore."""
        self._led(self._write("forget", term, workers=list(workers)))

    def page(self, source: int, *, after: UUID | None, limit: int) -> Sequence[Owed]:
        """Return owed deliveries in the order of their tokens; see LeaderStore."""
        rows = self._ask("page", source=source, after=after or _FIRST, limit=limit)
        return [_owed(row) for row in rows]

    def see_committed(self, term: int, source: int, *, wait: float) -> int:
        """See what transactions of the application have committed; see LeaderStore."""
        seen = self._write("see_committed", term, source=source, wait=wait)[0][0]
        if seen is None:
            raise NotLeading("the term is over: nothing was changed")
        return int(seen)

    def watched(
        self, source: int, *, limit: int, after: UUID | None = None, urgent: bool = False
    ) -> Sequence[Owed]:
        """Return the deliveries of every inspection; see LeaderStore."""
        rows = self._ask(
            "watched", source=source, after=after or _FIRST, limit=limit, urgent=urgent
        )
        return [_owed(row) for row in rows]

    def unheld(
        self, source: int, *, after: UUID | None, workers: int, limit: int
    ) -> tuple[Sequence[Owed], UUID | None]:
        """Return claims that their workers do not hold; see LeaderStore."""
        found = self._ask("claimants", after=after or _LEAST, limit=workers)
        ids = [worker for (worker,) in found]
        rows = self._ask("unheld", source=source, workers=ids, limit=limit) if ids else []
        return [_owed(row) for row in rows], ids[-1] if len(ids) == workers else None

    def tally(
        self, source: int, *, after: UUID | None, limit: int
    ) -> tuple[Mapping[str, int], UUID | None]:
        """Count a slice of the owed deliveries by queue; see LeaderStore."""
        rows = self._ask("tally", source=source, after=after or _FIRST, limit=limit)
        counts = {queue: int(n) for queue, n, _ in rows}
        return counts, rows[0][2] if sum(counts.values()) == limit else None

    def suspect(self, term: int, source: int, seen: Sequence[tuple[UUID, Cause, str]]) -> None:
        """Store that these were seen absent; see LeaderStore."""
        if seen:
            self._led(
                self._write(
                    "suspect",
                    term,
                    source=source,
                    token=[token for token, _, _ in seen],
                    cause=[cause.value for _, cause, _ in seen],
                    mark=[mark for _, _, mark in seen],
                )
            )

    def clear(self, term: int, source: int, tokens: Sequence[UUID]) -> None:
        """Store that these are in their place; see LeaderStore."""
        if tokens:
            self._led(self._write("clear", term, source=source, tokens=list(tokens)))

    def envelopes(
        self, source: int, tokens: Sequence[UUID], *, most_bytes: int | None = None
    ) -> Sequence[Restorable]:
        """Return the data to restore these; see LeaderStore."""
        most = _NO_BOUND if most_bytes is None else most_bytes
        rows = self._db.execute(
            self._sql["envelopes"],
            {"source": source, "tokens": list(tokens), "most": most},
            timeout=_CALL_TIMEOUT,
        )
        found = []
        for token, job_id, queue, stored, due_at, expires_at, trace in rows:
            plain = self._unsealed(stored)
            found.append(
                Restorable(
                    *(token, job_id, queue, plain or b"", due_at, expires_at),
                    sealed=plain is None,
                    trace=trace,
                )
            )
        return found

    def _unsealed(self, stored: bytes) -> bytes | None:
        try:
            return self._sealer.unseal(bytes(stored))
        except (Unsealable, KeysUnavailable):
            return None

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Return the outcome of each delivery that has ended; see LeaderStore."""
        if not tokens:
            return {}
        rows = self._ask("tombstones", source=source, tokens=list(tokens))
        return {token: Outcome(outcome) for token, outcome in rows}

    def rules(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, RecoverRule]:
        """Return the rules of those owed deliveries that have one; see LeaderStore."""
        return dict(self._ask("rules", source=source, tokens=list(tokens)) if tokens else ())

    def known(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those deliveries that are owed or ended; see LeaderStore."""
        return self._chosen("known", source, tokens)

    def overtaken(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those after which a later delivery of the same job id began; see LeaderStore."""
        return self._chosen("overtaken", source, tokens)

    def sharing_job_id(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those that share their job id with another delivery; see LeaderStore."""
        return self._chosen("sharing_job_id", source, tokens, early=RAN_BEFORE_RECORD)

    def _chosen(
        self, name: str, source: int, tokens: Sequence[UUID], **more: float
    ) -> frozenset[UUID]:
        rows = self._ask(name, source=source, tokens=list(tokens), **more) if tokens else ()
        return frozenset(token for (token,) in rows)

    def last_outcomes(self, source: int, job_ids: Sequence[str]) -> Mapping[str, LastOutcome]:
        """Return what is known about each of these job ids; see LeaderStore."""
        rows = self._ask("last_outcomes", source=source, job_ids=list(job_ids))
        return {
            job_id: LastOutcome(owed, Outcome(outcome) if outcome else None)
            for job_id, owed, outcome in rows
        }

    def open_joins(self, source: int, *, after: str, limit: int) -> Sequence[OpenJoin]:
        """Return joins that have not been closed; see LeaderStore."""
        return self._joins(
            source, self._ask("open_joins", source=source, after=texts.key(after), limit=limit)
        )

    def complete_joins(self, source: int, *, quiet: float, limit: int) -> Sequence[OpenJoin]:
        """Return joins whose members have all ended; see LeaderStore."""
        rows = self._ask("complete_joins", source=source, quiet=quiet, limit=limit)
        return self._joins(source, rows)

    def _joins(self, source: int, rows: Sequence[Row]) -> Sequence[OpenJoin]:
        if not rows:
            return []
        parts: dict[str, list[EndedPart]] = {}
        keys = [texts.key(row[0]) for row in rows]
        sealed: set[str] = set()
        for key, token, job_id, queue, *stored in self._ask(
            "join_parts", source=source, joins=keys
        ):
            state, envelope = map(self._unsealed, stored)
            if state is None or envelope is None:
                sealed.add(key)
            else:
                parts.setdefault(key, []).append(EndedPart(token, job_id, queue, state, envelope))
        found = []
        for key, (id, size, stored) in zip(keys, rows, strict=True):
            state = self._unsealed(stored)
            if state is None or key in sealed:
                # The jobs of this join are sealed, too: the restorer reports it.
                continue
            found.append(OpenJoin(id, size, state, tuple(parts.get(key, ()))))
        return found

    def restored(
        self,
        term: int,
        source: int,
        tokens: Sequence[UUID],
        *,
        causes: Mapping[UUID, Cause] | None = None,
    ) -> None:
        """Store that these were restored; see LeaderStore."""
        if not tokens:
            return
        why = [causes[token].value if causes and token in causes else None for token in tokens]
        self._led(self._write("restored", term, source=source, tokens=list(tokens), causes=why))

    def restores(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, int]:
        """Return how often each of these was restored and no death explains it; see LeaderStore."""
        rows = self._ask("restores", source=source, tokens=list(tokens)) if tokens else []
        return {token: int(count) for token, count in rows}

    def void(self, term: int, source: int, voids: Sequence[Void]) -> Sequence[UUID]:
        """Remove claims of dead workers; see LeaderStore."""
        voided: list[UUID] = []
        for some in chunks(voids, _JOINED):
            rows = self._write(
                "void",
                term,
                source=source,
                token=[v.token for v in some],
                number=[v.number for v in some],
                charge=[v.charge for v in some],
                backoff=[v.backoff for v in some],
            )
            voided += self._led(rows)[0][0]
        return voided

    def close_owed(self, term: int, source: int, closings: Sequence[Closing]) -> Sequence[UUID]:
        """End these on behalf of the leader; see LeaderStore."""
        closed: list[UUID] = []
        for some in chunks(closings, _JOINED):
            rows = self._write(
                "close_owed",
                term,
                source=source,
                token=[c.token for c in some],
                outcome=[c.outcome.value for c in some],
                error=[self._sealer.seal_text(c.error) for c in some],
                join=[texts.key(c.part.join) if c.part else None for c in some],
                part=[self._sealer.seal(c.part.state) if c.part else None for c in some],
            )
            closed += self._led(rows)[0][0]
        return closed

    def queues(self, source: int) -> Sequence[QueueRow]:
        """Return what is known about the consumers of each queue; see LeaderStore."""
        return [QueueRow(*row) for row in self._ask("queues", source=source)]

    def trust(self, term: int, rows: Sequence[QueueRow]) -> None:
        """Store what is known about the consumers of these queues; see LeaderStore."""
        for some in chunks(rows, _TRUSTED):
            self._led(
                self._write(
                    "trust",
                    term,
                    source=some[0].source,
                    queue=[texts.key(row.queue) for row in some],
                    full=[texts.name(row.queue) for row in some],
                    trusted=[row.trusted_since for row in some],
                    clean=[row.clean_since for row in some],
                    unguarded=[texts.json_text(row.unguarded) for row in some],
                    unguarded_at=[row.unguarded_at for row in some],
                )
            )

    def hold(self, term: int, source: int, queue: str, reason: str) -> None:
        """Hold a queue until a person resumes it; see LeaderStore."""
        self._led(self._write("hold", term, key=f"{source}/{queue}", reason=reason))

    def requests(self, sources: Sequence[int], *, limit: int, most_bytes: int) -> Sequence[Request]:
        """Return waiting requests in their order; see LeaderStore."""
        rows = self._ask("requests", sources=list(sources), limit=limit, most=most_bytes)
        return [_request(row) for row in rows]

    def accept(self, term: int, source: int, rendered: Sequence[tuple[int, Delivery]]) -> int:
        """Take requests and record their deliveries; see LeaderStore."""
        ids = [id for id, _ in rendered]
        deliveries = [delivery for _, delivery in rendered]
        rows = self._write(
            "accept",
            term,
            payload=sum(len(d.envelope) for d in deliveries),
            source=source,
            id=ids,
            token=[d.token for d in deliveries],
            job_id=[d.job_id for d in deliveries],
            queue=[d.queue for d in deliveries],
            task=[d.task for d in deliveries],
            priority=[d.priority for d in deliveries],
            due=[texts.moment(d.due_at) for d in deliveries],
            key=[d.key and texts.key(d.key) for d in deliveries],
            envelope=[self._sealer.seal(d.envelope) for d in deliveries],
        )
        return int(self._led(rows)[0][0])

    def hold_request(self, term: int, request: int, error: str) -> None:
        """Keep a request that cannot be rendered; see LeaderStore."""
        self._led(self._write("hold_request", term, id=request, error=error))

    def due_schedules(self, *, limit: int) -> Sequence[ScheduleRow]:
        """Return schedules to fire or to plan; see LeaderStore."""
        rows = self._ask("due_schedules", namespace=self._namespace, limit=limit)
        return [ScheduleRow(*row) for row in rows]

    def fire(self, term: int, schedule: ScheduleRow, plan: Plan) -> int:
        """Fire the slots of a plan; see LeaderStore."""
        rows = self._write(
            "fire",
            term,
            schedule=schedule.name,
            version=schedule.version,
            planned=schedule.next_at,
            slots=list(plan.slots),
            next=plan.next_at,
            fire=plan.fire_at,
            skipped=plan.skipped,
        )
        return int(self._led(rows)[0][0])

    def fail_schedule(self, term: int, schedule: ScheduleRow, error: str) -> None:
        """Store why a schedule cannot be planned; see LeaderStore."""
        rows = self._write(
            "fail_schedule",
            term,
            schedule=schedule.name,
            version=schedule.version,
            error=error,
        )
        self._led(rows)

    def forget_slots(self) -> None:
        """Delete old slots; see LeaderStore."""
        self._ask("forget_slots")

    def rotate(self, *, retention: float, keep_envelopes: bool = False) -> int:
        """Create the coming partitions of history and drop the old ones; see LeaderStore."""
        values = {
            "namespace": self._namespace,
            "holder": self._holder,
            "retention": retention,
            "keep_envelopes": keep_envelopes,
        }
        self._db.execute(self._sql["retain"], values)
        ends = time.monotonic() + _ROTATING
        done: list[str] = []
        while len(done) < _STEPS and time.monotonic() < ends:
            step = self._db.execute(self._sql["rotate"], values, timeout=30.0)[0][0]
            if step is None:
                break
            if step == "busy":
                log_event("rotation_waits", done=len(done))
                break
            done.append(step)
        self._db.execute(self._sql["forget_locks"])
        for name in ("forget_keys", "forget_effects", "forget_recoveries"):
            for _ in range(_STEPS):
                if time.monotonic() >= ends or not self._ask(name, retention=retention)[0][0]:
                    break
        return done.count("dropped")

    def count_up(self, term: int, *, seconds: float) -> None:
        """Count what is owed, and what ended in the last seconds; see LeaderStore."""
        of = {"namespace": self._namespace}
        owed: dict[int, list[list[Any]]] = {}
        for source, *row in self._db.execute(self._sql["count_owed"], of, timeout=_COUNTING):
            owed.setdefault(source, []).append(row)
        self._led(
            self._write(
                "store_counts",
                term,
                source=list(owed),
                counts=[texts.json_text(rows) for rows in owed.values()],
            )
        )
        ended = self._db.execute(
            self._sql["count_ended"], {**of, "seconds": seconds}, timeout=_COUNTING
        )
        self._led(
            self._write(
                "store_activity",
                term,
                minute=[minute for *_, minute, _ in ended],
                source=[source for source, *_ in ended],
                queue=[texts.key(queue) for _, queue, *_ in ended],
                what=[outcome for _, _, outcome, *_ in ended],
                count=[count for *_, count in ended],
            )
        )

    def vacuum(self, least: int = 10_000) -> Sequence[str]:
        """Vacuum the small tables that need it; see LeaderStore."""
        tables = [str(row[0]) for row in self._ask("dead_rows", least=least)]
        for table in tables:
            self._db.execute(f"vacuum (truncate off) jobguard.{table}", timeout=30.0, alone=True)
        return tables

    def close(self) -> None:
        """Close the connection."""
        self._db.close()


def with_patience(settings: Settings) -> Settings:
    """Return these settings with the time limits of a leader."""
    return replace(
        settings,
        connect_timeout=max(2.0, settings.connect_timeout),
        call_timeout=min(_CALL_TIMEOUT, settings.lease / 2),
    )


def _request(row: Row) -> Request:
    args, kwargs = row[5:7]
    try:
        call, problem = (json.loads(args), json.loads(kwargs)), ""
    except (ValueError, RecursionError) as error:
        call, problem = ([], {}), f"its arguments cannot be read: {error}"
    return Request(*(*row[:5], *call, *row[7:], problem))


def _owed(row: Row) -> Owed:
    (
        token, job_id, queue, task, age, due_in, expired, crashes, recoveries, claims, backoff,
        number, worker, live, announced, cause, suspected_for, mark, unsent,
    ) = row  # fmt: skip
    return Owed(
        token=token,
        job_id=job_id,
        queue=queue,
        task=task,
        age=age,
        due_in=due_in,
        expired=expired,
        crashes=crashes,
        recoveries=recoveries,
        claims=claims,
        backoff=backoff,
        claim_number=number,
        claim_worker=worker,
        claim_live=live,
        claim_announced=announced,
        suspected=None if cause is None else Cause(cause),
        suspected_for=suspected_for,
        suspected_mark=mark,
        unsent=unsent,
    )
