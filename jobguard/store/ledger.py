"""The ledger as people read and control it: stats, dead jobs, the brake.

It uses SQLAlchemy, which is never in the path of a job: each call reads one snapshot or writes one
transaction.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeAlias, TypeVar, cast
from uuid import UUID

import psycopg
import sqlalchemy as sa
from psycopg.abc import Buffer
from psycopg.types.datetime import TimestamptzLoader

from jobguard.conninfo import describe
from jobguard.envelopes import renewed
from jobguard.errors import (
    ConfigurationError,
    JobguardError,
    NoRights,
    NotMigrated,
    StoreUnavailable,
    WrongInstallation,
)
from jobguard.log import log_event
from jobguard.model import Outcome, new_token
from jobguard.postgres_hosts import writable
from jobguard.pulse import ACCEPTED
from jobguard.schema import GRANT_A_ROLE, accept_move
from jobguard.sealing import Encrypt, Sealer
from jobguard.store import texts
from jobguard.store.connection import NO_RIGHTS, NOT_MIGRATED
from jobguard.store.protocols import Counts

Row: TypeAlias = dict[str, Any]
T = TypeVar("T")

_EARLIEST, _LATEST = datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
"""Shown for a time that Python cannot have. Both are times in every zone."""

# The counts of history. A failed or dead delivery that was requeued counts only as its new
# delivery.
_STATS = sa.text("""
select s.id, j.queue, 'owed' as state,
       count(*) filter (where r.token is null and coalesce(j.due_at <= now(), true)) as pending,
       count(*) filter (where r.token is null and j.due_at > now()) as scheduled,
       count(*) filter (where r.token is not null) as processing,
       count(*) filter (where u.token is not null
                           or (r.token is not null
                               and (w.id is null or w.dead_at is not null or w.left_at is not null))
                       ) as stuck
from jobguard.sources s
join jobguard.jobs j on j.source = s.id
left join jobguard.running r on r.source = j.source and r.token = j.token
left join jobguard.workers w on w.id = r.worker
left join jobguard.suspects u on u.source = j.source and u.token = j.token
where s.namespace = :namespace and (cast(:source as bigint) is null or s.id = :source)
group by 1, 2
union all
select s.id, h.queue, h.outcome::text, count(*), 0, 0, 0
from jobguard.sources s
join jobguard.history h on h.source = s.id
where s.namespace = :namespace and (cast(:source as bigint) is null or s.id = :source)
  and h.outcome <> 'superseded'
  and (h.outcome in ('completed', 'cancelled') or h.next is null)
group by 1, 2, 3
""")

_JOB = sa.text("""
select * from (
  select j.source, j.token, j.job_id, j.queue, j.task, s.library, s.address,
         case when r.token is not null then 'processing'
              when j.due_at > now() then 'scheduled' else 'pending' end as state,
         u.cause::text as suspected, j.attempt, j.recoveries, j.crashes, j.recorded_at, j.due_at,
         r.claimed_at, r.heartbeat_at, r.progress, r.attrs, null::timestamptz as ended_at,
         r.worker, w.name as worker_name, null::uuid as next, null::text[] as errors,
         true as kept
  from jobguard.sources s
  join jobguard.jobs j on j.source + 0 = s.id
  left join jobguard.running r on r.source = j.source and r.token = j.token
  left join jobguard.workers w on w.id = r.worker
  left join jobguard.suspects u on u.source = j.source and u.token = j.token
  where s.namespace = :namespace and j.job_id = :job_id
  union all
  select s.id, null, q.job_id, q.queue, q.task, s.library, s.address,
         case when q.error is null then 'requested' else 'held' end,
         null, 1, 0, 0, q.requested_at, q.due_at, null, null, null, null, null,
         null, null, null, case when q.error is not null then array[q.error] end, false
  from jobguard.sources s
  join jobguard.requests q on q.source = s.id
  where s.namespace = :namespace and q.job_id = :job_id
  union all
  select h.source, h.token, h.job_id, h.queue, h.task, s.library, s.address, h.outcome::text,
         null, h.attempt, h.recoveries, h.crashes, h.recorded_at, null,
         h.claimed_at, null, null, null, h.ended_at,
         h.worker, w.name, h.next, h.errors,
         jobguard.is_kept(h.source, h.token, h.ended_at)
  from jobguard.sources s
  join jobguard.history h on h.source = s.id
  left join jobguard.workers w on w.id = h.worker
  where s.namespace = :namespace and h.job_id = :job_id
) deliveries
order by token desc, ended_at
""")

# A job is given up if its last outcome is failed or dead: no later delivery of the same id is owed
# or in history. If one delivery has several tombstones, the first one counts.
_DEAD = sa.text("""
select h.source, h.token, h.job_id, h.queue, h.task, s.library, s.address,
       h.outcome::text as state, h.attempt, h.recoveries, h.crashes, h.recorded_at, h.claimed_at,
       h.ended_at, h.worker, h.errors, jobguard.is_kept(h.source, h.token, h.ended_at) as kept
