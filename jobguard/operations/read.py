"""The read model: which jobs there are, where each one stands, and what happened.

Every query has a bound. A list reads at most ``_BUDGET`` rows, in the order of the tokens, even if few of
them match, and says where it stopped. So a list of a million owed and ten million ended jobs costs the
same as a short one. Numbers of many rows come from the leader's counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, TypeAlias
from uuid import UUID

import sqlalchemy as sa

from jobguard.errors import ConfigurationError
from jobguard.model import token_at
from jobguard.store import ledger as people
from jobguard.store.ledger import PostgresLedger
from jobguard.store.protocols import Counts

Row: TypeAlias = dict[str, Any]

OWED_STATES = ("pending", "scheduled", "processing", "stuck")
ENDED_STATES = ("completed", "failed", "dead", "cancelled", "superseded")
STATES = (*OWED_STATES, *ENDED_STATES)
USUAL = tuple(state for state in STATES if state != "superseded")
"""The states of a list for which none is named: a superseded delivery was replaced by another one."""

_BUDGET = 5_000
"""Rows that one query reads, beside each other in the table."""
_SCATTERED = 1_000
"""Rows that one query reads where each is in another place of the table: the few that were given up."""
_SMALL = 20_000
"""Number of rows up to which rows are counted at once, instead of taken from the leader's count."""
_RARE = frozenset(("failed", "dead", "cancelled"))
_FIRST = UUID(int=0)
_LAST = UUID(int=(1 << 128) - 1)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list. Everything that is given must fit."""

    states: Sequence[str] = ()
    """Of STATES; none: all but superseded."""
    queue: str | None = None
    task: str | None = None
    worker: str | None = None
    """The name, host or id of the worker that runs or ran it."""
    since: datetime | None = None
    """Recorded at this time or later."""
    until: datetime | None = None
    """Recorded before this time."""
    error: str | None = None
    """A part of its error, in any case of letters."""
    priority: int | None = None
    due_before: datetime | None = None
    """Scheduled for a time before this one."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.states) - set(STATES))
        if unknown:
            raise ConfigurationError(
                f"there is no state {unknown[0]!r}; the states are {', '.join(STATES)}"
            )
        for name in ("since", "until", "due_before"):
            if isinstance(at := getattr(self, name), datetime) and at.tzinfo is None:
                object.__setattr__(self, name, at.astimezone())

    @property
    def is_plain(self) -> bool:
        """True if nothing but times selects: then the rows of a page are beside each other."""
        return self.states == () and all(
            getattr(self, name) is None
            for name in ("queue", "task", "worker", "error", "priority", "due_before")
        )

    @property
    def owed(self) -> frozenset[str]:
        """The wanted states of owed deliveries."""
        if self.error is not None:
            return frozenset()
        return frozenset(self.states or USUAL) & frozenset(OWED_STATES)

    @property
    def ended(self) -> frozenset[str]:
        """The wanted outcomes of ended deliveries."""
        if self.due_before is not None or self.priority is not None:
            return frozenset()
        return frozenset(self.states or USUAL) & frozenset(ENDED_STATES)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list of deliveries, newest first."""

    rows: Sequence[Row]
    after: str | None
    """The argument ``after`` of the next page; None: this is the last one. A page may be empty and not the
    last: then none of the rows that were read fits."""
    back_to: datetime | None = None
    """How far back the list was read, if it is not complete."""


@dataclass(frozen=True, slots=True)
class Counted:
    """The number of jobs in each state, by (label of the source, queue)."""

    counts: Mapping[tuple[str, str], Counts]
    oldest: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Seconds since the oldest pending job of each queue was due."""
    at: datetime | None = None
    """When the leader counted; None: everything was counted now."""

    @property
    def total(self) -> Counts:
        """The sum over all queues."""
        return total_of(self.counts.values())


def total_of(counts: Any) -> Counts:
    """Return the sum of the counts of several queues."""
    every = list(counts)
    return Counts(**{f.name: sum(getattr(one, f.name) for one in every) for f in fields(Counts)})


