"""The Celery adapter's entry point: which targets it accepts, and how it installs a guard.

This module imports without Celery, because a reconciler needs only the broker.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobguard.adapter import Advice, Broker, DeferredTarget, Guarded, Source, Tracker
from jobguard.adapters.celery.envelope import UnknownEnvelope, arguments_in, renewed
from jobguard.errors import UnsupportedTarget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import redis

LIBRARY = "celery"

_IN_MEMORY = "kombu.transport.memory"
_INSTEAD = {
    "kombu.transport.pyamqp": "RabbitMQ keeps its messages itself: jobguard guards Celery on Redis only.",
    "kombu.transport.librabbitmq": (
        "RabbitMQ keeps its messages itself: jobguard guards Celery on Redis only."
    ),
}


class CeleryAdapter:
    """Guard a Celery app."""

    library = LIBRARY

    def sources(
        self, target: object, *, namespace: str, name: str | None
    ) -> Guarded | DeferredTarget | None:
        """Return what the guard of this app covers; a deferred target while the app is not configured."""
        if importlib.util.find_spec("celery") is None:
            return None
        celery = importlib.import_module("celery")
        if not isinstance(target, celery.Celery):
            return None
        lookup = importlib.import_module("jobguard.adapters.celery.lookup")
        app = lookup.real(target)
        eager = lookup.eager_because(app) if app.configured else None
        if app.configured and eager is None:
            return _guarded(app, namespace, name)
        patches = importlib.import_module("jobguard.adapters.celery.patches")
        return DeferredTarget(
            when=lambda callback: patches.wait(app, callback),
            resolve=lambda: lookup.resolve_config(app),
            inert=eager,
        )

    def install(self, tracker: Tracker, target: object) -> None:
        """Connect this app to this tracker. Raise UnsupportedTarget if this Celery is not supported."""
        importlib.import_module("jobguard.adapters.celery.patches").install(tracker, target)

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
        """Send a task of the app, or the task of a name; see Adapter."""
        app: Any = target
        how: dict[str, Any] = {"countdown": delay or None, "queue": queue}
        if isinstance(task, str):
            sent = app.send_task(task, tuple(args), dict(kwargs), **how)
        elif hasattr(task, "apply_async"):
            sent = task.apply_async(tuple(args), dict(kwargs), **how)
        else:
            raise UnsupportedTarget(f"{task!r} is no Celery task, and no name of one")
        return str(sent.id), sent

    def uninstall(self, tracker: Tracker, deferred: object = None) -> bool:
        """Disconnect one or several apps from this tracker; see Adapter. Remove the hooks with the last."""
        patches = importlib.import_module("jobguard.adapters.celery.patches")
        return bool(patches.uninstall(tracker, deferred))

    def prepare_worker(self) -> None:
        """Guard workers and beats whose app calls no guard(): ``jobguard run -- celery worker``."""
        importlib.import_module("jobguard.adapters.celery.patches").prepare()

    def task_of(self, task: object) -> tuple[str, str | None]:
        """Return the name of a task of Celery, and the queue to which its app sends it.

        A task that is routed to an exchange names no queue.
        """
        celery = importlib.import_module("celery.app.task")
        if not isinstance(task, celery.Task):
            raise TypeError(f"{task!r} is no task of Celery")
        found: Any = task
        queue = getattr(found, "queue", None)
        if queue is None:
            route = found.app.amqp.router.route({}, found.name, (), {}, task_type=found)
            queue = route.get("queue")
        return str(found.name), None if queue is None else str(getattr(queue, "name", queue))

    def advice(self, target: object) -> Sequence[Advice]:
        """Return the settings of this application that lose or double tasks, or block a producer."""
        app: Any = target
        conf = app.conf
        found = []
        if not conf.task_acks_late and (conf.task_ignore_result or not conf.result_backend):
            found.append(
                Advice(
                    "tasks are acknowledged before they run, and their results are not kept",
                    "the report of the worker is the only evidence of an end: of a worker that is killed "
                    "within ends_interval after a return, the task runs again",
                    'app.conf.task_acks_late = True, or jobguard.guard(app, ends="durable")',
                )
            )
        on_timeout = conf.get("task_acks_on_timeout")  # Celery before 5.7 does not know it
        if on_timeout is None:
            on_timeout = conf.task_acks_on_failure_or_timeout
        if conf.task_acks_late and on_timeout is False:
            found.append(
                Advice(
                    "task_acks_on_timeout, or task_acks_on_failure_or_timeout, is off",
                    "a task that exceeds its hard time limit is delivered again, without a limit",
                    "app.conf.task_acks_on_timeout = True (before Celery 5.7: "
                    "task_acks_on_failure_or_timeout)",
                )
            )
        options = conf.broker_transport_options or {}
        if options.get("socket_timeout") is None:
            found.append(
                Advice(
                    "the broker's transport has no socket_timeout",
                    "while Redis is frozen, delay and apply_async wait until it answers",
                    'app.conf.broker_transport_options = {"socket_timeout": 5}',
                )
            )
        seconds = options.get("visibility_timeout", 3600)
        if seconds < 600:
            found.append(
                Advice(
                    f"visibility_timeout is {seconds} s",
                    "a task with a later ETA, or one that runs longer with late acknowledgement, is "
                    "delivered to a second worker; an unguarded one runs it",
                    'app.conf.broker_transport_options = {"visibility_timeout": 3600}',
                )
            )
        if _counts_elsewhere(app):
            found.append(
                Advice(
                    "the results are in another Redis server than the tasks",
                    "a chord is counted there, where no leader can put its counters back: if that server "
                    "loses its data, chords that are under way never send their body",
                    "app.conf.result_backend = a URL of the broker's Redis server, with any db",
                )
            )
        return found

    def broker(self, source: Source, client: redis.Redis) -> Broker:
        """Return the reconciler's view of a source."""
        # Imported here: a producer needs no broker.
        from jobguard.adapters.celery.broker import CeleryBroker

        return CeleryBroker(source, client)

    def renew(self, envelope: bytes, token: UUID) -> bytes:
        """Return the envelope of a delivery that a person requeued. Raise ValueError if there is none."""
        try:
            return renewed(envelope)
        except (UnknownEnvelope, TypeError, KeyError) as error:
            raise ValueError(str(error)) from error

    def arguments(self, envelope: bytes) -> Mapping[str, Any]:
        """Return args and kwargs of a job, if they are JSON. Raise ValueError."""
        try:
            return arguments_in(envelope)
        except (UnknownEnvelope, TypeError, KeyError, IndexError) as error:
            raise ValueError(str(error)) from error