from jobguard.sources s
join jobguard.history h on h.source = s.id
where s.namespace = :namespace and h.outcome::text = any (:outcomes)
  and h.outcome in ('failed', 'dead') and h.next is null
  and (cast(:queue as text) is null or h.queue = :queue)
  and not exists (select from jobguard.jobs j where j.source + 0 = h.source and j.job_id = h.job_id)
  and not exists (
    select from jobguard.history l
    where l.source = h.source and l.job_id = h.job_id
      and (l.token > h.token or (l.token = h.token and l.ended_at < h.ended_at)))
order by h.ended_at desc, h.token desc
limit :limit
""")

# What SQL or a schedule asked for, and the leader cannot send.
_HELD_REQUESTS = sa.text("""
select count(*) as count, (array_agg(h.job_id order by h.id))[1] as job_id,
       (array_agg(h.error order by h.id))[1] as error
from (select r.id, r.job_id, r.error from jobguard.requests r
      join jobguard.sources s on s.id = r.source
      where s.namespace = :namespace and r.error is not null order by r.id limit 1000) h
""")
_FAILED_SCHEDULES = sa.text("""
select c.name, c.error from jobguard.schedules c
where c.namespace = :namespace and c.error is not null order by c.name
""")

_ADD_SCHEDULE = sa.text("""
select jobguard.add_schedule(
  name => :name, library => :library, queue => :queue, task => :task, args => cast(:args as jsonb),
  kwargs => cast(:kwargs as jsonb), cron => :cron, every => make_interval(secs => :every),
  rule => cast(:rule as jsonb), timezone => :timezone, starts_at => :starts_at, ends_at => :ends_at,
  jitter => make_interval(secs => :jitter), catch_up => :catch_up, priority => :priority,
  max_attempts => :max_attempts, source => :source, namespace => :namespace, unknown => :unknown)
""")

_MAY_READ_ARGUMENTS = sa.text(
    "select has_column_privilege('jobguard.schedules', 'args', 'select')"
    " and has_column_privilege('jobguard.schedules', 'kwargs', 'select')"
)
_SCHEDULES = """
select c.name, case when c.error is not null then 'failed' when c.paused_at is not null then 'paused'
                    when c.finished then 'finished' else 'active' end as state,
       s.library, coalesce(s.name, s.address) as source, c.queue, c.task, {arguments}, c.cron,
       c.every, c.rule, c.timezone, c.starts_at, c.ends_at, c.jitter, c.catch_up, c.priority,
       c.max_attempts, c.next_at, c.last_at, c.skipped, c.error
from jobguard.schedules c left join jobguard.sources s on s.id = c.source
where c.namespace = :namespace order by c.name
"""
_SCHEDULES_BY_RIGHT = {
    True: sa.text(_SCHEDULES.format(arguments="c.args, c.kwargs")),
    False: sa.text(_SCHEDULES.format(arguments="null as args, null as kwargs")),
}

_CHANGE_SCHEDULE = {
    change: sa.text(f"select jobguard.{change}_schedule(:name, :namespace)")
    for change in ("remove", "pause", "resume", "run")
}

_END_OF = sa.text("""
select exists (select from jobguard.jobs j where j.source + 0 = :source and j.job_id = :job_id)
    or exists (select from jobguard.requests r where r.source + 0 = :source and r.job_id = :job_id)
         as owed,
       (select h.outcome::text from jobguard.history h
        where h.source + 0 = :source and h.job_id = :job_id and h.outcome <> 'superseded'
        order by h.ended_at desc limit 1) as outcome