# Rows of workers are joined by their id. ``due``: the time until which it may not go back.
_OWED_COLUMNS = """
  j.source, j.token, j.job_id, j.queue, j.task, s.library, s.address,
  case when r.token is not null then 'processing'
       when j.due_at > now() then 'scheduled' else 'pending' end as state,
  (u.token is not null or (r.token is not null
     and (w.id is null or w.dead_at is not null or w.left_at is not null))) as stuck,
  u.cause::text as suspected, j.priority, j.attempt, j.recoveries, j.crashes, j.recorded_at, j.due_at,
  r.claimed_at, r.progress, null::timestamptz as ended_at, r.worker, w.name as worker_name,
  w.host as worker_host, null::text as error
"""

_OWED = """
with scanned as materialized (
  {scanned} order by j.token desc limit :budget
), found as (
  select * from (
    select {columns}
    from scanned j
    join jobguard.sources s on s.id = j.source and s.namespace = :namespace
    left join jobguard.running r on r.source = j.source and r.token = j.token
    left join jobguard.workers w on w.id = r.worker
    left join jobguard.suspects u on u.source = j.source and u.token = j.token
    where (cast(:queue as text) is null or j.queue = :queue)
      and (cast(:task as text) is null or j.task = :task)
      and (cast(:priority as int) is null or j.priority = :priority)
      and (cast(:due_before as timestamptz) is null or j.due_at < :due_before)
      and (cast(:worker as text) is null or w.name = :worker or w.host = :worker
           or r.worker::text = :worker)
  ) f
  where f.state = any (:states) or (f.stuck and 'stuck' = any (:states))
  order by f.token desc limit :limit
)
select (select count(*) from scanned) as scanned,
       (select token from scanned order by token limit 1) as last, f.*
from (select) one left join found f on true order by f.token desc
"""

_ALL_OWED = """
  select j.source, j.token, j.job_id, j.queue, j.task, j.priority, j.attempt, j.recoveries, j.crashes,
         j.recorded_at, j.due_at
  from jobguard.jobs j where j.token < :before and j.token >= :since
"""
_OF = """
  select j.source, j.token, j.job_id, j.queue, j.task, j.priority, j.attempt, j.recoveries, j.crashes,
         j.recorded_at, j.due_at
  from (select * from (
          select source, token from jobguard.running where token < :before and token >= :since
          order by token desc limit :budget) a {suspects}
        order by token desc limit :budget) few
  cross join lateral (
    select * from jobguard.jobs o where o.token = few.token and o.source = few.source limit 1) j
  where true
"""
_SUSPECTS = """
        union select * from (
          select source, token from jobguard.suspects where token < :before and token >= :since
          order by token desc limit :budget) b
"""

_ENDED = """
with scanned as materialized (
  select h.source, h.token, h.job_id, h.queue, h.task, h.outcome, h.attempt, h.recoveries, h.crashes,
         h.recorded_at, h.claimed_at, h.ended_at, h.worker, h.errors
  from jobguard.history h where h.token < :before and h.token >= :since {rare}
  order by h.token desc limit :budget
), found as (
  select h.source, h.token, h.job_id, h.queue, h.task, s.library, s.address, h.outcome::text as state,
         false as stuck, null::text as suspected, null::smallint as priority, h.attempt, h.recoveries,
         h.crashes, h.recorded_at, null::timestamptz as due_at, h.claimed_at, null::real as progress,
         h.ended_at, h.worker, w.name as worker_name, w.host as worker_host,
         case when h.errors[cardinality(h.errors)] like 'sealed:1:%'
              then h.errors[cardinality(h.errors)]
              else right(h.errors[cardinality(h.errors)], 500) end as error
  from scanned h
  join jobguard.sources s on s.id = h.source and s.namespace = :namespace
  left join jobguard.workers w on w.id = h.worker
  where h.outcome::text = any (:states)
    and (cast(:queue as text) is null or h.queue = :queue)
    and (cast(:task as text) is null or h.task = :task)
    and (cast(:worker as text) is null or w.name = :worker or w.host = :worker
         or h.worker::text = :worker)
    and (cast(:error as text) is null
         or position(lower(:error) in lower(array_to_string(h.errors, chr(10)))) > 0)
  order by h.token desc limit :limit
)
select (select count(*) from scanned) as scanned,
       (select token from scanned order by token limit 1) as last, f.*
from (select) one left join found f on true order by f.token desc
"""

