"""The entry point of the RQ adapter: which targets can be guarded, and how the hooks are installed.

This module can be imported without RQ, because a reconciler needs only the broker.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import redis

from jobguard.adapter import Advice, Broker, Guarded, Source, Tracker
from jobguard.adapters.rq.envelope import UnknownEnvelope, arguments_in
from jobguard.clients import address_of, is_test_double, own_client, waits_forever
from jobguard.errors import UnsupportedTarget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rq.queue import Queue

LIBRARY = "rq"
CLIENT_TIMEOUT = 1.0
"""The longest time, in seconds, that jobguard's own Redis client waits for an answer."""


@dataclass(frozen=True, slots=True)
class AllQueues:
    """A target: all queues of this class on a Redis. The class and its job class name their keys."""

    connection: redis.Redis
    queue_class: type[Queue]


class RQAdapter:
    """Guard RQ queues."""

    library = LIBRARY

    def sources(self, target: object, *, namespace: str, name: str | None) -> Guarded | None:
        """Return the source and the queues of a target: a Queue, a list of Queues, or a whole Redis."""
        if importlib.util.find_spec("rq") is None:
            return None
        if is_test_double(target):
            return _inert(namespace, name, "fakeredis stores nothing that can be lost")
        if (whole := _whole(target)) is not None:
            queue_class = [whole.queue_class]
            return _guarded(whole.connection, queue_class, None, namespace=namespace, name=name)
        queues = _queues(target)
        if not queues:
            return None
        queues = [queue for queue in queues if queue._is_async]
        if not queues:
            return _inert(namespace, name, "is_async=False runs each job at once, in the caller")
        names = frozenset(queue.name for queue in queues)
        return _guarded(queues[0].connection, queues, names, namespace=namespace, name=name)

    def install(self, tracker: Tracker, target: object) -> None:
        """Install the hooks on RQ's classes; raise UnsupportedTarget for an unknown version of RQ.

        Raises ConflictingGuard for a queue that is guarded already as another source.
        """
        names = {queue.name for queue in _queues(target)}
        importlib.import_module("jobguard.adapters.rq.lookup").check_overlap(tracker, names)
        importlib.import_module("jobguard.adapters.rq.patches").install(tracker.source.id)

    def send(
        self,
        target: object,
        task: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        delay: float | None,
        queue: str | None,
    ) -> tuple[str, Any]:
        """Enqueue a function on a queue of the target; see Adapter."""
        queues = _queues(target)
        whole = _whole(target) or AllQueues(queues[0].connection, _queue_class())
        chosen = next((one for one in queues if queue in (None, one.name)), None)
        if chosen is None:
            chosen = whole.queue_class(queue or "default", connection=whole.connection)
        call = {"args": tuple(args), "kwargs": dict(kwargs)}
        if delay:
            job = chosen.enqueue_in(timedelta(seconds=delay), task, **call)
        else:
            job = chosen.enqueue(task, **call)
        return job.id, job

    def uninstall(self, tracker: Tracker, deferred: object = None) -> bool:
        """Remove the hooks when the last guard is removed."""
        importlib.import_module("jobguard.adapters.rq.patches").uninstall(tracker.source.id)
        return True

    def prepare_worker(self) -> None:
        """Hook RQ in a process that does not call guard(): ``jobguard run -- rq worker``."""
        importlib.import_module("jobguard.adapters.rq.patches").install("jobguard run")
        importlib.import_module("jobguard.adapters.rq.lookup").guard_all_by_environment()

    def task_of(self, task: object) -> tuple[str, str | None]:
        """Return the import path of a function. A function of RQ names no queue."""
        name = getattr(task, "__qualname__", "<none>")
        if "<" in name:  # a lambda, or a function inside of another one
            raise TypeError(f"{task!r} is no function that a worker of RQ can import")
        return f"{task.__module__}.{name}", None

    def advice(self, target: object) -> Sequence[Advice]:
        """Return the settings of these queues that block a producer or hide a job."""
        clients = {id(queue.connection): queue.connection for queue in _queues(target)}
        if (whole := _whole(target)) is not None:
            clients = {id(whole.connection): whole.connection}
        return [
            Advice(
                "the client of the queue has no socket_timeout",
                "while Redis is frozen, enqueue waits until it answers",
                "redis.Redis(…, socket_timeout=5, socket_connect_timeout=5)",
            )
            for client in clients.values()
            if waits_forever(client)
        ]

    def broker(self, source: Source, client: redis.Redis) -> Broker:
        """Return the reconciler's view of a source."""
        # Imported here: a producer needs no broker.
        from jobguard.adapters.rq.broker import RQBroker

        return RQBroker(source, client)

    def arguments(self, envelope: bytes) -> Mapping[str, Any]:
        """Return args and kwargs of a job, if they are JSON. Raise ValueError."""
        try:
            return arguments_in(envelope)
        except (UnknownEnvelope, TypeError, KeyError, IndexError) as error:
            raise ValueError(str(error)) from error