""")

_TOMBSTONE = sa.text("""
select h.source, h.ended_at, h.job_id, h.queue, h.outcome::text as outcome, h.next,
       h.envelope, s.library,
       (select j.token from jobguard.jobs j
        where j.source + 0 = h.source and j.job_id = h.job_id limit 1) as owed
from jobguard.sources s
join jobguard.history h on h.source = s.id
where s.namespace = :namespace and h.token = :token
order by h.ended_at
limit 1
for update of h
""")

_OWE_AGAIN = sa.text("""
with given_up as (
  update jobguard.history set next = :fresh
  where source = :source and token = :token and ended_at = :ended_at
  returning *
), owed as (
  insert into jobguard.jobs (source, token, job_id, queue, task, attempt, recoveries, envelope)
  select source, :fresh, job_id, queue, task, least(attempt + 1, 32767), recoveries, :envelope
  from given_up
)
insert into jobguard.outbox (source, token, unsent) select source, :fresh, true from given_up
""")

_OWED = sa.text("""
select j.source, j.job_id, coalesce(jobguard.holds(w, r), false) as runs
from jobguard.sources s
join jobguard.jobs j on j.source = s.id
left join jobguard.running r on r.source = j.source and r.token = j.token
left join jobguard.workers w on w.id = r.worker
where s.namespace = :namespace and j.token = :token
for update of j
""")

# The person's command overrides the suspicion: the new delivery was never in Redis, so no unguarded
# worker can have run it. It has a crash budget of its own.
_SUPERSEDE = sa.text("""
with run as (
  delete from jobguard.running where source = :source and token = :token returning *
), old as (
  delete from jobguard.jobs where source = :source and token = :token returning *
), tombstone as (
  insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries, crashes,
                                number, worker, recorded_at, claimed_at, next, errors)
  select o.source, o.token, o.job_id, o.queue, o.task, 'superseded', o.attempt, o.recoveries, o.crashes,
         r.number, r.worker, o.recorded_at, r.claimed_at, :fresh, array['requeued by a person']
  from old o left join run r on true
), unsuspected as (
  delete from jobguard.suspects where source = :source and token = :token
), unboxed as (
  delete from jobguard.outbox where source = :source and token = :token
), owed as (
  insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, recoveries, due_at,
                             expires_at, key, trace, recover, envelope)
  select source, :fresh, job_id, queue, task, priority, attempt, recoveries, due_at, expires_at, key, trace,
         recover, envelope
  from old
)
insert into jobguard.outbox (source, token, unsent) select source, :fresh, true from old
""")

_ABSENT = sa.text("""
select j.token, j.job_id, j.queue, j.task, s.address, x.cause::text as cause, x.seen_at
from jobguard.sources s
join jobguard.suspects x on x.source = s.id
join jobguard.jobs j on j.source = x.source and j.token = x.token
where s.namespace = :namespace and (cast(:queue as text) is null or j.queue = :queue)
order by j.token
""")

# Term 0 means that the namespace has no leader: the row exists for the brake, and its lease is
# over.
_PAUSE = sa.text("""
insert into jobguard.leader as l (namespace, term, holder, host, pid, expires_at, paused_at)
values (:namespace, 0, '00000000-0000-0000-0000-000000000000', '', 0, 'epoch', now())
on conflict (namespace) do update set paused_at = coalesce(l.paused_at, excluded.paused_at)
""")

_HOLD = sa.text("""
insert into jobguard.leader as l (namespace, term, holder, host, pid, expires_at, held)
select :namespace, 0, '00000000-0000-0000-0000-000000000000', '', 0, 'epoch',
       jsonb_object_agg(s.id || '/' || :queue,
                        jsonb_build_object('since', now(), 'reason', 'paused by hand'))
