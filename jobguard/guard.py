"""``guard()`` and the ``JobGuard`` that it returns. Only this module makes and connects the parts."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast
from uuid import UUID

from jobguard.adapter import Adapter, DeferredTarget, Guarded, Tracker
from jobguard.conninfo import describe, postgres_conninfo
from jobguard.current import CurrentJob, current
from jobguard.errors import (
    ConfigurationError,
    ConflictingGuard,
    InvalidKey,
    JobguardError,
    NoPostgres,
    NoRights,
    NotEnded,
    NotMigrated,
    StoreUnavailable,
    UnsupportedTarget,
)
from jobguard.hooks import Hook, remove_all, reported
from jobguard.hooks import add as add_hook
from jobguard.hooks import check as check_event
from jobguard.job_keys import KeyRule, OnConflict, Sent, check_seconds, keyed
from jobguard.log import log_event
from jobguard.model import Outcome
from jobguard.redact import redact
from jobguard.registry import on_unguarded_worker, register, registered_tracker, unregister
from jobguard.settings import Settings, disabled, settings_from, unknown_variables
from jobguard.store.protocols import Counts

if TYPE_CHECKING:
    from datetime import datetime

    from jobguard.host.callers import Caller
    from jobguard.host.tracker import HostTracker
    from jobguard.operations.act import Operations
    from jobguard.operations.job import Job
    from jobguard.operations.read import Page, ReadModel
    from jobguard.schedules import NoSchedules, Schedules

H = TypeVar("H", bound=Hook)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two looks for the end of a job."""

Postgres = str | Mapping[str, Any] | Callable[[], Any] | None


@dataclass(frozen=True, slots=True)
class Stats(Counts):
    """The number of jobs in each state, in total and by queue."""

    queues: Mapping[str, Counts] = field(default_factory=dict)
    spool: Mapping[str, int] = field(default_factory=dict)
    """The spool of this process: its entries and bytes, and counts of the entries that left it."""