_FEW_OWED = sa.text("select count(*) from (select from jobguard.jobs limit :most) few")
_FEW_ENDED = sa.text("select count(*) from (select from jobguard.history limit :most) few")

_STORED = sa.text("""
select c.source, c.counts, c.counted_at
from jobguard.owed_counts c join jobguard.sources s on s.id = c.source where s.namespace = :namespace
""")

_ENDS = sa.text("""
select a.source, a.queue, a.what, sum(a.count)
from jobguard.activity a join jobguard.sources s on s.id = a.source
where s.namespace = :namespace and a.what in ('completed', 'failed', 'dead', 'cancelled')
group by 1, 2, 3
""")

_OLDEST = sa.text("""
select j.source, j.queue, extract(epoch from now() - min(greatest(j.recorded_at, j.due_at)))::float8
from jobguard.sources s
join jobguard.jobs j on j.source = s.id
where s.namespace = :namespace and coalesce(j.due_at <= now(), true)
  and not exists (select from jobguard.running r where r.source = j.source and r.token = j.token)
group by 1, 2
""")

_ACTIVITY = sa.text("""
select a.minute, a.source, a.queue, a.what, sum(a.count)::bigint as count,
       floor(extract(epoch from date_trunc('minute', now()) - a.minute) / 60)::int as minutes_ago
from jobguard.activity a join jobguard.sources s on s.id = a.source
where s.namespace = :namespace and a.minute >= now() - make_interval(mins => :minutes)
  and (cast(:queue as text) is null or a.queue = :queue)
group by 1, 2, 3, 4 order by 1, 2, 3, 4
""")

_SOURCES = sa.text("""
select s.id, s.library, s.address, s.prefix, s.name, s.settings,
       extract(epoch from now() - s.watched_at)::float8 as watched_seconds,
       (select count(*) from (select from jobguard.outbox o where o.source = s.id limit :most) o) as outbox,
       -- Those that wait for the time of crash_backoff are not missing. "offset 0": one look by the key for
       -- each, and only for those of a worker's death.
       (select count(*) from (
          select from jobguard.suspects u where u.source = s.id and not (u.cause = 'worker' and exists (
            select from jobguard.jobs j
            where j.source = u.source and j.token = u.token and j.not_before > now() offset 0))
          limit :most) u) as suspects
from jobguard.sources s where s.namespace = :namespace order by s.library, s.address, s.id
""")

_INCIDENTS = sa.text("""
select * from (
  select i.id, 'incident' as kind, s.library, s.address, i.cause, i.detail, i.opened_at, i.closed_at,
         i.missing, i.restored, null as actor
  from jobguard.incidents i join jobguard.sources s on s.id = i.source
  where s.namespace = :namespace and (cast(:before as timestamptz) is null or i.opened_at < :before)
    and (not :still_open or i.closed_at is null)
  union all
  select a.id, 'action', null, null, a.action, a.detail, a.at, a.at, 0, a.jobs, a.actor
  from jobguard.actions a
  where a.namespace = :namespace and (cast(:before as timestamptz) is null or a.at < :before)
    and not :still_open
) happened
order by opened_at desc, kind, id desc limit :limit
""")

