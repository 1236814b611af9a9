"""What people do to jobs: cancel, requeue, purge, forget, replay. Each act is noted: who, when and what.

The ledger is changed first, then Redis: a delivery with a tombstone is skipped by every guarded worker
and never restored, whether or not Redis could be asked to delete it.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any
from uuid import UUID

import redis
import sqlalchemy as sa

from jobguard.errors import JobguardError
from jobguard.model import Outcome, Owed, new_token
from jobguard.operations.brokers import Brokers, NoRedis
from jobguard.operations.read import OWED_STATES, JobFilter, ReadModel, Row
from jobguard.reconciler.backfill import Backfill, BackfillCounts
from jobguard.redact import redact
from jobguard.scripts import chunks
from jobguard.settings import Settings
from jobguard.store import ledger as people
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore

_AT_ONCE = 500
"""Deliveries that one transaction changes: hosts wait for its row locks."""
WAITING = tuple(state for state in OWED_STATES if state != "processing")
"""The states that a bulk cancel ends if no state is given: no worker runs these."""

_NOTE = sa.text("""
insert into jobguard.actions (namespace, actor, action, detail, jobs)
values (:namespace, :actor, :action, :detail, :jobs) returning id
""")
_NOTED = sa.text("update jobguard.actions set jobs = :jobs where id = :id")

_CANCEL_JOB = sa.text("select jobguard.cancel_job(:job_id, :namespace)")
_CANCEL = sa.text("""
select jobguard.cancel(:source, cast(:tokens as uuid[]), '{}', null, null, null, '{}')
""")

_REQUEST_AGAIN = sa.text("""
update jobguard.requests r set error = null
from jobguard.sources s
where s.id = r.source and s.namespace = :namespace and r.job_id = :job_id and r.error is not null
""")

_ERASE = sa.text("""
with ended as (
  update jobguard.history h set envelope = null, errors = null
  from jobguard.sources s
  where s.namespace = :namespace and h.source + 0 = s.id and h.job_id = :job_id
    and (h.envelope is not null or h.errors is not null)
  returning h.token
), parts as (
  update jobguard.join_parts p set envelope = '', state = ''
  from jobguard.sources s
  where s.namespace = :namespace and p.source = s.id and p.job_id = :job_id
    and (p.envelope <> '' or p.state <> '')
    and exists (select from jobguard.joins x where x.source = p.source and x.id = p.join_id
                and x.closed_at is not null)
  returning p.token
)
select (select count(*) from ended) + (select count(*) from parts)
""")
_OPEN_PARTS = sa.text("""
select count(*) from jobguard.join_parts p join jobguard.sources s on s.id = p.source
where s.namespace = :namespace and p.job_id = :job_id and (p.envelope <> '' or p.state <> '')
""")

_QUEUES_OF = sa.text("""
select coalesce(q.name, q.queue) from jobguard.queues q where q.source = :source
union select c.counts ->> 0 from jobguard.owed_counts o, jsonb_array_elements(o.counts) c(counts)
where o.source = :source
union select unnest(w.queues) from jobguard.workers w where w.source = :source
union select queue from (select j.queue from jobguard.jobs j where j.source + 0 = :source
                         order by j.token desc limit 5000) newest
""")

_PURGE_DEAD = sa.text("""
update jobguard.history h set outcome = 'cancelled', envelope = null
from jobguard.sources s
where s.namespace = :namespace and h.source = s.id and h.token = any (cast(:tokens as uuid[]))
  and h.outcome in ('failed', 'dead') and h.next is null
""")

# A job of which a later delivery is owed or has ended was sent again already.
_ENDED_IN = sa.text("""
select h.token, h.job_id, h.queue, h.task, h.outcome::text as state, h.ended_at,
       h.envelope is not null as kept