from jobguard.sources s where s.namespace = :namespace
having count(*) > 0
on conflict (namespace) do update set held = excluded.held || l.held
""")

# Settings that the queries rely on. They override the defaults of the role and the database, for one
# transaction: behind a pooler the session is another one's, too. psycopg reads no other datestyle.
_RELIED_ON = """
select pg_catalog.set_config('search_path', 'pg_catalog', true),
  pg_catalog.set_config('datestyle', 'ISO', true),
  pg_catalog.set_config('lock_timeout', '0', true),
  pg_catalog.set_config('statement_timeout', '{limit}', true)
"""

_ACCEPT = sa.text("""
    update jobguard.sources set pulse_epoch = null, pulse_n = :accepted, run_id = null
    where namespace = :namespace
""")

_RESUME = sa.text("""
update jobguard.leader set paused_at = null, held = '{}' where namespace = :namespace
""")

_RELEASE = sa.text("""
update jobguard.leader l
set held = l.held - array(select s.id || '/' || :queue from jobguard.sources s
                          where s.namespace = :namespace)
where l.namespace = :namespace
""")

_INSTALLATION = sa.text("""
select id, name, system_identifier, database_oid::text as database_oid,
       (select oid::text from pg_database where datname = current_database()) as database_now
from jobguard.installation
""")

_NAME = sa.text("select name from jobguard.installation")

_SYSTEM = sa.text("select system_identifier::text from pg_control_system()")

_LEADER = sa.text("""
select namespace, term, host, pid, elected_at, expires_at > now() as live,
       greatest(0, extract(epoch from expires_at - now()))::float8 as seconds_left,
       paused_at, held
from jobguard.leader where namespace = :namespace
""")

_SOURCES = sa.text("""
select s.id, s.library, s.address, s.prefix, s.name, s.settings, s.pulse_epoch, s.pulse_n, s.run_id,
       extract(epoch from now() - s.watched_at)::float8 as watched_seconds,
       (select count(*) from jobguard.jobs j where j.source = s.id) as owed,
       (select count(*) from jobguard.outbox o where o.source = s.id) as outbox,
       (select count(*) from jobguard.suspects u where u.source = s.id) as suspects
from jobguard.sources s where s.namespace = :namespace order by s.library, s.address, s.id
""")

_WORKERS = sa.text("""
select count(*) filter (where w.dead_at is null and w.left_at is null) as alive,
       count(*) filter (where w.dead_at is not null) as dead,
       count(*) filter (where w.dead_at is null and w.left_at is not null) as gone,
       extract(epoch from now() - min(w.beat_at)
                 filter (where w.dead_at is null and w.left_at is null))::float8
         as oldest_beat_seconds,
       extract(epoch from now() - min(w.unflushed_since)
                 filter (where w.dead_at is null and w.left_at is null))::float8
         as unflushed_seconds
from jobguard.sources s join jobguard.workers w on w.source = s.id
where s.namespace = :namespace
""")

# Jobs that wait in Redis, as far as the ledger knows, while a live worker of their queue runs
# nothing.
_IDLE = sa.text("""
with waiting as (
  select j.source, j.queue, count(*) as jobs, min(greatest(j.recorded_at, j.due_at)) as since
  from jobguard.sources s
  join jobguard.jobs j on j.source = s.id
  left join jobguard.running r on r.source = j.source and r.token = j.token
  left join jobguard.suspects u on u.source = j.source and u.token = j.token
  left join jobguard.outbox o on o.source = j.source and o.token = j.token
  where s.namespace = :namespace and r.token is null and u.token is null and o.token is null
    and greatest(j.recorded_at, j.due_at) < now() - make_interval(secs => :seconds)
  group by 1, 2
)
select q.source, q.queue, q.jobs, extract(epoch from now() - q.since)::float8 as seconds, q.since,
       o.tokens, o.job_ids, o.tasks, cast(:namespace as text) as namespace,
       array_agg(w.name order by w.name) as workers
from waiting q
cross join lateral (
  select array_agg(token) as tokens, array_agg(job_id) as job_ids, array_agg(task) as tasks
  from (select j.token, j.job_id, j.task from jobguard.jobs j
        where j.source = q.source and j.queue = q.queue
          and not exists (select from jobguard.running r
                          where r.source = j.source and r.token = j.token)
        order by j.token limit 20) oldest) o