_RECOVERED = sa.text("""
with i as (
  select i.source, i.opened_at, i.closed_at, i.cause from jobguard.incidents i
  join jobguard.sources s on s.id = i.source
  where i.id = :id and s.namespace = :namespace
), seen as materialized (
  select r.token, r.cause::text as cause, r.restored_at, r.source
  from i join jobguard.recoveries r on r.source = i.source
    and r.restored_at >= i.opened_at and r.restored_at <= coalesce(i.closed_at, now())
  limit :limit
)
select v.token, v.cause, v.restored_at,
       coalesce(j.job_id, h.job_id) as job_id, coalesce(j.queue, h.queue) as queue,
       coalesce(j.task, h.task) as task, coalesce(h.outcome::text, 'owed') as state
from seen v
left join jobguard.jobs j on j.token = v.token and j.source = v.source
left join lateral (select h.job_id, h.queue, h.task, h.outcome from jobguard.history h
                   where h.token = v.token and h.source = v.source order by h.ended_at limit 1) h on true
order by v.restored_at, v.token
""")

_WORKERS = sa.text("""
select w.id, w.name, w.host, w.pid, w.queues, s.library, s.address, w.started_at, w.beat_at,
       extract(epoch from now() - w.beat_at)::float8 as beat_seconds,
       extract(epoch from now() - w.unflushed_since)::float8 as unflushed_seconds,
       w.left_at, w.dead_at,
       case when w.dead_at is not null then 'dead' when w.left_at is not null then 'left'
            else 'alive' end as state,
       (select count(*) from jobguard.running r where r.worker = w.id) as claims,
       (select array_agg(x.job_id) from (
          select j.job_id from jobguard.running r
          join jobguard.jobs j on j.token = r.token and j.source = r.source
          where r.worker = w.id order by r.claimed_at limit 5) x) as jobs
from jobguard.workers w join jobguard.sources s on s.id = w.source
where s.namespace = :namespace and (:gone or (w.dead_at is null and w.left_at is null))
order by w.dead_at is null and w.left_at is null desc, s.library, w.host, w.name, w.id limit :limit
""")

# Numbers, ids and addresses differ between errors of one kind. The last line of a traceback is the error.
_ERRORS = sa.text("""
with few as materialized (
  select h.token, h.source, h.job_id, h.queue, h.task, h.outcome, h.ended_at,
         case when h.errors[cardinality(h.errors)] like 'sealed:1:%' then 'sealed:1:'
              else right(h.errors[cardinality(h.errors)], 1000) end as error
  from jobguard.history h
  where h.outcome in ('failed', 'dead', 'cancelled') and h.token >= '00000000-0000-0000-0000-000000000000'
  order by h.token desc limit :budget
)
select f.outcome::text as state, f.queue, f.task,
       regexp_replace(case when f.error like 'sealed:1:%' then '(sealed)'
                           else regexp_replace(rtrim(coalesce(f.error, ''), E' \n'), '^.*\n', '', 's') end,
                      '0x[0-9a-f]+|[0-9a-f]{8}-[0-9a-f-]{27}|\\d+', '#', 'gi') as error,
       count(*) as count, min(f.ended_at) as first_at, max(f.ended_at) as last_at,
       (array_agg(f.job_id order by f.token desc))[1] as job_id
from few f join jobguard.sources s on s.id = f.source
where s.namespace = :namespace and f.outcome in ('failed', 'dead')
  and (cast(:queue as text) is null or f.queue = :queue)
group by 1, 2, 3, 4 order by count desc, last_at desc limit :limit
""")