from jobguard.history h
join jobguard.sources s on s.id = h.source
where s.namespace = :namespace and h.ended_at >= :since and h.ended_at < :until
  and (h.ended_at, h.token) > (:at, :after)
  and h.outcome::text = any (:outcomes) and h.next is null
  and (cast(:queue as text) is null or h.queue = :queue)
  and (cast(:task as text) is null or h.task = :task)
  and not exists (select from jobguard.jobs j where j.source + 0 = h.source and j.job_id = h.job_id)
  and not exists (select from jobguard.history l
                  where l.source + 0 = h.source and l.job_id = h.job_id and l.token > h.token)
order by h.ended_at, h.token limit :limit
""")


class Operations(ReadModel):
    """The read model, and what people do. ``actor``: who acts, for the notes."""

    actor: str = ""

    # -- notes ---------------------------------------------------------------------------------

    def note(self, namespace: str, action: str, detail: str, jobs: int = 0) -> int:
        """Record an action of a person before it is done; return the number of the note."""
        with self._begin() as connection:
            values = {
                "namespace": namespace,
                "actor": self.actor or actor(),
                "action": action,
                "detail": detail[:1000],
                "jobs": jobs,
            }
            return int(connection.execute(_NOTE, values).scalar_one())

    def noted(self, note: int, jobs: int) -> None:
        """Complete a note with the number of jobs that were changed."""
        with self._begin() as connection:
            connection.execute(_NOTED, {"id": note, "jobs": jobs})

    # -- the brake -----------------------------------------------------------------------------

    def pause(self, namespace: str, *, queue: str | None, force: bool = False) -> None:
        """Note it, and stop all restores, in the namespace or in one queue; see Ledger.

        Raises JobguardError for a queue that no job and no worker names, which often is a typing error,
        unless ``force``.
        """
        if queue is not None and not force:
            self._require_queue(namespace, queue)
        self.note(namespace, "pause", "" if queue is None else f"queue {queue}")
        super().pause(namespace, queue=queue)

    def resume(self, namespace: str, *, queue: str | None, moved: bool) -> None:
        """Note it, and allow restores again; see Ledger. Raises JobguardError as ``pause`` does."""
        if queue is not None:
            self._require_queue(namespace, queue)
        what = "--moved" if moved else "" if queue is None else f"queue {queue}"
        self.note(namespace, "resume", what)
        super().resume(namespace, queue=queue, moved=moved)

    def _require_queue(self, namespace: str, queue: str) -> None:
        overview = self.overview(namespace)
        known = {row["queue"] for row in overview["queues"]}
        known.update(key.partition("/")[2] for key in overview["brake"]["held"])
        if queue in known:
            return
        known.update(name for _, name in self.stats(namespace))
        if queue not in known:
            raise JobguardError(
                f"no queue {queue!r} is known in the namespace {namespace!r}; known: "
                f"{', '.join(sorted(known)) or 'none'}"
            )

    # -- cancel --------------------------------------------------------------------------------

    def owed_of(self, namespace: str, wanted: JobFilter, *, limit: int | None = None) -> list[Row]:
        """Return the owed deliveries that fit, at most ``limit``: what a cancel would end."""
        rows = self.each_job(namespace, wanted)
        return list(islice((row for row in rows if row["state"] in OWED_STATES), limit))

    def owed_named(self, namespace: str, job_id: str) -> list[Row]:
        """Return the owed deliveries of one job id, and what was requested of it, with no token."""
        found = [row for row in self.job(namespace, job_id) if row["ended_at"] is None]
        requested = [{**row, "runs": False} for row in found if row["token"] is None]
        tokens = [row["token"] for row in found if row["token"] is not None]
        owed = [{**row, "state": _state(row)} for row in self.standing(namespace, tokens)]
        return requested + owed

    def cancel(
        self, namespace: str, rows: Sequence[Row], brokers: Brokers | None, detail: str
    ) -> tuple[int, list[str]]:
        """End these owed deliveries; return how many were ended, and the problems with Redis.

        A job that a worker runs is not stopped: its end comes late. With a problem, guarded workers skip
        what Redis still has.
        """
        note = self.note(namespace, "cancel", detail)
        sources = self._by_id(namespace)
        problems: set[str] = set()
        done = 0
        requested = {row["job_id"] for row in rows if row["token"] is None}
        try:
            for job_id in sorted(requested):
                with self._begin() as connection:
                    values = {"namespace": namespace, "job_id": job_id}
                    done += connection.execute(_CANCEL_JOB, values).scalar_one()
            for source, few in _by_source([row for row in rows if row["job_id"] not in requested]):
                done += self._cancel(source, few)
                problems |= _discard(sources[source], few, brokers)
        finally:
            self.noted(note, done)
        return done, sorted(problems)

    def _cancel(self, source: int, rows: Sequence[Row]) -> int:
        tokens = [row["token"] for row in rows]
        with self._begin() as connection:
            return int(
                connection.execute(_CANCEL, {"source": source, "tokens": tokens}).scalar_one()
            )

    def _by_id(self, namespace: str) -> dict[int, Row]:
        return {row["id"]: row for row in self.sources(namespace)}

    # -- given up, forgotten -------------------------------------------------------------------

    def purge_dead(self, namespace: str, rows: Sequence[Row], detail: str) -> int:
        """Count these given-up jobs as cancelled, and drop their envelopes. Return how many there were."""
        note = self.note(namespace, "dead purge", detail)
        done = 0
        try:
            for few in chunks(rows, _AT_ONCE):
                tokens = [row["token"] for row in few]
                with self._begin() as connection:
                    values = {"namespace": namespace, "tokens": tokens}
                    done += connection.execute(_PURGE_DEAD, values).rowcount
        finally:
            self.noted(note, done)
        return done

    def forget(self, namespace: str, job_id: str, brokers: Brokers | None) -> tuple[int, list[str]]:
        """Erase the arguments, errors and envelopes of a job, here and in Redis.

        Return the number of its deliveries, and what is still there. What is owed or requested is
        cancelled. Its id, queue, task and times stay: without the tombstone it could run again. Raises
        JobguardError for an unknown job and for one that a worker runs.
        """
        rows = self.job(namespace, job_id)
        if not rows:
            raise JobguardError(f"no job {job_id} is known in the namespace {namespace!r}")
        if any(row["runs"] for row in self.owed_named(namespace, job_id)):
            raise JobguardError(
                f"job {job_id} runs: its worker is alive; forget it when it has ended"
            )
        note = self.note(namespace, "forget", job_id)
        values = {"namespace": namespace, "job_id": job_id}
        with self._begin() as connection:
            connection.execute(_CANCEL_JOB, values)
            connection.execute(_ERASE, values)
            waits = connection.execute(_OPEN_PARTS, values).scalar_one()
        sources, found = self._by_id(namespace), set[str]()
        sent = [row for row in rows if row["token"] is not None]  # the others were only requested
        for source, few in _by_source(sent):
            found |= _discard(sources[source], few, brokers, erase=True)
        problems = sorted(found)
        if brokers is None:
            problems.append("Redis was not asked")
        if waits:
            problems.append(
                "its result waits in an unfinished group or chord; forget it again later"
            )
        self.noted(note, len(rows))
        return len(rows), problems

    # -- replay --------------------------------------------------------------------------------

    def ended_in(
        self,
        namespace: str,
        since: datetime,
        until: datetime,
        *,
        outcomes: Sequence[Outcome],
        queue: str | None = None,
        task: str | None = None,
    ) -> Iterator[Row]:
        """Yield the jobs that ended in a window and were not sent again since, oldest first."""
        at, after = since, UUID(int=0)
        while True:
            with self._begin(snapshot=True) as connection:
                rows = people.rows(
                    connection,
                    _ENDED_IN,
                    namespace=namespace,
                    since=since,
                    until=until,
                    at=at,
                    after=after,
                    outcomes=[outcome.value for outcome in outcomes],
                    queue=queue,
                    task=task,
                    limit=_AT_ONCE,
                )
            yield from rows
            if len(rows) < _AT_ONCE:
                return
            at, after = rows[-1]["ended_at"], rows[-1]["token"]

    def send_one(
        self,
        namespace: str,
        row: Row,
        *,
        outcomes: Sequence[Outcome] = (Outcome.FAILED, Outcome.DEAD),
    ) -> UUID | None:
        """Requeue the delivery of a row; one that was only requested and is held is tried again.

        Return the token of the new delivery; None: the leader makes it. Raises NotSent.
        """
        if row["token"] is not None:
            return self.requeue(namespace, row["token"], outcomes=outcomes)
        with self._begin() as connection:
            values = {"namespace": namespace, "job_id": row["job_id"]}
            if connection.execute(_REQUEST_AGAIN, values).rowcount == 0:
                raise NotSent(
                    f"job {row['job_id']} is requested: the reconciler that leads sends it"
                )
        return None

    def send_again(
        self,
        namespace: str,
        rows: Iterable[Row],
        action: str,
        detail: str,
        *,
        outcomes: Sequence[Outcome],
        pace: Callable[[], None] = lambda: None,
    ) -> tuple[int, list[str]]:
        """Send these jobs again, as new deliveries that the leader pushes; return count and problems.

        ``action``: as the note names it. ``outcomes``: the ends after which a job is sent again.
        ``pace`` is called before each one. A call that was interrupted can be repeated: what it sent is
        not sent twice. Raises StoreUnavailable.
        """
        note = self.note(namespace, action, detail)
        done = 0
        problems: list[str] = []
        try:
            for row in rows:
                pace()
                try:
                    self.send_one(namespace, row, outcomes=outcomes)
                except NotSent as error:
                    problems.append(str(error))
                else:
                    done += 1
        finally:
            self.noted(note, done)
        return done, problems

    # -- drift ---------------------------------------------------------------------------------

    def adopt(
        self,
        namespace: str,
        brokers: Brokers,
        settings: Settings,
        *,
        queues: Sequence[str] = (),
        dry: bool = False,
    ) -> list[Row]:
        """Record what waits in Redis and is not in the ledger; ``dry``: only count it.

        Return for each source: address, waiting, recorded (``dry``: that would be recorded), unreadable,
        and ``problem``, the reason why its Redis could not be read. ``queues``: also these, which no job
        and no worker has named yet.
        """
        note = None if dry else self.note(namespace, "adopt", ", ".join(queues))
        leader = PostgresLeaderStore(self._conninfo, namespace, new_token(), settings)
        host = PostgresStore(self._conninfo, settings)
        found: list[Row] = []
        try:
            for source in leader.sources():
                counts = BackfillCounts()
                row = {"address": source.address, "library": source.library, "problem": None}
                place = {"id": source.id, "prefix": source.prefix, "name": source.name} | row
                try:
                    broker = brokers.of(place)
                    names = self._queues_of(source.id) | set(queues) | set(broker.consumers())
                    walk = Backfill(broker, leader, host, source, names, page=_AT_ONCE, dry=dry)
                    while not walk.finished:
                        walk.step()
                        counts = walk.counts
                except NoRedis as error:
                    row["problem"] = str(error)
                except redis.RedisError as error:
                    row["problem"] = f"Redis at {source.address}: {redact(str(error))}"
                found.append(
                    {
                        **row,
                        "waiting": counts.waiting,
                        "recorded": counts.recorded + counts.unmarked,
                        "unreadable": counts.unreadable,
                    }
                )
        finally:
            leader.close()
            host.close()
            if note is not None:
                self.noted(note, sum(row["recorded"] for row in found))
        return found

    def _queues_of(self, source: int) -> set[str]:
        with self._begin(snapshot=True) as connection:
            return set(connection.execute(_QUEUES_OF, {"source": source}).scalars())

    def drift(self, namespace: str, brokers: Brokers, settings: Settings) -> Drift:
        """Compare the ledger with Redis, in both directions, and change nothing. Raises NoRedis."""
        found = Drift()
        for one in self.adopt(namespace, brokers, settings, dry=True):
            if one["problem"]:
                raise NoRedis(one["problem"])
            for count, what in (
                (one["recorded"], "waits in Redis; not in PostgreSQL: `jobguard adopt`"),
                (one["unreadable"], "waits in Redis; its data cannot be read"),
            ):
                if count:
                    found.unrecorded[one["address"], what] += count
        for rows in self._owed_pages(namespace):
            for source in {row["source"] for row in rows}:
                here = [row for row in rows if row["source"] == source]
                seen = brokers.presence(here)
                for row in here:
                    presence = (
                        seen[row["token"]].presence.value if row["token"] in seen else "unknown"
                    )
                    found.add(row, presence)
        return found

    def _owed_pages(self, namespace: str) -> Iterator[list[Row]]:
        after = None
        wanted = JobFilter(OWED_STATES)
        while True:
            page = self.list_jobs(namespace, wanted, limit=_AT_ONCE, after=after)
            if page.rows:
                yield self.standing(namespace, [row["token"] for row in page.rows])
            if page.after is None:
                return
            after = page.after


REPLAYED = (Outcome.COMPLETED, Outcome.FAILED, Outcome.DEAD)
"""Outcomes of jobs that can be replayed."""
NotSent = people.NotRequeued


@dataclass(slots=True)
class Drift:
    """Where the owed deliveries are in Redis."""

    places: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By address, queue and presence."""
    unrecorded: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By address and kind: what Redis has and the ledger does not owe."""
    absent: list[Row] = field(default_factory=list)
    """Owed, and in no place where a worker would find it, oldest last; at most 1,000."""

    def add(self, row: Row, presence: str) -> None:
        """Count one owed delivery."""
        self.places[row["address"], row["queue"], presence] += 1
        lost = presence == "absent" and row["claim_number"] is None and not row["in_outbox"]
        if lost and len(self.absent) < 1000:
            self.absent.append(row)

    @property
    def differs(self) -> bool:
        """True if the ledger and Redis do not agree."""
        return bool(self.absent or self.unrecorded)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {
            "owed": [
                {"source": address, "queue": queue, "redis": place, "jobs": count}
                for (address, queue, place), count in sorted(self.places.items())
            ],
            "unrecorded": [
                {"source": address, "what": what, "jobs": count}
                for (address, what), count in sorted(self.unrecorded.items())
            ],
            "absent": self.absent,
        }


def actor() -> str:
    """Return who runs this program: the login name and the host."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def _by_source(rows: Sequence[Row]) -> Iterator[tuple[int, Sequence[Row]]]:
    for source in sorted({row["source"] for row in rows}):
        for few in chunks([row for row in rows if row["source"] == source], _AT_ONCE):
            yield source, few


def _discard(
    source: Row, rows: Sequence[Row], brokers: Brokers | None, *, erase: bool = False
) -> set[str]:
    """Delete ended deliveries of one source from Redis; return the problems."""
    try:
        if brokers is not None:
            brokers.of(source).discard([_owed(row) for row in rows], erase=erase)
    except NoRedis as error:
        return {str(error)}
    except redis.RedisError as error:
        return {f"Redis at {source['address']}: {redact(str(error))}"}
    return set()


def _state(row: Row) -> str:
    if row["claim_number"] is not None:
        return "processing"
    return "scheduled" if row["due_in"] > 0 else "pending"


def _owed(row: Row) -> Owed:
    return Owed(
        token=row["token"],
        job_id=row["job_id"],
        queue=row["queue"],
        task=row["task"],
        age=0.0,
        due_in=0.0,
        expired=False,
        crashes=0,
        recoveries=0,
        claims=0,
        backoff=0.0,
    )