def _queue_class() -> type[Queue]:
    kind: type[Queue] = importlib.import_module("rq.queue").Queue
    return kind


def _whole(target: object) -> AllQueues | None:
    """Return the target if it is a whole Redis."""
    if isinstance(target, redis.Redis):
        return AllQueues(target, _queue_class())
    return target if isinstance(target, AllQueues) else None


def _queues(target: object) -> list[Queue]:
    """Return the queues of a target; an empty list if the target does not belong to RQ."""
    kind = _queue_class()
    several: list[Any] = list(target) if isinstance(target, list | tuple) else [target]
    return several if all(isinstance(one, kind) for one in several) else []


def _guarded(
    connection: Any,
    queues: Sequence[Any],
    names: frozenset[str] | None,
    *,
    namespace: str,
    name: str | None,
) -> Guarded:
    prefix_for = importlib.import_module("jobguard.adapters.rq.lookup").prefix_for
    if is_test_double(connection):
        return _inert(namespace, name, "fakeredis stores nothing that can be lost")
    if not isinstance(connection, redis.Redis):
        raise UnsupportedTarget(
            f"RQ on a {type(connection).__name__} cannot be guarded: use a redis.Redis "
            "(standalone or Sentinel)."
        )
    if connection.connection_pool.connection_kwargs.get("decode_responses"):
        raise UnsupportedTarget(
            "this Redis client has decode_responses=True, and with it RQ's own workers cannot read "
            "jobs: give the queue a client without it."
        )
    places = {
        (address_of(getattr(queue, "connection", connection)), prefix_for(queue, queue.job_class))
        for queue in queues
    }
    if len(places) != 1:
        raise UnsupportedTarget(
            "these queues are on more than one Redis or key prefix: call guard() once for each."
        )
    ((address, prefix),) = places
    serializer = _serializer_of(queues)
    source = Source(namespace, LIBRARY, address, prefix, name, serializer=serializer)
    return Guarded(source, names, lambda: own_client(connection, timeout=CLIENT_TIMEOUT))


def _serializer_of(queues: Sequence[Any]) -> str:
    """Return the name of the serializer of these queues; empty if they have none, or several."""
    serializers = importlib.import_module("rq.serializers")
    usual = {serializers.DefaultSerializer: "pickle", serializers.JSONSerializer: "json"}
    used = {getattr(queue, "serializer", None) for queue in queues}
    (one,) = used if len(used) == 1 else (None,)
    if one is None:
        return ""
    return usual.get(one) or str(getattr(one, "__qualname__", None) or type(one).__qualname__)


def _inert(namespace: str, name: str | None, why: str) -> Guarded:
    source = Source(namespace, LIBRARY, "inert", name=name)
    return Guarded(source, frozenset(), None, inert=why)