# What explains where one owed delivery stands. Ages are by the database's clock.
_STANDING = sa.text("""
select j.token, j.source, s.library, s.address, s.prefix, s.name, j.job_id, j.queue, j.task,
       extract(epoch from now() - j.recorded_at)::float8 as age,
       coalesce(extract(epoch from j.due_at - now()), 0)::float8 as due_in,
       coalesce(j.expires_at <= now(), false) as expired,
       coalesce(extract(epoch from j.not_before - now()), 0)::float8 as backoff,
       j.recoveries, j.crashes, j.claims,
       r.number as claim_number, r.worker as claim_worker,
       extract(epoch from now() - r.claimed_at)::float8 as running_for,
       coalesce(jobguard.holds(w, r), false) as runs,
       w.id is not null as worker_known, coalesce(nullif(w.name, ''), w.id::text) as worker_name,
       w.host as worker_host, extract(epoch from now() - w.beat_at)::float8 as beat_age,
       extract(epoch from now() - w.dead_at)::float8 as dead_for,
       extract(epoch from now() - w.left_at)::float8 as left_for,
       u.cause::text as suspected, coalesce(u.mark, '') as suspected_mark,
       extract(epoch from now() - u.seen_at)::float8 as suspected_for,
       o.token is not null as in_outbox, coalesce(o.unsent, false) as unsent,
       q.trusted_since, q.unguarded, extract(epoch from now() - s.watched_at)::float8 as watched_seconds,
       j.recorded_at >= q.trusted_since as trusted,
       l.expires_at > now() as led, l.paused_at,
       coalesce(l.held -> (s.id || '/' || j.queue), l.held -> (s.id || '/*')) as held
from jobguard.sources s
join jobguard.jobs j on j.source = s.id
left join jobguard.running r on r.source = j.source and r.token = j.token
left join jobguard.workers w on w.id = r.worker
left join jobguard.suspects u on u.source = j.source and u.token = j.token
left join jobguard.outbox o on o.source = j.source and o.token = j.token
left join jobguard.queues q on q.source = j.source and coalesce(q.name, q.queue) = j.queue
left join jobguard.leader l on l.namespace = s.namespace
where s.namespace = :namespace and j.token = any (:tokens)
""")

_RECOVERIES = sa.text("""
select r.token, r.cause::text as cause, r.restored_at from jobguard.recoveries r
where r.token = any (:tokens) order by r.restored_at
""")

_ENVELOPE = sa.text("""
select * from (
  select s.library, j.envelope from jobguard.sources s join jobguard.jobs j on j.source + 0 = s.id
  where s.namespace = :namespace and j.token = :token and octet_length(j.envelope) <= :most
  union all
  select s.library, h.envelope from jobguard.sources s join jobguard.history h on h.source + 0 = s.id
  where s.namespace = :namespace and h.token = :token and octet_length(h.envelope) <= :most
) e where envelope is not null limit 1
""")


