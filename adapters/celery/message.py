"""A message in its final form in Redis, its queue, and its delivery, all made before the push.

The anonymous exchange, which is Celery's default, names the queue. Any other exchange is a table in
Redis. That table is lost with Redis, while every producer assumes that it has declared it: kombu then
drops the message without an error. So the queues that this app itself knows count as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.transport.virtual.exchange import STANDARD_EXCHANGE_TYPES, DirectExchange, TopicExchange
from kombu.utils.encoding import str_to_bytes
from kombu.utils.json import dumps

from jobguard.adapters.celery.connection import offline_channel
from jobguard.adapters.celery.envelope import DEAD, PART, TOKEN, WORKER, Routing, encode
from jobguard.errors import is_host_interrupt
from jobguard.job_keys import rule_of
from jobguard.model import Delivery
from jobguard.tracing import current_trace

if TYPE_CHECKING:
    from jobguard.model import Parent


@dataclass(frozen=True, slots=True)
class Target:
    """The one queue that a message goes to, and the exchange that leads there."""

    queue: str
    exchange: str = ""
    routing_key: str = ""
    binding: str = ""


@dataclass(slots=True)
class Wire:
    """A message, serialised and compressed, with all that the library sends with it."""

    app: Any
    connection: Any
    task: Mapping[str, Any]
    """The mapping with the task's id, name and times: the headers, or with protocol 1 the body."""
    data: Any
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    priority: int | None = 0
    offline: Any = field(init=False, repr=False)
    """A channel that prepares the message as a real one does."""

    def __post_init__(self) -> None:
        self.offline = offline_channel(self.connection)

    @property
    def job_id(self) -> str:
        """The task's id."""
        return str(self.task["id"])

    @property
    def in_base64(self) -> bool:
        """Return True if the body is base64 in Redis: a transport option can change that."""
        return bool(self.offline.body_encoding == "base64")

    def delivery(
        self,
        token: UUID,
        target: Target,
        *,
        parent: Parent | None = None,
        derived: bool = False,
        closes: str | None = None,
    ) -> Delivery:
        """Return the record of this message, sent as this delivery to this queue."""
        for name in (TOKEN, WORKER, PART, DEAD):  # a retry inherits them; ours stands last
            self.headers.pop(name, None)
        self.headers[TOKEN] = token.hex
        offline = self.offline
        message = offline.prepare_message(
            self.data,
            self.priority,
            self.content_type,
            self.content_encoding,
            dict(self.headers),
            {**self.properties, "delivery_info": {}},
        )
        offline._inplace_augment_message(
            message, target.exchange, target.routing_key or target.queue
        )
        message["properties"]["delivery_tag"] = str(token)
        urgency = offline._get_message_priority(message, reverse=False)
        routing = Routing(target.queue, offline.priority(urgency), target.exchange, target.binding)
        return Delivery(
            token=token,
            job_id=self.job_id,
            queue=target.queue,
            task=str(self.task.get("task") or ""),
            envelope=encode(routing, str_to_bytes(dumps(message))),
            priority=urgency,
            attempt=int(self.task.get("retries") or 0) + 1,
            due_at=_epoch(self.app, self.task.get("eta")),
            # The worker must revoke an expired task, because it informs the result and the chord.
            expires_at=None,
            trace=current_trace(),
            parent=parent,
            fresh=True,
            derived=derived,
            closes=closes,
            rule=rule_of(self.headers),
        )


def describe(
    app: Any,
    headers: Mapping[str, Any],
    body: Any,
    content_type: str,
    content_encoding: str,
    properties: Mapping[str, Any],
    *,
    queue: str,
    priority: int,
    token: UUID,
    task: Mapping[str, Any] | None = None,
) -> Delivery:
    """Return the record of a message that a worker took and that was not recorded.

    ``task``: the mapping with the task's id and name, if these are not the headers.
    """
    info = properties.get("delivery_info") or {}
    wire = Wire(
        app=app,
        connection=app.connection_for_write(),
        task=headers if task is None else task,
        data=body,
        content_type=content_type,
        content_encoding=content_encoding,
        headers=dict(headers),
        properties={k: v for k, v in properties.items() if k not in _CHANNELS_OWN},
        priority=priority,
    )
    exchange = str(info.get("exchange") or "")
    key = str(info.get("routing_key") or queue) if exchange else queue
    return wire.delivery(token, Target(queue, exchange, key))


