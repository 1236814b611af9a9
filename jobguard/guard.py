"""The one call, and what it gives back. Parts are made and joined here, and nowhere else."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast
from uuid import UUID

from jobguard.adapter import (
    Adapter,
    Guarded,
    Tracker,
    on_unguarded_worker,
    register,
    unregister,
)
from jobguard.conninfo import describe, postgres_conninfo
from jobguard.errors import (
    ConfigurationError,
    ConflictingGuard,
    JobguardError,
    UnsupportedTarget,
)
from jobguard.log import say
from jobguard.settings import Settings, disabled, settings_from
from jobguard.store import Counts

if TYPE_CHECKING:
    from jobguard.store import Ledger
    from jobguard.tracker import HostTracker

Postgres = str | Mapping[str, Any] | Callable[[], Any] | None


@dataclass(frozen=True, slots=True)
class Stats(Counts):
    """How many jobs are in which state, in all and by queue."""

    queues: Mapping[str, Counts] = field(default_factory=dict)


class JobGuard:
    """A guarded source: what one asks of it and tells it. An inert one answers zeros."""

    def __init__(
        self,
        settings: Settings,
        *,
        inert: str | None = None,
        tracker: HostTracker | None = None,
        adapter: Adapter | None = None,
        conninfo: Callable[[], str] | None = None,
    ) -> None:
        self.settings = settings
        self.inert = inert
        self._tracker = tracker
        self._adapter = adapter
        self._conninfo = conninfo

    def __repr__(self) -> str:
        what = f"inert: {self.inert}" if self._tracker is None else str(self._tracker.source)
        return f"<JobGuard {what}>"

    def stats(self) -> Stats:
        """Count the jobs of this source by state and queue. Raises StoreUnavailable."""
        if self._tracker is None:
            return Stats()
        address = self._tracker.source.name or self._tracker.source.address
        queues = {
            queue: counts
            for (where, queue), counts in self._ledger().stats(self.settings.namespace).items()
            if where == address
        }
        total = Counts()
        for counts in queues.values():
            total = replace(
                total,
                **{
                    f.name: getattr(total, f.name) + getattr(counts, f.name) for f in fields(Counts)
                },
            )
        return Stats(**{f.name: getattr(total, f.name) for f in fields(Counts)}, queues=queues)

    def job(self, job_id: str) -> Sequence[Mapping[str, Any]]:
        """Return every delivery of a job that is owed or remembered, newest first."""
        if self._tracker is None:
            return []
        return self._ledger().job(self.settings.namespace, job_id)

    def heartbeat(
        self, job_id: str, *, progress: float | None = None, attrs: Mapping[str, Any] | None = None
    ) -> bool:
        """Note a running job's progress (0 to 1) and attributes. Unknown ids are ignored."""
        if self._tracker is None:
            return False
        return self._tracker.heartbeat(job_id, progress=progress, attrs=attrs)

    def cancel(self, *job_ids: str) -> None:
        """Write these jobs off: the fence skips them, and nothing brings them back."""
        if self._tracker is not None:
            self._tracker.cancel(job_ids=job_ids)

    def requeue(self, token: UUID | str) -> UUID | None:
        """Mint a new delivery of a failed or dead one; the reconciler pushes it.

        Raises JobguardError if there is nothing left to push.
        """
        if self._tracker is None:
            return None
        given = token if isinstance(token, UUID) else UUID(token)
        return self._ledger().requeue(self.settings.namespace, given)

    def pause(self, queue: str | None = None) -> None:
        """Put nothing back, anywhere in the namespace or in one queue, until resumed."""
        if self._tracker is not None:
            self._ledger().pause(self.settings.namespace, queue=queue)

    def resume(self, queue: str | None = None) -> None:
        """Go on putting back."""
        if self._tracker is not None:
            self._ledger().resume(self.settings.namespace, queue=queue, moved=False)

    def reconcile(self) -> Mapping[str, Any]:
        """Make one reconciling pass now, if no leader does it already; returns what was done.

        Two looks a grace apart decide, so this takes some seconds. Raises StoreUnavailable.
        """
        if self._tracker is None or self._conninfo is None or self._tracker.client is None:
            return {}
        from jobguard.reconciler.service import run_once

        address = self._tracker.source.address
        return run_once(self.settings, self._conninfo, {address: self._tracker.client})

    def connect(self) -> None:
        """Reach Postgres now. Raises StoreUnavailable or one of its kinds if it cannot be used."""
        if self._tracker is not None:
            self._tracker.connect()

    def close(self) -> None:
        """Write what still waits to be written, and take the hooks out of the library again."""
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        self.inert = "closed"
        unregister(cast(Tracker, tracker))
        _guards.pop(tracker.source.id, None)
        if self._adapter is not None:
            self._adapter.uninstall(cast(Tracker, tracker))
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

    def _ledger(self) -> Ledger:
        from jobguard.store.ledger import PostgresLedger

        assert self._conninfo is not None
        return PostgresLedger(self._conninfo)