class ReadModel(PostgresLedger):
    """The ledger with everything that a person on call asks. Every method may raise StoreUnavailable."""

    def list_jobs(
        self, namespace: str, wanted: JobFilter, *, limit: int = 100, after: str | None = None
    ) -> Page:
        """Return one page of deliveries, newest first. ``after``: the end of the page before.

        It reads a bounded number of rows. So a page may have fewer rows than ``limit`` and still not be
        the last. Raises ConfigurationError for an ``after`` that is none.
        """
        if limit < 1:
            raise ConfigurationError(f"the limit of a page is 1 or more, not {limit}")
        before, since = _bounds(wanted, after)
        values = {
            "namespace": namespace,
            "before": before,
            "since": since,
            "limit": limit + 1,
            "queue": wanted.queue,
            "task": wanted.task,
            "worker": wanted.worker,
        }
        found: list[Row] = []
        reached = _FIRST
        with self._begin(snapshot=True) as connection:
            for query, states, more in _queries(wanted):
                most = max(more.pop("budget"), limit + 1)
                if wanted.is_plain:  # nearly every row fits
                    most = min(most, 2 * (limit + 1))
                rows = people.rows(
                    connection, query, **values, **more, states=list(states), budget=most
                )
                if rows[0]["scanned"] >= most:
                    reached = max(reached, rows[0]["last"])
                here = [row for row in rows if row["token"] is not None]
                if len(here) > limit:
                    reached = max(reached, here[limit - 1]["token"])
                found += here
        for row in found:
            if row["error"]:
                row["error"] = self._sealer.unseal_text(row["error"])[-500:]
        return _page(found, reached, limit)

    def each_job(
        self, namespace: str, wanted: JobFilter, *, after: str | None = None
    ) -> Iterator[Row]:
        """Yield every delivery that fits, newest first, page by page."""
        while True:
            page = self.list_jobs(namespace, wanted, limit=1000, after=after)
            yield from page.rows
            if page.after is None:
                return
            after = page.after

    def counts(self, namespace: str, *, source: int | None = None) -> Counted:
        """Return the number of jobs by state and queue: exact while they are few, else as last counted."""
        with self._begin(snapshot=True) as connection:
            few = all(
                connection.execute(query, {"most": _SMALL + 1}).scalar_one() <= _SMALL
                for query in (_FEW_OWED, _FEW_ENDED)
            )
            stored = [] if few else people.rows(connection, _STORED, namespace=namespace)
            names = people.labels(people.rows(connection, _SOURCES, namespace=namespace, most=0))
            if few or not stored:
                ages = connection.execute(_OLDEST, {"namespace": namespace}).all() if few else ()
            else:
                ends = connection.execute(_ENDS, {"namespace": namespace}).all()
        if few or not stored:
            oldest = {(names[id], queue): float(age) for id, queue, age in ages if id in names}
            return Counted(self.stats(namespace, source=source), oldest)
        found: dict[tuple[str, str], dict[str, int]] = {}
        old: dict[tuple[str, str], float] = {}
        for row in stored:
            for queue, *numbers, age in row["counts"]:
                key = (names[row["source"]], queue)
                found[key] = dict(zip(OWED_STATES, numbers, strict=True))
                if age is not None:
                    old[key] = age
        for id, queue, what, count in ends:
            found.setdefault((names[id], queue), {})[what] = int(count)
        if source is not None:
            found = {key: value for key, value in found.items() if key[0] == names.get(source)}
        at = min(row["counted_at"] for row in stored)
        return Counted({key: Counts(**found[key]) for key in sorted(found)}, old, at)

    def state(self, namespace: str) -> Row:
        """Return leader, brake, sources, workers, open incidents and trust of the queues: see overview.

        It counts nothing that may be much: the numbers of jobs are in ``counts``.
        """
        return self.overview(namespace, sources=_SOURCES.bindparams(most=_SMALL))

    def activity(self, namespace: str, *, minutes: int = 60, queue: str | None = None) -> list[Row]:
        """Return what ended and was restored in each minute: minute, source, queue, what, count.

        The minute that runs is 0 ``minutes_ago``; the last complete one, 1.
        """
        with self._begin(snapshot=True) as connection:
            names = people.labels(people.rows(connection, _SOURCES, namespace=namespace, most=0))
            found = people.rows(
                connection, _ACTIVITY, namespace=namespace, minutes=minutes, queue=queue
            )
        return [row | {"source": names[row["source"]]} for row in found]

    def incidents(
        self,
        namespace: str,
        *,
        limit: int = 100,
        before: datetime | None = None,
        still_open: bool = False,
    ) -> list[Row]:
        """Return losses and what people did, newest first; ``before``: the time of the last one seen."""
        with self._begin(snapshot=True) as connection:
            return people.rows(
                connection,
                _INCIDENTS,
                namespace=namespace,
                limit=limit,
                before=before,
                still_open=still_open,
            )

    def recovered(self, namespace: str, incident: int, *, limit: int = 100) -> list[Row]:
        """Return what was put back while an incident was open."""
        with self._begin(snapshot=True) as connection:
            return people.rows(
                connection, _RECOVERED, namespace=namespace, id=incident, limit=limit
            )

    def workers(self, namespace: str, *, gone: bool = False, limit: int = 1000) -> list[Row]:
        """Return the guarded workers; ``gone``: also those that left or died in the last minutes."""
        with self._begin(snapshot=True) as connection:
            return people.rows(connection, _WORKERS, namespace=namespace, gone=gone, limit=limit)

    def errors(self, namespace: str, *, queue: str | None = None, limit: int = 50) -> list[Row]:
        """Return the latest failed and dead jobs, grouped by queue, task and last line of the error."""
        with self._begin(snapshot=True) as connection:
            return people.rows(
                connection,
                _ERRORS,
                namespace=namespace,
                queue=queue,
                limit=limit,
                budget=_SCATTERED,
            )

    def sources(self, namespace: str) -> list[Row]:
        """Return the guarded brokers of the namespace."""
        with self._begin(snapshot=True) as connection:
            return people.rows(connection, _SOURCES, namespace=namespace, most=_SMALL)

    def standing(self, namespace: str, tokens: Sequence[UUID]) -> list[Row]:
        """Return what explains where each of these owed deliveries stands."""
        with self._begin(snapshot=True) as connection:
            return people.rows(connection, _STANDING, namespace=namespace, tokens=list(tokens))

    def recoveries(self, tokens: Sequence[UUID]) -> list[Row]:
        """Return the restores of these deliveries, oldest first."""
        with self._begin(snapshot=True) as connection:
            return people.rows(connection, _RECOVERIES, tokens=list(tokens))

    def envelope(self, namespace: str, token: UUID, *, most: int) -> tuple[str, bytes] | None:
        """Return the library and the envelope of a delivery; None if it is gone or above ``most`` bytes."""
        with self._begin(snapshot=True) as connection:
            values = {"namespace": namespace, "token": token, "most": most}
            row = connection.execute(_ENVELOPE, values).first()
        return None if row is None else (row.library, self._sealer.unseal(bytes(row.envelope)))


