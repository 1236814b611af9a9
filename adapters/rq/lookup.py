"""Find the tracker that guards a queue, job or worker. Most have none: that answer must be fast."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import rq.defaults
from rq.job import Job
from rq.queue import Queue

from jobguard.adapter import Tracker, second_guard
from jobguard.adapters.rq.adapter import AllQueues
from jobguard.adapters.rq.layout import Layout, prefix_of
from jobguard.clients import address_of
from jobguard.host_safety import contain_errors
from jobguard.registry import tracker_for_worker, trackers
from jobguard.same_redis import trackers_at

if TYPE_CHECKING:
    import redis

LIBRARY = "rq"
BASE: str = getattr(rq.defaults, "RQ_KEY_PREFIX", "rq")  # a constant of RQ before 3.0

_asked: set[tuple[str, str]] | None = None
"""The addresses and prefixes that the environment was asked for; None: this process uses only guard()."""


def guard_all_by_environment() -> None:
    """Guard every Redis of this process by the environment: ``jobguard run`` calls this."""
    global _asked
    _asked = set() if _asked is None else _asked


def prefix_for(queue_class: Any, job_class: Any) -> str:
    """Return the prefix of a source for these classes of RQ, or for objects with these attributes."""
    return prefix_of(
        BASE,
        job_class.redis_job_namespace_prefix,
        queue_class.redis_queue_namespace_prefix,
        queue_class.redis_queues_keys,
    )


def check_overlap(tracker: Tracker, names: Collection[str]) -> None:
    """Raise ConflictingGuard if an older guard has one of these queues; no names: all queues."""
    for other in trackers():
        one, it = other.source, tracker.source
        if one.id == it.id or (one.library, one.address, one.prefix) != (
            it.library,
            it.address,
            it.prefix,
        ):
            continue
        # Only a guard of a whole Redis guards a queue without a name.
        for name in sorted(names) or [""]:
            if other.guards(name):
                raise second_guard(f"the queue {name!r}" if name else "every queue", one, it)


def tracker_for_queue(queue: Queue) -> Tracker | None:
    """Return the tracker that guards this queue; None also if its jobs run in the caller."""
    if not queue._is_async or not (known := _known(queue.connection, queue)):
        return None
    with contain_errors("find the tracker of a queue", queue=queue.name):
        prefix = prefix_for(queue, queue.job_class)
        return next(
            (one for one in _with(known, queue.connection, prefix) if one.guards(queue.name)), None
        )
    return None


def tracker_for_job(job: Job) -> Tracker | None:
    """Return the tracker that guards this job's queue.

    A job does not know the class of its queue. If only a subclass of Queue uses another prefix, the
    job's own prefix decides.
    """
    return next(iter(trackers_for_job(job)), None) if job.origin else None


def trackers_for_job(job: Job) -> list[Tracker]:
    """Return the trackers that may have recorded this job: it knows no queue if it was made from its id."""
    if not (known := _known(job.connection)):
        return []
    with contain_errors("find the tracker of a job", job_id=job.id):
        return [
            tracker
            for tracker in _at(known, job.connection)
            if Layout.parse(tracker.source.prefix).job_prefix == job.redis_job_namespace_prefix
            and (not job.origin or tracker.guards(job.origin))
        ]
    return []


def tracker_for_registry(registry: Any) -> Tracker | None:
    """Return the tracker that guards the queue of one of RQ's registries."""
    if not (known := _known(registry.connection)):
        return None
    for tracker in _at(known, registry.connection):
        layout = Layout.parse(tracker.source.prefix)
        ours = layout.job_prefix == registry.job_class.redis_job_namespace_prefix
        if ours and tracker.guards(registry.name):
            return tracker
    return None


def tracker_for(worker: Any) -> Tracker | None:
    """Return the tracker of a worker's Redis; create it from the environment if there is none.

    Each namespace has a tracker. A worker reports to the one that guards the most of its queues.
    """
    with contain_errors("find the tracker of a worker", worker=worker.name):
        prefix = prefix_for(worker.queue_class, worker.job_class)
        found = _with(trackers(), worker.connection, prefix)
        if not found:
            return _by_environment(worker.connection, worker.queue_class, worker.job_class)
        return max(found, key=lambda one: sum(map(one.guards, worker.queue_names())))
    return None


def guarded_elsewhere(worker: Any, tracker: Tracker) -> list[str]:
    """Return the queues of a worker that another namespace guards, and not this tracker."""
    prefix = prefix_for(worker.queue_class, worker.job_class)
    others = [one for one in _with(trackers(), worker.connection, prefix) if one is not tracker]
    return [
        name
        for name in worker.queue_names()
        if not tracker.guards(name) and any(one.guards(name) for one in others)
    ]


def tracker_for_program(connection: Any) -> Tracker | None:
    """Return the tracker of an RQ program that enqueues; create it from the environment if needed."""
    with contain_errors("find the tracker of a program"):
        found = _with(trackers(), connection, prefix_for(Queue, Job))
        return found[0] if found else _by_environment(connection, Queue, Job)
    return None


def _known(connection: redis.Redis, queue: Queue | None = None) -> Any:
    """Return the trackers of this process, with the one that the environment gives this connection.

    The tracker is for the classes of the queue; without a queue, for those of RQ.
    """
    known = trackers()
    if _asked is None:
        return known
    with contain_errors("find the tracker of a connection"):
        classes = (Queue, Job) if queue is None else (type(queue), queue.job_class)
        place = address_of(connection), prefix_for(*classes)
        if place not in _asked:
            _asked.add(place)
            if not _with(known, connection, place[1]):
                _by_environment(connection, *classes)
                known = trackers()
    return known


def _by_environment(connection: redis.Redis, queue_class: Any, job_class: Any) -> Tracker | None:
    """Guard all queues of these classes on this Redis by the environment."""
    if queue_class.job_class is not job_class:
        queue_class = type(queue_class.__name__, (queue_class,), {"job_class": job_class})
    return tracker_for_worker(AllQueues(connection, queue_class))


def _with(known: Any, connection: redis.Redis, prefix: str) -> list[Tracker]:
    return [one for one in _at(known, connection) if one.source.prefix == prefix]


def _at(known: Any, connection: redis.Redis) -> list[Tracker]:
    ours = [tracker for tracker in known if tracker.source.library == LIBRARY]
    return trackers_at(ours, address_of(connection), lambda: connection)