join jobguard.workers w on w.source = q.source and q.queue = any (w.queues)
where w.dead_at is null and w.left_at is null and cardinality(w.claims) = 0
  and w.started_at < now() - make_interval(secs => :seconds)
group by 1, 2, 3, 4, 5, 6, 7, 8 order by 1, 2
""")

_INCIDENTS = sa.text("""
select i.id, s.library, s.address, i.cause, i.detail, i.opened_at, i.missing, i.restored
from jobguard.sources s join jobguard.incidents i on i.source = s.id
where s.namespace = :namespace and i.closed_at is null order by i.id
""")

_QUEUES = sa.text("""
select s.id as source, s.library, s.address, coalesce(q.name, q.queue) as queue, q.trusted_since,
       q.clean_since,
       q.unguarded, q.unguarded_at
from jobguard.sources s join jobguard.queues q on q.source = s.id
where s.namespace = :namespace order by s.address, q.queue
""")


_KEPT = 4
"""Connections of a program that makes many calls."""


class NotRequeued(JobguardError):
    """A delivery was not sent again; the text says why, and the others are not concerned."""


class PostgresLedger:
    """The ledger in PostgreSQL; see Ledger. Every method may raise StoreUnavailable or a subclass."""

    def __init__(
        self,
        conninfo: Callable[[], str],
        *,
        connect_timeout: float = 5.0,
        answer_timeout: float = 300.0,
        keep: bool = False,
        encrypt: Encrypt = None,
    ) -> None:
        self._conninfo = conninfo
        self._sealer = Sealer(encrypt)
        self._timeout = connect_timeout
        self._answer_timeout = answer_timeout
        # The creator is a callable, because passwords rotate. Only a program that makes many calls
        # keeps connections, and closes this.
        pool: dict[str, Any] = {"poolclass": sa.NullPool}
        if keep:
            pool = {
                "pool_size": _KEPT,
                "max_overflow": 0,
                "pool_timeout": connect_timeout,
                "pool_pre_ping": True,
                "pool_recycle": 300,
            }
        self._engine = sa.create_engine("postgresql+psycopg://", creator=self._connect, **pool)
        self._relied_on = _RELIED_ON.format(limit=round(1000 * answer_timeout))

    def stats(
        self, namespace: str, *, source: int | None = None
    ) -> Mapping[tuple[str, str], Counts]:
        """Return the number of jobs by (label of the source, queue); see Ledger."""
        found: dict[tuple[str, str], dict[str, int]] = {}
        with self._begin(snapshot=True) as connection:
            names = labels(rows(connection, _SOURCES, namespace=namespace))
            for id, queue, state, *counts in connection.execute(
                _STATS, {"namespace": namespace, "source": source}
            ):
                known = found.setdefault((names[id], queue), {})
                if state == "owed":
                    states = ("pending", "scheduled", "processing", "stuck")
                    known.update(zip(states, counts, strict=True))
                else:
                    known[state] = counts[0]
        return {key: Counts(**found[key]) for key in sorted(found)}

    def job(self, namespace: str, job_id: str) -> Sequence[Row]:
        """Return every delivery of this job id, newest first; see Ledger."""
        with self._begin(snapshot=True) as connection:
            return self._unsealed(rows(connection, _JOB, namespace=namespace, job_id=job_id))

    def dead(
        self, namespace: str, *, outcomes: Sequence[Outcome], queue: str | None, limit: int
    ) -> Sequence[Row]:
        """Return jobs that were given up and not requeued since, newest first; see Ledger."""
        with self._begin(snapshot=True) as connection:
            found = rows(
                connection,
                _DEAD,
                namespace=namespace,
                outcomes=[outcome.value for outcome in outcomes],
                queue=queue,
                limit=limit,
            )
            return self._unsealed(found)

    def _unsealed(self, found: list[Row]) -> list[Row]:
        """Return the rows with errors that can be read."""
        for row in found:
            if row["errors"]:
                row["errors"] = [
                    error and self._sealer.unseal_text(error) for error in row["errors"]
                ]
        return found

    def requeue(
        self,
        namespace: str,
        token: UUID,
        *,
        outcomes: Sequence[Outcome] = (Outcome.FAILED, Outcome.DEAD),
    ) -> UUID:
        """Create a new delivery of a failed, dead or owed one; see Ledger.

        ``outcomes``: the ends after which a delivery is sent again.
        """
        with self._begin() as connection:
            # The row is locked: if two people requeue the same delivery, the second one gets an
            # error.
            row = connection.execute(_TOMBSTONE, {"namespace": namespace, "token": token}).first()
            if row is None:
                return _supersede(connection, namespace, token)
            if row.outcome not in outcomes:
                raise NotRequeued(
                    f"job {row.job_id} is {row.outcome}: only failed and dead jobs are requeued"
                )
            if row.next is not None:
                raise NotRequeued(f"job {row.job_id} was requeued already, as {row.next}")
            if row.owed is not None:
                raise NotRequeued(f"job {row.job_id} is owed again already, as {row.owed}")
            if row.envelope is None:
                raise NotRequeued(
                    f"job {row.job_id} cannot be requeued: its envelope was never recorded"
                )
            fresh = new_token(after=token)
            try:
                stored = self._sealer.unseal(bytes(row.envelope))
                envelope = self._sealer.seal(renewed(row.library, stored, fresh))
            except JobguardError as error:
                raise NotRequeued(f"job {row.job_id} cannot be requeued: {error}") from error
            connection.execute(
                _OWE_AGAIN,
                {
                    "source": row.source,
                    "token": token,
                    "ended_at": row.ended_at,
                    "fresh": fresh,
                    "envelope": envelope,
                },
            )
            return fresh

    def add_schedule(self, namespace: str, definition: Mapping[str, Any]) -> bool:
        """Add a schedule, or change the one of its name; return whether anything changed; see Ledger."""
        usual = {
            **dict.fromkeys(("cron", "every", "rule", "starts_at", "ends_at", "source", "library")),
            **{"args": [], "kwargs": {}, "timezone": "UTC", "jitter": 0.0, "catch_up": "one"},
            **{"priority": 0, "max_attempts": None, "unknown": "warn", "namespace": namespace},
        }
        values = usual | dict(definition)
        for name in ("args", "kwargs", "rule"):
            values[name] = None if values[name] is None else json.dumps(values[name])
        with self._begin() as connection:
            return bool(connection.execute(_ADD_SCHEDULE, values).scalar())

    def schedules(self, namespace: str) -> Sequence[Row]:
        """Return the schedules by name; see Ledger."""
        with self._begin(snapshot=True) as connection:
            readable = bool(connection.execute(_MAY_READ_ARGUMENTS).scalar())
            return rows(connection, _SCHEDULES_BY_RIGHT[readable], namespace=namespace)

    def change_schedule(self, namespace: str, name: str, change: str) -> str | None:
        """Remove, pause, resume or run a schedule; see Ledger."""
        with self._begin() as connection:
            values = {"namespace": namespace, "name": name}
            answer = connection.execute(_CHANGE_SCHEDULE[change], values).scalar()
        return str(answer) if change == "run" else None

    def end_of(self, source: int, job_id: str) -> Outcome | None:
        """Return the last outcome of a job that is not owed any more; see Ledger."""
        with self._begin(snapshot=True) as connection:
            row = connection.execute(_END_OF, {"source": source, "job_id": job_id}).one()
        return None if row.owed or row.outcome is None else Outcome(row.outcome)

    def absent(self, namespace: str, *, queue: str | None) -> Sequence[Row]:
        """Return owed deliveries that a leader saw absent from Redis; see Ledger."""
        with self._begin(snapshot=True) as connection:
            return rows(connection, _ABSENT, namespace=namespace, queue=queue)

    def pause(self, namespace: str, *, queue: str | None) -> None:
        """Stop all restores until they are resumed; see Ledger.

        Raise JobguardError if a queue is named and no source is known yet.
        """
        with self._begin() as connection:
            if queue is None:
                connection.execute(_PAUSE, {"namespace": namespace})
                return
            changed = connection.execute(_HOLD, {"namespace": namespace, "queue": queue})
            if changed.rowcount == 0:
                raise JobguardError(
                    f"no source is known in the namespace {namespace!r}, so there is no queue "
                    f"{queue!r} to pause"
                )

    def resume(self, namespace: str, *, queue: str | None, moved: bool) -> None:
        """Allow restores again; see Ledger.

        Without a queue, this also ends the holds that jobguard made by itself.
        """
        with self._begin() as connection:
            if moved:
                driver = connection.connection.driver_connection
                assert isinstance(driver, psycopg.Connection)
                accept_move(driver)
                connection.execute(_ACCEPT, {"namespace": namespace, "accepted": ACCEPTED})
            if queue is None:
                connection.execute(_RESUME, {"namespace": namespace})
            else:
                connection.execute(_RELEASE, {"namespace": namespace, "queue": queue})

    def overview(self, namespace: str, *, sources: sa.TextClause = _SOURCES) -> Row:
        """Return the leader, brake, sources, workers, open incidents and queues; see Ledger."""
        with self._begin(snapshot=True) as connection:
            leader = next(iter(rows(connection, _LEADER, namespace=namespace)), None)
            paused_at = leader.pop("paused_at") if leader else None
            held = leader.pop("held") if leader else {}
            return {
                "namespace": namespace,
                "installation": _installation(connection),
                "leader": leader if leader and leader["term"] > 0 else None,
                "brake": {"paused_at": paused_at, "held": held},
                "sources": rows(connection, sources, namespace=namespace),
                "workers": rows(connection, _WORKERS, namespace=namespace)[0],
                "incidents": rows(connection, _INCIDENTS, namespace=namespace),
                "queues": rows(connection, _QUEUES, namespace=namespace),
                "held_requests": rows(connection, _HELD_REQUESTS, namespace=namespace)[0],
                "failed_schedules": rows(connection, _FAILED_SCHEDULES, namespace=namespace),
            }

    def idle(self, namespace: str, *, seconds: float) -> Sequence[Row]:
        """Return queues with jobs that have waited for ``seconds`` while their workers run nothing."""
        with self._begin(snapshot=True) as connection:
            return rows(connection, _IDLE, namespace=namespace, seconds=seconds)

    def require_installation(self, name: str | None) -> None:
        """Raise WrongInstallation unless the database has this name; None accepts any name."""
        if name is None:
            return
        with self._begin(snapshot=True) as connection:
            found = connection.execute(_NAME).scalar()
        if found != name:
            raise WrongInstallation(
                f"the database is the installation {found!r}, JOBGUARD_INSTALLATION is {name!r}"
            )

    def close(self) -> None:
        """Dispose of the engine; no connection stays open between calls."""
        self._engine.dispose()

    def _connect(self) -> psycopg.Connection[Any]:
        connection = _Connection.connect(
            writable(self._conninfo()),
            connect_timeout=max(1, round(self._timeout)),
            prepare_threshold=None,  # behind a pooler the next session does not have the prepared statement
            application_name="jobguard ledger",
            client_encoding="utf8",  # a default of the role may name one that has fewer characters
        )
        connection.answer_timeout = self._answer_timeout
        texts.register(connection)
        connection.adapters.register_loader("timestamptz", _TimeLoader)
        connection.adapters.register_loader("jsonb", _JsonLoader)
        connection.add_notice_handler(_log_warning)
        return connection

    @contextmanager
    def _begin(self, *, snapshot: bool = False) -> Iterator[sa.Connection]:
        """Open one transaction; ``snapshot`` makes all its reads see the same moment."""
        options: dict[str, Any] = {"isolation_level": "REPEATABLE READ"}
        if not snapshot:  # overrides the default of the role
            options = {"isolation_level": "READ COMMITTED", "postgresql_readonly": False}
        try:
            with (
                self._engine.connect().execution_options(**options) as connection,
                connection.begin(),
            ):
                connection.exec_driver_sql(self._relied_on)
                yield connection
        except sa.exc.DBAPIError as error:
            raise self._translated(error) from error
        except sa.exc.TimeoutError as error:
            raise StoreUnavailable("the questions before this one have no answer yet") from error

    def _translated(self, error: sa.exc.DBAPIError) -> JobguardError:
        state = getattr(error.orig, "sqlstate", None) or ""
        text = (str(error.orig).strip() or "no answer").splitlines()[0]
        if state in NOT_MIGRATED:
            return NotMigrated(f"{text}: run `jobguard migrate`")
        if state in NO_RIGHTS:
            return NoRights(f"{text}: {GRANT_A_ROLE}")
        if state[:2] in ("22", "23"):
            hint = getattr(getattr(error.orig, "diag", None), "message_hint", None)
            return ConfigurationError(text.splitlines()[0] + (f" ({hint})" if hint else ""))
        try:
            place = describe(self._conninfo())
        except JobguardError as unknown:
            return StoreUnavailable(str(unknown))
        return StoreUnavailable(f"Postgres at {place}: {text}")


class _Connection(psycopg.Connection[Any]):
    """A connection that does not wait longer for one answer, also of a server that has stopped."""

    answer_timeout: float

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **options: Any) -> T:
        """Wait for the end of ``gen``, which psycopg resumes several times a second."""
        return super().wait(self._bounded(gen), *args, **options)

    def _bounded(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        until = time.monotonic() + self.answer_timeout
        try:
            waits_for = next(gen)
            while True:
                ready = yield waits_for
                if time.monotonic() > until:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"no answer in {self.answer_timeout:g} s")
                waits_for = gen.send(ready)
        except StopIteration as end:
            return cast(T, end.value)


class _TimeLoader(TimestamptzLoader):
    """Reads a time that Python cannot have, such as infinity, as the latest or the earliest day."""

    def load(self, data: Buffer) -> datetime:
        """Return the time."""
        try:
            return super().load(data)
        except psycopg.DataError:
            is_early = bytes(data).startswith(b"-") or bytes(data).endswith(b"BC")
            return _EARLIEST if is_early else _LATEST


class _JsonLoader(texts.JsonLoader):
    """Reads a value that Python cannot have as the reason."""

    def load(self, data: Buffer) -> Any:
        """Return the value."""
        try:
            return super().load(data)
        except (ValueError, RecursionError) as error:
            return f"not readable: {error}"


def _log_warning(notice: Any) -> None:
    if notice.severity_nonlocalized == "WARNING":
        log_event("sql_warning", warning=notice.message_primary, hint=notice.message_hint)


def rows(connection: sa.Connection, query: sa.TextClause, **values: Any) -> list[Row]:
    """Return the rows of a query as dicts."""
    return [dict(row._mapping) for row in connection.execute(query, values)]


def labels(sources: Sequence[Row]) -> dict[int, str]:
    """Return a label for each source: its name or address, and more where that is not unique."""
    forms = (
        lambda s: s["name"] or s["address"],
        lambda s: f"{s['library']} at {s['name'] or s['address']}",
        lambda s: f"{s['library']} at {s['name'] or s['address']} ({s['prefix']})",
    )
    names: dict[int, str] = {}
    for form in forms:
        taken = Counter(form(source) for source in sources)
        for source in sources:
            if taken[form(source)] == 1:
                names.setdefault(source["id"], form(source))
    return {source["id"]: names.get(source["id"], str(source["id"])) for source in sources}


def _supersede(connection: sa.Connection, namespace: str, token: UUID) -> UUID:
    """Create a new delivery of an owed one. The old one becomes a tombstone, so copies are skipped."""
    row = connection.execute(_OWED, {"namespace": namespace, "token": token}).first()
    if row is None:
        raise NotRequeued(f"no delivery {token} is known in the namespace {namespace!r}")
    if row.runs:
        raise NotRequeued(f"job {row.job_id} runs: its worker is alive")
    fresh = new_token(after=token)
    connection.execute(_SUPERSEDE, {"source": row.source, "token": token, "fresh": fresh})
    return fresh


def _installation(connection: sa.Connection) -> Row:
    row = rows(connection, _INSTALLATION)[0]
    try:
        with connection.begin_nested():
            row["system_now"] = connection.execute(_SYSTEM).scalar()
    except sa.exc.DBAPIError as error:  # not permitted: only the oid can show a move
        if error.connection_invalidated:
            raise
        row["system_now"] = None
    known = (row["system_identifier"], row["system_now"])
    row["moved"] = row["database_oid"] != row["database_now"] or (
        None not in known and known[0] != known[1]
    )
    return row