def _queries(wanted: JobFilter) -> Iterator[tuple[sa.TextClause, frozenset[str], Row]]:
    """Yield the query of the owed and of the ended, if any of them may fit, with the states and values."""
    if owed := wanted.owed:
        scanned, budget = _ALL_OWED, _BUDGET
        if owed == {"processing"}:
            scanned, budget = _OF.format(suspects=""), _SCATTERED
        elif owed <= {"processing", "stuck"}:
            scanned, budget = _OF.format(suspects=_SUSPECTS), _SCATTERED
        query = _OWED.format(scanned=scanned, columns=_OWED_COLUMNS)
        yield (
            sa.text(query),
            owed,
            {"priority": wanted.priority, "due_before": wanted.due_before, "budget": budget},
        )
    if ended := wanted.ended:
        # The words of the index, or the planner does not see that it serves.
        rare = "and h.outcome in ('failed', 'dead', 'cancelled')" if ended <= _RARE else ""
        budget = _SCATTERED if rare else _BUDGET
        yield sa.text(_ENDED.format(rare=rare)), ended, {"error": wanted.error, "budget": budget}


def _bounds(wanted: JobFilter, after: str | None) -> tuple[UUID, UUID]:
    """Return the bounds of the tokens: a token begins with the time of the record."""
    before = _LAST if wanted.until is None else token_at(wanted.until.timestamp())
    since = _FIRST if wanted.since is None else token_at(wanted.since.timestamp())
    if after is not None:
        try:
            before = min(before, UUID(after))
        except ValueError:
            raise ConfigurationError(
                f"{after!r} is no end of a page: give the `after` of the page before"
            ) from None
    return before, since


def _page(found: list[Row], reached: UUID, limit: int) -> Page:
    """Return the rows down to the token that all queries have reached, each delivery once."""
    rows: dict[UUID, Row] = {}
    for row in found:
        row.pop("scanned")
        row.pop("last")
        if row["token"] >= reached:
            rows[row["token"]] = row  # history comes last: an end is certain
    chosen = sorted(rows.values(), key=lambda row: row["token"], reverse=True)
    if len(chosen) > limit:
        chosen = chosen[:limit]
        reached = chosen[-1]["token"]
    if reached == _FIRST:
        return Page(chosen, None)
    return Page(chosen, str(reached), _time_of(reached))


def _time_of(token: UUID) -> datetime | None:
    """Return the time in a token; None if it has none that a clock could show."""
    try:
        return datetime.fromtimestamp((token.int >> 80) / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return None