class JobGuard:
    """A guarded source. An inert guard does nothing and returns zeros and empty results."""

    def __init__(
        self,
        settings: Settings,
        *,
        inert: str | None = None,
        tracker: HostTracker | None = None,
        adapter: Adapter | None = None,
        conninfo: Callable[[], str] | None = None,
        later: Callable[[], None] | None = None,
        target: object = None,
    ) -> None:
        self.settings = settings
        self._inert = inert
        self._known: HostTracker | None = tracker
        self._adapter = adapter
        self._conninfo = conninfo
        self._later = later
        self._target = target
        self._deferred: object = None
        """The target, if it was known only later: closing this guard concerns no other target."""
        self._by_environment = False
        """It was made for a worker whose process had not called guard()."""

    def __repr__(self) -> str:
        if self._later is not None and self._inert is None:
            return "<JobGuard: known when its application is configured>"
        what = f"inert: {self._inert}" if self._known is None else str(self._known.source)
        return f"<JobGuard {what}>"

    @property
    def inert(self) -> str | None:
        """The reason why nothing is guarded; None: the source is guarded."""
        self._resolve_target()
        return self._inert

    @property
    def _tracker(self) -> HostTracker | None:
        self._resolve_target()
        return self._known

    def _resolve_target(self) -> None:
        """Find the source if that had to wait for the application's configuration."""
        if self._later is not None:
            self._later()

    def batch(self) -> AbstractContextManager[None]:
        """Record all jobs sent inside the block in one statement, and push them at its end.

        For loops that send many jobs from one thread. If the block raises an error, the jobs before the
        error are pushed as well. No job of the block is in Redis before the block ends.
        """
        return nullcontext() if self._tracker is None else self._tracker.batch()

    def send(
        self,
        task: Any,
        *args: Any,
        key: str,
        on_conflict: OnConflict = "ignore",
        throttle: float = 0.0,
        debounce: float = 0.0,
        delay: float | None = None,
        queue: str | None = None,
        **kwargs: Any,
    ) -> Sent:
        """Send a job with a key: at most one job of a key is owed in this source.

        ``task``: a function for RQ, a task or its name for Celery, an actor or its name for Dramatiq.
        ``on_conflict``: what happens if another job of the key waits or runs. "ignore": nothing is sent;
        "raise": raise KeyHeld; "replace": the new job takes the place of one that waits, and waits beside
        one that runs.
        ``throttle``: accept no other job of the key for so many seconds, even if this one has ended.
        ``debounce``: start so many seconds after the last send of the key, with its arguments.
        ``delay``: seconds until the job is due. ``queue``: the queue, if it is not the usual one.

        Raises KeyHeld, InvalidKey, StoreUnavailable while Postgres is away (nothing is sent), and the
        errors of the library.
        """
        if self._tracker is None or self._adapter is None:
            raise ConfigurationError(
                f"send() needs a guarded source, and nothing is guarded here: {self._inert}"
            )
        check_seconds("debounce", debounce)
        if delay is not None and not delay < 0:  # a due time that has passed means at once
            check_seconds("delay", delay)
        if debounce:
            if on_conflict == "raise" or delay is not None:
                raise InvalidKey(
                    "debounce replaces the job that waits and sets its delay: give neither "
                    "on_conflict='raise' nor delay beside it"
                )
            on_conflict, delay = "replace", debounce
        with keyed(KeyRule(key, on_conflict, throttle)) as sent:
            job_id, result = self._adapter.send(
                self._target, task, args, kwargs, delay=delay, queue=queue
            )
        if sent.sent:
            sent.job_id, sent.result = job_id, result
        return sent

    def transaction(self, connection: Any) -> AbstractContextManager[None]:
        """Record all jobs sent inside the block in the transaction of ``connection``.

        ``connection`` is the application's own connection to the database of the ledger: a psycopg
        connection or cursor, a SQLAlchemy Connection or Session, or a Django connection. If no transaction
        is open on it, the block opens one and commits it at its end; otherwise the block is a savepoint in
        it. An error in the block rolls it back. The jobs are pushed after the commit, by this process or by
        the leader. Jobs of a transaction or savepoint that is rolled back are never sent.

        Raises NotTransactional for a job that needs a read of Redis (unique jobs, dependencies, chords, a
        pipeline) or has a key; UnsupportedTarget for an unknown connection; ConfigurationError for a
        connection to another database; StoreUnavailable.
        """
        from jobguard.host.callers import caller_of

        return transaction_of([self], caller_of(connection))

    def atransaction(self, connection: Any) -> AbstractAsyncContextManager[None]:
        """Do the same for asyncio: ``async with guard.atransaction(connection):``.

        ``connection`` is a psycopg AsyncConnection, a SQLAlchemy AsyncConnection or AsyncSession, or an
        asyncpg Connection. The jobs are recorded at the end of the block. Open a block inside the block for
        jobs that belong to a savepoint.
        """
        from jobguard.host.callers import async_caller_of
        from jobguard.host.transaction import atransaction

        caller = async_caller_of(connection)
        return atransaction(_transactional([self]), caller)

    def stats(self) -> Stats:
        """Count the jobs of this source by state and queue. Raises StoreUnavailable."""
        if self._tracker is None:
            return Stats()
        found = self._ledger().stats(self.settings.namespace, source=self._tracker.source.id)
        queues = {queue: counts for (_, queue), counts in found.items()}
        total = Counts()
        for counts in queues.values():
            total = replace(
                total,
                **{
                    f.name: getattr(total, f.name) + getattr(counts, f.name) for f in fields(Counts)
                },
            )
        return Stats(
            **{f.name: getattr(total, f.name) for f in fields(Counts)},
            queues=queues,
            spool=self._tracker.spooled(),
        )

    def job(self, job_id: str) -> Job:
        """Return a job: the sequence of its deliveries that are owed or in the history, newest first.

        A job has one delivery for each push: a retry supersedes the delivery before it. ``state`` and
        ``why`` are those of the newest one; Redis is asked where each owed delivery is now. An unknown id
        gives an empty one. Raises StoreUnavailable.
        """
        from jobguard.operations.brokers import Brokers
        from jobguard.operations.job import Job, read_job

        _check_ids([job_id])
        tracker = self._tracker
        if tracker is None:
            return Job(job_id)
        brokers = None
        if tracker.client is not None:
            brokers = Brokers(clients={tracker.source.address: tracker.client})
        return read_job(self._ledger(), self.settings.namespace, job_id, self.settings, brokers)

    def jobs(
        self,
        *,
        state: str | Sequence[str] = (),
        queue: str | None = None,
        task: str | None = None,
        worker: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        error: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> Page:
        """Return one page of deliveries, newest first; ``page.rows`` are mappings.

        ``state``: one or several of pending, scheduled, processing, stuck, completed, failed, dead,
        cancelled, superseded; none: all but superseded. ``since`` and ``until``: when it was recorded.
        ``error``: a part of its error. ``after``: ``page.after`` of the page before. A page reads a bounded
        number of rows, so that it may be short and yet not be the last. Raises ConfigurationError for an
        unknown state, and StoreUnavailable.
        """
        from jobguard.operations.read import JobFilter, Page

        states = (state,) if isinstance(state, str) else tuple(state)
        wanted = JobFilter(states, queue, task, worker, since, until, error)
        if self._tracker is None:
            return Page((), None)
        return self._ledger().list_jobs(self.settings.namespace, wanted, limit=limit, after=after)

    def heartbeat(
        self, job_id: str, *, progress: float | None = None, attrs: Mapping[str, Any] | None = None
    ) -> bool:
        """Record the progress (0 to 1) and attributes of a running job. Unknown ids are ignored."""
        if self._tracker is None:
            return False
        recorded = self._tracker.heartbeat(job_id, progress=progress, attrs=attrs)
        reported(self._tracker.source.id, CurrentJob(job_id), progress, attrs)
        return recorded

    def on(self, event: str) -> Callable[[H], H]:
        """Call the decorated function at an event of this source's jobs: ``@guard.on("error")``.

        The events: ``start``, ``finish``, ``error`` (each failed run, also if the library tries again),
        ``recovered`` (a run begins again after a worker's death), ``heartbeat`` and ``update`` (the job
        reported), ``dead`` (a worker tells the library that jobguard gave the job up). The function gets a
        jobguard.hooks.JobEvent, in the process and thread where the event happens. Its errors are logged
        and contained. Raises ConfigurationError for another event.
        """

        def decorate(hook: H) -> H:
            check_event(event, hook)
            if self._tracker is not None:
                add_hook(self._tracker.source.id, event, hook)
            return hook

        return decorate

    def wait(self, job_id: str, timeout: float) -> Outcome:
        """Wait until a job has ended, and return its outcome.

        A retry is no end. Postgres is asked at growing intervals, up to a second; while it is away, the
        wait goes on. Raises NotEnded (a TimeoutError) after ``timeout`` seconds, also for an unknown id;
        NotMigrated and NoRights at once.
        """
        until, pause = time.monotonic() + timeout, _FIRST_PAUSE
        end_of = self._end_of(job_id)
        while (outcome := end_of()) is None:
            left = until - time.monotonic()
            if left <= 0:
                raise NotEnded(f"job {job_id} has not ended in {timeout:g} s")
            time.sleep(min(pause, left))
            pause = min(_LONGEST_PAUSE, 1.5 * pause)
        return outcome

    async def await_job(self, job_id: str, timeout: float) -> Outcome:
        """Do the same as ``wait`` for asyncio."""
        import asyncio  # not for the processes that do not use it

        until, pause = time.monotonic() + timeout, _FIRST_PAUSE
        end_of = self._end_of(job_id)
        while (outcome := await asyncio.to_thread(end_of)) is None:
            left = until - time.monotonic()
            if left <= 0:
                raise NotEnded(f"job {job_id} has not ended in {timeout:g} s")
            await asyncio.sleep(min(pause, left))
            pause = min(_LONGEST_PAUSE, 1.5 * pause)
        return outcome

    def _end_of(self, job_id: str) -> Callable[[], Outcome | None]:
        """Return a function that asks for the outcome, on one ledger for the whole wait."""
        _check_ids([job_id])
        tracker = self._tracker
        if tracker is None:
            return lambda: None
        ledger = self._ledger()

        def ask() -> Outcome | None:
            try:
                return ledger.end_of(tracker.source.id, job_id)
            except (NotMigrated, NoRights):
                raise  # no wait changes that
            except StoreUnavailable:
                return None

        return ask

    @property
    def schedules(self) -> Schedules | NoSchedules:
        """The schedules of this namespace; see jobguard.schedules."""
        # Imported here: a process without schedules needs no time zones.
        from jobguard.schedules import NoSchedules, Schedules

        if self._tracker is None or self._adapter is None:
            return NoSchedules()
        return Schedules(
            self._ledger,
            self.settings.namespace,
            self._tracker.source,
            self._adapter,
            self._tracker.connect,
        )

    def lock(self, name: str, *, wait: float = 0.0) -> AbstractContextManager[bool]:
        """Take a lock for the running job; see jobguard.lock."""
        return current().lock(name, wait=wait)

    def cancel(self, *job_ids: str) -> None:
        """Cancel these jobs: the fence skips them, and they are not restored. Raises ConfigurationError."""
        _check_ids(job_ids)
        if self._tracker is not None:
            self._tracker.cancel(job_ids=job_ids)

    def requeue(self, token: UUID | str) -> UUID | None:
        """Make a new delivery of a failed, dead or owed one, for the reconciler to push; return its token.

        This is a decision of a person. Therefore it works also for a queue that is on hold or not trusted.
        Raises JobguardError if there is nothing left to push, or if a worker runs the delivery.
        """
        if self._tracker is None:
            return None
        try:
            given = token if isinstance(token, UUID) else UUID(token)
        except (ValueError, AttributeError):
            raise ConfigurationError(
                f"{token!r} is no token of a delivery: give that of one, such as guard.job(id)[0]['token']"
            ) from None
        return self._ledger().requeue(self.settings.namespace, given)

    def pause(self, queue: str | None = None, *, force: bool = False) -> None:
        """Stop all recoveries, in the whole namespace or in one queue, until ``resume()``.

        Raises JobguardError for a queue that no job and no worker has named yet, unless ``force``.
        """
        if self._tracker is not None:
            self._operations().pause(self.settings.namespace, queue=queue, force=force)

    def resume(self, queue: str | None = None) -> None:
        """Allow recoveries again. Raises JobguardError for a queue that nothing has named yet."""
        if self._tracker is not None:
            self._operations().resume(self.settings.namespace, queue=queue, moved=False)

    def reconcile(self) -> Mapping[str, Any]:
        """Make one reconciling pass now, if no leader does it already; return the results.

        Two inspections with a grace between them decide, so that this takes some seconds. Raises
        StoreUnavailable.
        """
        if self._tracker is None or self._conninfo is None or self._tracker.client is None:
            return {}
        from jobguard.reconciler.service import run_once

        address = self._tracker.source.address
        return run_once(self.settings, self._conninfo, {address: self._tracker.client})

    def connect(self) -> None:
        """Connect to Postgres now. Raises StoreUnavailable or a subclass if Postgres cannot be used."""
        if self._tracker is not None:
            self._tracker.connect()

    def close(self) -> None:
        """Write all waiting reports, and remove the hooks from the library.

        An application that was configured after its ``guard()`` keeps its guard if another one is closed.
        """
        later, self._later = self._later, None
        tracker, self._known = self._known, None
        if later is not None and tracker is None:
            self._inert = "closed"
        if tracker is None:
            return
        self._inert = "closed"
        adapter, source = self._adapter, tracker.source.id
        if adapter is not None and not adapter.uninstall(cast(Tracker, tracker), self._deferred):
            _guards[source] = JobGuard(
                self.settings, tracker=tracker, adapter=adapter, conninfo=self._conninfo
            )
            return
        unregister(cast(Tracker, tracker))
        remove_all(source)
        _guards.pop(source, None)
        tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ledger(self) -> ReadModel:
        from jobguard.operations.read import ReadModel

        assert self._conninfo is not None
        return ReadModel(self._conninfo, encrypt=self.settings.encrypt)

    def _operations(self) -> Operations:
        from jobguard.operations.act import Operations

        assert self._conninfo is not None
        return Operations(self._conninfo, encrypt=self.settings.encrypt)


def _check_ids(job_ids: Sequence[Any]) -> None:
    for one in job_ids:
        if not isinstance(one, str):
            raise ConfigurationError(f"give the id of the job, which is a text, and not {one!r}")


def transaction_of(guards: Sequence[JobGuard], caller: Caller) -> AbstractContextManager[None]:
    """Record all jobs of these guards that are sent inside in the transaction of the caller."""
    from jobguard.host.transaction import transaction

    return transaction(_transactional(guards), caller)


def _transactional(guards: Sequence[JobGuard]) -> list[HostTracker]:
    trackers = [guard._tracker for guard in guards if guard._tracker is not None]
    if any(tracker.settings.mode != "guard" for tracker in trackers):
        raise ConfigurationError(
            "transaction() needs the mode 'guard': in the mode 'observe' no leader pushes the jobs of a "
            "process that died after its commit"
        )
    return trackers


def known_guards() -> list[JobGuard]:
    """Return the guards of this process, and configure the applications that some of them wait for."""
    found = [*_guards.values(), *_deferred]
    by_source = {id(one._tracker): one for one in found if one._tracker is not None}
    return list(by_source.values())


_deferred: weakref.WeakSet[JobGuard] = weakref.WeakSet()
"""The guards whose targets were known only later."""
_guards: dict[int, JobGuard] = {}
_warned: set[str] = set()


def guard(
    target: object, *, postgres: Postgres = None, namespace: str | None = None, **settings: Any
) -> JobGuard:
    """Guard a queue: from now on every job is recorded in Postgres before its enqueue returns.

    ``target`` is an ``rq.Queue``, a list of them, or a ``redis.Redis`` (every RQ queue on it); a
    ``celery.Celery``; a Dramatiq ``RedisBroker``. The target is used as before. ``postgres`` is a URL, a
    mapping or a callable that returns one; without it, ``JOBGUARD_POSTGRES_URL`` or ``DATABASE_URL``.
    Other arguments are the fields of ``jobguard.settings.Settings``; each also has the variable
    ``JOBGUARD_<NAME>``.

    The call opens no connection. It does not read an application's configuration before the first job; if
    the application turns out to be one that cannot be guarded, the log says so at that time. A second call
    for the same target changes nothing. If no Postgres is named, the log has one warning and the guard is
    inert.

    Raises UnsupportedTarget, ConfigurationError, or ConflictingGuard if the source is already
    guarded with other settings; with ``connect="require"`` also StoreUnavailable or NoPostgres.
    """
    chosen = settings_from({**settings, "namespace": namespace})
    if chosen.encrypt is not None:
        from jobguard.sealing import Sealer

        Sealer(chosen.encrypt).check()
    for variable in unknown_variables():
        if variable not in _warned:
            _warned.add(variable)
            log_event("variable_unknown", variable=variable)
    if disabled():
        log_event("guard_inert", reason="JOBGUARD_DISABLED is set")
        return JobGuard(chosen, inert="JOBGUARD_DISABLED is set")
    adapter, guarded = find_adapter(target, chosen)
    if isinstance(guarded, DeferredTarget):
        return _guard_deferred(target, chosen, postgres, adapter, guarded)
    return _guard_now(target, chosen, postgres, adapter, guarded)


def find_adapter(target: object, settings: Settings) -> tuple[Adapter, Guarded | DeferredTarget]:
    """Return the adapter that knows this target, and the source and queues of the target.

    Raises UnsupportedTarget.
    """
    _refuse_cluster(target)
    tried = []
    for entry in _adapters_for(target):
        try:
            adapter: Adapter = entry.load()()
        except ImportError as error:
            tried.append(f"{entry.name} ({error})")
            continue
        tried.append(entry.name)
        try:
            guarded = adapter.sources(target, namespace=settings.namespace, name=settings.source)
        except (UnsupportedTarget, ValueError) as error:
            # A library that cannot read its URL quotes the URL, which may contain a password.
            raise UnsupportedTarget(redact(str(error))) from None
        if guarded is not None:
            return adapter, guarded
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    raise UnsupportedTarget(
        f"cannot guard a {kind}: give an rq.Queue, a list of them, or a redis.Redis; a "
        "celery.Celery; or a dramatiq RedisBroker "
        f"(adapters tried: {', '.join(tried) or 'none installed'})"
    )


def _refuse_cluster(target: object) -> None:
    """Raise UnsupportedTarget for a client of Redis Cluster, and for a target that uses one."""
    several = target if isinstance(target, list | tuple) else (target,)
    for one in several:
        for client in (one, getattr(one, "connection", None), getattr(one, "client", None)):
            if any(kind.__name__ == "RedisCluster" for kind in type(client).__mro__):
                raise UnsupportedTarget(
                    "Redis Cluster cannot be guarded: scripts need all keys of a job on one node. Use a "
                    "Redis without cluster mode, with Sentinel if a failover is needed"
                )


def _adapters_for(target: object) -> Iterator[EntryPoint]:
    """Yield the adapter of the target's library, so that no other library is imported; else every one."""
    found = {entry.name: entry for entry in entry_points(group="jobguard.adapters")}
    parts = {part for kind in type(target).__mro__ for part in kind.__module__.split(".")}
    named = [name for name in found if name in parts]
    for name in named or found:
        yield found[name]


def _guard_now(
    target: object, chosen: Settings, postgres: Postgres, adapter: Adapter, guarded: Guarded
) -> JobGuard:
    if guarded.inert is not None or guarded.client is None:
        reason = guarded.inert or "a test double"
        log_event("guard_inert", reason=reason)
        return JobGuard(chosen, inert=reason)
    try:
        conninfo = postgres_conninfo(postgres)
    except NoPostgres as error:
        if chosen.connect == "require":
            raise
        return _without_postgres(chosen, str(error))
    existing = _guards.get(guarded.source.id)
    if existing is not None:
        try:
            return _same(existing, chosen, conninfo, guarded, target)
        except ConflictingGuard as error:
            return _in_worker(error, existing, existing)
    tracker = _tracker(guarded, chosen, conninfo)
    register(cast(Tracker, tracker))
    try:
        adapter.install(registered_tracker(cast(Tracker, tracker)), target)
    except BaseException as error:
        unregister(cast(Tracker, tracker))
        if not isinstance(error, ConflictingGuard):
            raise
        made = next((one for one in _guards.values() if one._by_environment), None)
        return _in_worker(error, made, JobGuard(chosen, inert=str(error)))
    made = JobGuard(chosen, tracker=tracker, adapter=adapter, conninfo=conninfo, target=target)
    _guards[guarded.source.id] = made
    log_event(
        "guarded",
        source=str(guarded.source),
        queues=sorted(guarded.queues) if guarded.queues is not None else "all",
    )
    if chosen.connect == "require":
        try:
            tracker.connect()
        except JobguardError:
            made.close()
            raise
    return made


def _in_worker(error: ConflictingGuard, made: JobGuard | None, instead: JobGuard) -> JobGuard:
    """Return a guard for a call that a job of a worker makes, although the worker has another guard.

    ``made``: that guard. The call stands in a module that RQ imports for the job: an error would fail each
    job of the module. Raises the error if the application itself has made the guard.
    """
    if made is None or not made._by_environment:
        raise error
    log_event("guard_differs", error=str(error))
    return instead


def _without_postgres(chosen: Settings, reason: str) -> JobGuard:
    """Return an inert guard, so that an import of the application in a test or a build does not fail."""
    if reason not in _warned:
        _warned.add(reason)
        log_event("postgres_unnamed", reason=reason)
    return JobGuard(chosen, inert=reason)


def _guard_deferred(
    target: object, chosen: Settings, postgres: Postgres, adapter: Adapter, later: DeferredTarget
) -> JobGuard:
    """Guard a target as soon as its application is configured; do not read the target before.

    If the target cannot be guarded then, the reason is logged and not raised: the host is about to send or
    run a job.
    """
    if postgres is not None:
        postgres_conninfo(postgres)  # raises an error for a wrong value at once
    once = threading.RLock()

    def complete() -> None:
        with once:
            if made._later is None:
                return
            made._later = None  # a use of the guard meanwhile must not come here again
            try:
                _, guarded = find_adapter(target, chosen)
                if isinstance(guarded, DeferredTarget):
                    raise UnsupportedTarget("its application is not completely configured")
                real = _guard_now(target, chosen, postgres, adapter, guarded)
            except (JobguardError, ValueError) as error:
                log_event("guard_refused", error=str(error))
                made._inert = str(error)
                return
            made._known, made._inert = real._known, real._inert
            made._adapter, made._conninfo = real._adapter, real._conninfo
            made._deferred = target

    def resolve() -> None:
        waits = later.resolve()
        if waits is None:
            complete()
        elif made._later is not None:
            made._inert = waits

    if later.inert is not None:
        log_event("guard_inert", reason=later.inert)
    made = JobGuard(chosen, later=resolve, inert=later.inert, target=target)
    _deferred.add(made)
    later.when(complete)
    return made


def _tracker(guarded: Guarded, settings: Settings, conninfo: Callable[[], str]) -> HostTracker:
    # Imported here because they are heavy: a process that guards nothing does not load them.
    from jobguard.host.tracker import HostTracker

    def store() -> Any:
        from jobguard.store.host import PostgresStore

        return PostgresStore(conninfo, settings)

    def client() -> Any:
        from jobguard.clients import own_client

        assert guarded.client is not None
        return own_client(guarded.client(), timeout=settings.redis_timeout)

    return HostTracker(guarded.source, settings, store, queues=guarded.queues, client=client)


def _same(
    existing: JobGuard,
    settings: Settings,
    conninfo: Callable[[], str],
    guarded: Guarded,
    target: object,
) -> JobGuard:
    differences = [
        f"{f.name} is {getattr(existing.settings, f.name)!r}, now {getattr(settings, f.name)!r}"
        for f in fields(Settings)
        if getattr(existing.settings, f.name) != getattr(settings, f.name)
    ]
    assert existing._conninfo is not None and existing._tracker is not None
    assert existing._adapter is not None
    address, other = existing._tracker.source.address, guarded.source.address
    if address != other:
        raise ConflictingGuard(
            f"the source {guarded.source.name!r} is already {address} in this process, and this target is "
            f"at {other}: give each Redis a source name of its own (source=…), or use one address for it"
        )
    was, now = describe(existing._conninfo()), describe(conninfo())
    if was != now:
        differences.append(f"postgres is {was}, now {now}")
    if differences:
        raise ConflictingGuard(
            f"{guarded.source} is already guarded with other settings: {'; '.join(differences)}"
        )
    existing._tracker.guard_also(guarded.queues)
    existing._adapter.install(registered_tracker(cast(Tracker, existing._tracker)), target)
    return existing


def _resolve_worker(target: object) -> Tracker | None:
    """Guard a worker whose process never called guard(), with the settings of the environment."""
    before = set(_guards)
    try:
        made = guard(target)
    except (ConfigurationError, UnsupportedTarget, ConflictingGuard) as error:
        log_event("guard_refused", error=str(error))
        return None
    made._by_environment = made._by_environment or bool(set(_guards) - before)
    return cast(Tracker, made._tracker) if made._tracker is not None else None


on_unguarded_worker(_resolve_worker)


@atexit.register
def _at_exit() -> None:
    for made in list(_guards.values()):
        if made._tracker is not None:
            made._tracker.close()