_CHANNELS_OWN = ("delivery_info", "delivery_tag", "body_encoding")


def _epoch(app: Any, when: Any) -> float | None:
    """Return this time as the worker will read it; None stands for at once, or never."""
    if not when:
        return None
    try:
        aware: datetime = maybe_make_aware(maybe_iso8601(when), app.conf.timezone)
        return aware.timestamp()
    except (TypeError, ValueError, OverflowError):
        return None  # the worker will refuse it, and log that


def target_of(
    app: Any,
    exchange: Any,
    routing_key: str | None,
    *,
    exchange_type: str | None,
    declare: Any,
    channel: Any,
) -> Target | None:
    """Return the only queue of such a message; None for no queue, for several, or for a fanout.

    ``channel``: the channel to ask; None if Redis is away.
    """
    name = str(getattr(exchange, "name", exchange) or "")
    if not name:
        return Target(str(routing_key or "")) if routing_key else None
    # For kombu, an exchange that this process did not declare is a direct one. So the queues of the
    # application count if they are bound to a direct exchange, and Redis learns of them again. Messages
    # to other undeclared exchanges are routed as kombu routes them.
    declared = channel is None or name in channel.state.exchanges
    known = [
        queue
        for queue in (*(declare or ()), *app.amqp.queues.values())
        if getattr(getattr(queue, "exchange", None), "name", None) == name
        and (declared or queue in (declare or ()) or queue.exchange.type == "direct")
    ]
    kinds = [exchange_type, getattr(exchange, "type", None), *(q.exchange.type for q in known)]
    if next((kind for kind in kinds if kind), "direct") == "fanout":
        return None
    key = str(routing_key or "")
    ours = {row[2]: row for queue in known for row in _rows(queue) if _matches(row, key)}
    if channel is not None and known and name not in channel.state.exchanges:
        known[0].exchange.bind(
            channel
        ).declare()  # kombu needs the type to find the queue; stays in this process
    there = set(ours) if channel is None else _asked(channel, name, key, ours)
    if len(there) != 1:
        return None
    (queue,) = there
    binding = channel.sep.join(ours[queue]) if queue in ours and channel is not None else ""
    return Target(queue, name, key, binding)


def _asked(
    channel: Any, exchange: str, key: str, ours: dict[str, tuple[str, str, str]]
) -> set[str]:
    """Return the queues that Redis has for this key, after a repair of our own queues' bindings."""
    try:
        there = set(channel._lookup(exchange, key))
    except Exception as error:  # a kombu before 5.5 raises if the table is gone
        if is_host_interrupt(error):
            raise
        there = set()
    for queue, (row_key, pattern, _) in ours.items():
        if queue not in there:
            channel._queue_bind(exchange, row_key, pattern or None, queue)
            there.add(queue)
    return there - {None, ""}


def _rows(queue: Any) -> Iterator[tuple[str, str, str]]:
    """Return the rows of an exchange's table that lead to a queue."""
    kind: Any = STANDARD_EXCHANGE_TYPES.get(queue.exchange.type, DirectExchange)
    for key in (queue.routing_key, *(bound.routing_key for bound in queue.bindings or ())):
        row = kind(None).prepare_bind(queue.name, queue.exchange.name, key or "", None)
        yield (row[0] or "", row[1] or "", row[2])


def _matches(row: tuple[str, str, str], key: str) -> bool:
    if row[1]:
        return bool(TopicExchange(None)._match(row[1], key))
    return row[0] == key