def _guarded(app: Any, namespace: str, name: str | None) -> Guarded:
    connection_module = importlib.import_module("jobguard.adapters.celery.connection")
    try:
        connection = app.connection_for_write()
        transport = connection.get_transport_cls()
        connection_module.check(connection)
    except (KeyError, ImportError) as error:
        raise UnsupportedTarget(
            f"this Celery's broker is not a Redis that kombu knows ({error}): use a redis://, "
            "rediss://, redis+socket:// or sentinel:// URL. Redis Cluster is not supported by kombu."
        ) from error
    if transport.__module__ == _IN_MEMORY:
        return _inert(namespace, name, "memory:// keeps nothing that could be lost")
    try:
        broker_address = connection_module.broker_address_of(connection)
    except ValueError as error:  # a Sentinel without a master name, a db that is no number
        raise UnsupportedTarget(f"this Celery's broker cannot be guarded: {error}") from error
    if broker_address is None:
        instead = _INSTEAD.get(transport.__module__, "jobguard guards Celery on Redis only.")
        raise UnsupportedTarget(
            f"this Celery's broker is {connection.transport_cls}://: {instead} Set broker_url to a "
            "redis:// URL, or take the guard away."
        )
    source = Source(
        namespace,
        LIBRARY,
        broker_address.address,
        broker_address.prefix,
        name,
        one_body=False,
        serializer=_accepted(app.conf.accept_content),
    )
    return Guarded(source, None, lambda: connection_module.client_of(connection))


def _counts_elsewhere(app: Any) -> bool:
    """Return True if Redis counts this app's chords, and it is not the Redis server of the broker."""
    backend = app.backend
    if not isinstance(backend, importlib.import_module("celery.backends.redis").RedisBackend):
        return False
    connection = importlib.import_module("jobguard.adapters.celery.connection")
    broker = connection.broker_address_of(app.connection_for_write())
    results = importlib.import_module("jobguard.adapters.celery.results")
    return broker is not None and results.results_of(backend, broker.address) is None


def _accepted(contents: Any) -> str:
    """Return "json" if workers accept JSON, else what they accept."""
    names = sorted(map(str, contents or ("json",)))
    return "json" if {"json", "application/json"} & set(names) else ",".join(names)


def _inert(namespace: str, name: str | None, why: str) -> Guarded:
    source = Source(namespace, LIBRARY, "inert", name=name, one_body=False)
    return Guarded(source, frozenset(), None, inert=why)
