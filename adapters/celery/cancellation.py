"""Hooks on every way that a person cancels tasks: first the tombstone in the ledger, then Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

import redis
from celery.app.control import Control
from kombu.transport.redis import Channel

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.connection import broker_address_of, client_of
from jobguard.adapters.celery.envelope import token_in
from jobguard.adapters.celery.scan import messages_in, taken
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import contain_errors
from jobguard.patching import Hooks

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

Hook = Callable[..., Any]

_A_CALL = 5_000
_NOT_TASKS = (".celery.pidbox", "celeryev.")
"""The suffix of reply queues and the prefix of event queues."""


def put_on(hooks: Hooks) -> None:
    """Put the hooks on. Every purge or deletion of a queue goes through its channel."""
    hooks.put(Control, "broadcast", broadcast)
    hooks.put(Channel, "queue_purge", queue_purge)
    hooks.put(Channel, "_delete", delete)


def broadcast(original: Hook) -> Hook:
    """Control.broadcast: every revoke ends here, of the program and of the command ``celery control``.

    A revoke for some workers only concerns those workers, and is not recorded.
    """

    @wraps(original)
    def hook(
        self: Any,
        command: str,
        arguments: Any = None,
        destination: Any = None,
        *args: Any,
        pattern: Any = None,
        **options: Any,
    ) -> Any:
        with contain_errors("record a revoke", let_pass=StoreUnavailable):
            record = _RECORDS.get(command)
            tracker = lookup.tracker_for(self.app) if record is not None else None
            if record is not None and tracker is not None and not (destination or pattern):
                record(tracker, self.app, {**(arguments or {}), **options})
        if pattern is not None:
            options["pattern"] = pattern
        return original(self, command, arguments, destination, *args, **options)

    return hook


def _revoke(tracker: Tracker, _: Any, arguments: Mapping[str, Any]) -> None:
    ids = arguments.get("task_id") or ()
    several = ids if isinstance(ids, list | tuple | set) else [ids]
    if several:
        tracker.cancel(job_ids=[str(id) for id in several])


def _revoke_stamped(tracker: Tracker, app: Any, arguments: Mapping[str, Any]) -> None:
    """Cancel what has these stamps: the ledger has no stamps, so read the messages in Redis."""
    headers = arguments.get("headers")
    if isinstance(headers, list):  # from the command line, as a worker reads it
        headers = dict(text.split("=", 1) for text in headers)
    if isinstance(headers, Mapping):
        for tokens in _chunks(_stamped(app, headers)):
            tracker.cancel(tokens=tokens)


_RECORDS: Mapping[str, Callable[[Tracker, Any, Mapping[str, Any]], None]] = {
    "revoke": _revoke,
    "terminate": _revoke,
    "revoke_by_stamped_headers": _revoke_stamped,
}


def queue_purge(original: Hook) -> Hook:
    """Channel.queue_purge: ``celery purge``, ``control.purge`` and its other name, discard_all.

    As in Celery, messages that workers have already taken are not touched.
    """

    @wraps(original)
    def hook(self: Any, queue: str, *args: Any, **kwargs: Any) -> Any:
        _drop(self, queue)
        return original(self, queue, *args, **kwargs)

    return hook


def delete(original: Hook) -> Hook:
    """Channel._delete: the messages go with the queue. Reply queues come and go, without any tasks.

    ``queue_delete`` calls it only if it deletes: not with ``if_empty`` and a message in the queue, and not
    if the process has not declared the queue.
    """

    @wraps(original)
    def hook(self: Any, queue: str, *args: Any, **kwargs: Any) -> Any:
        if not (queue.endswith(_NOT_TASKS[0]) or queue.startswith(_NOT_TASKS[1])):
            _drop(self, queue)
        return original(self, queue, *args, **kwargs)

    return hook


def _drop(channel: Any, queue: str) -> None:
    if queue in channel._fanout_queues:
        return  # its messages are published, and are not stored in Redis
    with contain_errors("record a purge", let_pass=StoreUnavailable):
        connection = channel.connection.client
        broker_address = broker_address_of(connection)
        for tracker in lookup.trackers_at(connection):
            if broker_address is None or not tracker.guards(queue):
                continue
            client = redis.Redis(
                connection_pool=channel.pool
            )  # kombu's own client would not prefix all keys
            raws = messages_in(client, broker_address.layout.lists_of([queue]))
            for tokens in _chunks(_tokens(raws)):
                tracker.cancel(tokens=tokens)


def _tokens(raws: Iterable[bytes]) -> Iterator[UUID]:
    for raw in raws:
        token = token_in(raw)
        if token is not None:
            yield UUID(hex=token.decode())


def _stamped(app: Any, headers: Mapping[str, Any]) -> Iterator[UUID]:
    """Yield the deliveries that have one of these stamps, compared as a worker would compare them."""
    connection = app.connection_for_write()
    broker_address = broker_address_of(connection)
    if broker_address is None:
        return
    client, layout = client_of(connection), broker_address.layout
    waiting = messages_in(client, layout.lists_of(list(app.amqp.queues)))
    for raw in (*waiting, *taken(client, layout.unacked)):
        if b'"stamps"' not in raw:
            continue
        message = json.loads(raw)
        message = message[0] if isinstance(message, list) else message
        stamps = message["headers"].get("stamps") or {}
        if any(_overlap(stamps.get(name), wanted) for name, wanted in headers.items()):
            yield from _tokens([raw])


def _overlap(stamp: Any, wanted: Any) -> bool:
    return bool(_values(stamp) & _values(wanted))


def _values(value: Any) -> set[str]:
    several = value if isinstance(value, list | tuple | set | frozenset) else [value]
    return {str(one) for one in several if one is not None}


def _chunks(tokens: Iterable[UUID]) -> Iterator[list[UUID]]:
    chunk: list[UUID] = []
    for token in tokens:
        chunk.append(token)
        if len(chunk) == _A_CALL:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