_guards: dict[int, JobGuard] = {}


def guard(
    target: object, *, postgres: Postgres = None, namespace: str | None = None, **settings: Any
) -> JobGuard:
    """Guard a queue: from now on every job is recorded in Postgres before it goes to Redis.

    ``target`` is an ``rq.Queue``, a list of them, or a ``redis.Redis`` (every RQ queue on it); it is
    used as before. ``postgres`` is a URL, a mapping or a callable that returns one; without it,
    ``JOBGUARD_POSTGRES_URL`` or ``DATABASE_URL``. Other arguments are the fields of
    ``jobguard.settings.Settings``; each also has the variable ``JOBGUARD_<NAME>``.

    Nothing is connected to. The same call again changes nothing.

    Raises UnsupportedTarget, ConfigurationError, or ConflictingGuard if the source is already
    guarded with other settings; with ``connect="require"`` also StoreUnavailable.
    """
    chosen = settings_from({**settings, "namespace": namespace})
    if disabled():
        say("guard_inert", reason="JOBGUARD_DISABLED is set")
        return JobGuard(chosen, inert="JOBGUARD_DISABLED is set")
    adapter, guarded = _recognised(target, chosen)
    if guarded.inert is not None or guarded.client is None:
        reason = guarded.inert or "a test double"
        say("guard_inert", reason=reason)
        return JobGuard(chosen, inert=reason)
    conninfo = postgres_conninfo(postgres)
    existing = _guards.get(guarded.source.id)
    if existing is not None:
        return _same(existing, chosen, conninfo, guarded)
    tracker = _tracker(guarded, chosen, conninfo)
    adapter.install(cast(Tracker, tracker))
    register(cast(Tracker, tracker))
    made = JobGuard(chosen, tracker=tracker, adapter=adapter, conninfo=conninfo)
    _guards[guarded.source.id] = made
    say(
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


def _tracker(guarded: Guarded, settings: Settings, conninfo: Callable[[], str]) -> HostTracker:
    # Imported here for their weight: a process that guards nothing never pays for them.
    from jobguard.tracker import HostTracker

    def store() -> Any:
        from jobguard.store.postgres import PostgresStore

        return PostgresStore(conninfo, settings)

    def client() -> Any:
        from jobguard.clients import own_client

        assert guarded.client is not None
        return own_client(guarded.client(), timeout=settings.redis_timeout)

    return HostTracker(guarded.source, settings, store, queues=guarded.queues, client=client)


def _same(
    existing: JobGuard, settings: Settings, conninfo: Callable[[], str], guarded: Guarded
) -> JobGuard:
    differences = [
        f"{f.name} is {getattr(existing.settings, f.name)!r}, now {getattr(settings, f.name)!r}"
        for f in fields(Settings)
        if getattr(existing.settings, f.name) != getattr(settings, f.name)
    ]
    assert existing._conninfo is not None and existing._tracker is not None
    was, now = describe(existing._conninfo()), describe(conninfo())
    if was != now:
        differences.append(f"postgres is {was}, now {now}")
    if differences:
        raise ConflictingGuard(
            f"{guarded.source} is already guarded with other settings: {'; '.join(differences)}"
        )
    existing._tracker.guard_also(guarded.queues)
    return existing


def _recognised(target: object, settings: Settings) -> tuple[Adapter, Guarded]:
    tried = []
    for entry in _adapters_for(target):
        try:
            adapter: Adapter = entry.load()()
        except ImportError as error:
            tried.append(f"{entry.name} ({error})")
            continue
        tried.append(entry.name)
        guarded = adapter.sources(target, namespace=settings.namespace, name=settings.source)
        if guarded is not None:
            return adapter, guarded
    kind = f"{type(target).__module__}.{type(target).__qualname__}"
    raise UnsupportedTarget(
        f"cannot guard a {kind}: give an rq.Queue, a list of them, or a redis.Redis "
        f"(adapters tried: {', '.join(tried) or 'none installed'})"
    )


def _adapters_for(target: object) -> Iterator[EntryPoint]:
    """The adapter whose library the target is made of comes first; no other library is imported for it."""
    found = {entry.name: entry for entry in entry_points(group="jobguard.adapters")}
    roots = [kind.__module__.split(".")[0] for kind in type(target).__mro__]
    named = [name for name in found if name in roots]
    for name in named or found:
        yield found[name]


def _resolve_worker(target: object) -> Tracker | None:
    """A worker whose process never called guard() is guarded by what its environment says."""
    try:
        made = guard(target)
    except (ConfigurationError, UnsupportedTarget, ConflictingGuard) as error:
        say("guard_refused", error=str(error))
        return None
    return cast(Tracker, made._tracker) if made._tracker is not None else None


on_unguarded_worker(_resolve_worker)


@atexit.register
def _at_exit() -> None:
    for made in list(_guards.values()):
        if made._tracker is not None:
            made._tracker.close()
