"""Adapter for Dramatiq: check a target, and install the hooks on it.

This module can be imported without Dramatiq, because a reconciler needs only the broker.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any
from uuid import UUID

import redis

from jobguard.adapter import Advice, Broker, Guarded, Source, Tracker
from jobguard.adapters.dramatiq.envelope import UnknownEnvelope, arguments_in, decode
from jobguard.adapters.dramatiq.layout import Layout
from jobguard.clients import address_of, is_test_double, own_client, waits_forever
from jobguard.errors import UnsupportedTarget

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dramatiq.brokers.redis import RedisBroker

LIBRARY = "dramatiq"
CLIENT_TIMEOUT = 1.0
"""Longest time in seconds that our own client waits for Redis."""


class DramatiqAdapter:
    """Guard a RedisBroker of Dramatiq with all its queues."""

    library = LIBRARY

    def sources(self, target: object, *, namespace: str, name: str | None) -> Guarded | None:
        """Return how a RedisBroker is guarded; refuse other brokers, and mark test doubles as inert."""
        if importlib.util.find_spec("dramatiq") is None:
            return None
        if not isinstance(target, importlib.import_module("dramatiq.broker").Broker):
            return None
        if isinstance(target, importlib.import_module("dramatiq.brokers.stub").StubBroker):
            return _inert(namespace, name, "a StubBroker keeps its messages in this process")
        if not isinstance(target, importlib.import_module("dramatiq.brokers.redis").RedisBroker):
            raise UnsupportedTarget(
                f"a {type(target).__name__} cannot be guarded: its messages are not in Redis, where "
                "jobguard could see that they are lost. Guard a dramatiq RedisBroker instead; with "
                "RabbitMQ declare quorum queues, which are durable by themselves."
            )
        return _guarded(target, namespace=namespace, name=name)

    def install(self, tracker: Tracker, target: object) -> None:
        """Install the hooks on this broker; raise UnsupportedTarget if this Dramatiq is unknown."""
        importlib.import_module("jobguard.adapters.dramatiq.patches").install(tracker, target)

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
        """Send a message of an actor, or of the actor of a name; see Adapter."""
        broker: Any = target
        actor: Any = broker.get_actor(task) if isinstance(task, str) else task
        if not hasattr(actor, "message_with_options"):
            raise UnsupportedTarget(f"{task!r} is no Dramatiq actor, and no name of one")
        message = actor.message_with_options(args=tuple(args), kwargs=dict(kwargs))
        if queue is not None:
            message = message.copy(queue_name=queue)
        sent = broker.enqueue(message, delay=int(delay * 1000) if delay else None)
        return str(message.message_id), sent

    def uninstall(self, tracker: Tracker, deferred: object = None) -> bool:
        """Remove the hooks from every broker of this tracker."""
        importlib.import_module("jobguard.adapters.dramatiq.patches").uninstall(tracker)
        return True

    def prepare_worker(self) -> None:
        """Guard the broker of a worker whose modules call no guard(): ``jobguard run -- dramatiq``."""
        importlib.import_module("jobguard.adapters.dramatiq.patches").guard_workers()

    def task_of(self, task: object) -> tuple[str, str | None]:
        """Return the name and the queue of an actor."""
        if not isinstance(task, importlib.import_module("dramatiq").Actor):
            raise TypeError(f"{task!r} is no actor of Dramatiq")
        found: Any = task
        return str(found.actor_name), str(found.queue_name)

    def advice(self, target: object) -> Sequence[Advice]:
        """Return the settings of this broker that block a producer or lose a message."""
        broker: Any = target
        found = []
        if waits_forever(broker.client):
            found.append(
                Advice(
                    "the client of the broker has no socket_timeout",
                    "while Redis is frozen, send waits until it answers",
                    "RedisBroker(url=…, socket_timeout=5, socket_connect_timeout=5)",
                )
            )
        if not any(type(one).__name__ == "Retries" for one in broker.middleware):
            found.append(
                Advice(
                    "the middleware Retries is missing",
                    "an actor that raises, also at a shutdown, loses its message",
                    "broker.add_middleware(dramatiq.middleware.Retries())",
                )
            )
        return found

    def broker(self, source: Source, client: redis.Redis) -> Broker:
        """Return the reconciler's view of a source."""
        # Imported here: a producer needs no broker.
        from jobguard.adapters.dramatiq.broker import DramatiqBroker

        return DramatiqBroker(source, client)

    def renew(self, envelope: bytes, token: UUID) -> bytes:
        """Return the envelope of a job that a person requeued; raise ValueError if that is impossible."""
        try:
            return decode(envelope).renewed(token).encode()
        except UnknownEnvelope as error:
            raise ValueError(str(error)) from error

    def arguments(self, envelope: bytes) -> Mapping[str, Any]:
        """Return args and kwargs of a job, if they are JSON. Raise ValueError."""
        try:
            return arguments_in(envelope)
        except (UnknownEnvelope, TypeError, KeyError, IndexError) as error:
            raise ValueError(str(error)) from error


def _guarded(target: RedisBroker, *, namespace: str, name: str | None) -> Guarded:
    client: Any = target.client
    if is_test_double(client):
        return _inert(namespace, name, "fakeredis keeps nothing that could be lost")
    if not isinstance(client, redis.Redis):
        raise UnsupportedTarget(
            f"Dramatiq on a {type(client).__name__} cannot be guarded: give the broker a redis.Redis "
            "(standalone or Sentinel)."
        )
    if client.connection_pool.connection_kwargs.get("decode_responses"):
        raise UnsupportedTarget(
            "this Redis client has decode_responses=True, with which Dramatiq's own workers cannot "
            "read messages: give the broker a client without it."
        )
    prefix = Layout(target.namespace).prefix
    source = Source(
        namespace,
        LIBRARY,
        address_of(client),
        prefix,
        name,
        one_body=False,
        serializer=_encoder(),
    )
    return Guarded(source, None, lambda: own_client(client, timeout=CLIENT_TIMEOUT))


def _encoder() -> str:
    """Return "json" for Dramatiq's own encoder, else the name of the application's encoder."""
    encoder = importlib.import_module("dramatiq").get_encoder()
    return "json" if type(encoder).__name__ == "JSONEncoder" else type(encoder).__name__


def _inert(namespace: str, name: str | None, why: str) -> Guarded:
    source = Source(namespace, LIBRARY, "inert", name=name, one_body=False)
    return Guarded(source, frozenset(), None, inert=why)
