"""Which queue a message goes to, before it is sent there.

The anonymous exchange, which is Celery's default, names the queue. Any other is a table in Redis,
that is lost with Redis while every producer believes that it has declared it: kombu then publishes
into nothing, and says nothing. So what this app itself knows of its queues counts as well.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from kombu.transport.virtual.exchange import STANDARD_EXCHANGE_TYPES, DirectExchange, TopicExchange

from jobguard.adapters.celery.message import Target
from jobguard.errors import is_host_interrupt

log = logging.getLogger("jobguard")


def target_of(
    app: Any,
    exchange: Any,
    routing_key: str | None,
    *,
    exchange_type: str | None,
    declare: Any,
    channel: Any,
) -> Target | None:
    """Return the one queue that such a message goes to; None: to none, to several, or to everybody.

    ``channel``: to be asked; None: Redis is away.
    """
    name = str(getattr(exchange, "name", exchange) or "")
    if not name:
        return Target(str(routing_key or "")) if routing_key else None
    # An exchange that this process did not declare is a direct one for kombu. So its own queues count where
    # they are bound to a direct exchange, and Redis learns of them again; others stay as kombu has them.
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
        ).declare()  # by its type kombu finds the queue; stays in this process
    there = set(ours) if channel is None else _asked(channel, name, key, ours)
    if len(there) != 1:
        return None
    (queue,) = there
    binding = channel.sep.join(ours[queue]) if queue in ours and channel is not None else ""
    return Target(queue, name, key, binding)


def _asked(
    channel: Any, exchange: str, key: str, ours: dict[str, tuple[str, str, str]]
) -> set[str]:
    """Return where Redis says that it goes, once it knows of our own queues what it has forgotten."""
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
    """Return the rows of its exchange's table by which a queue is found."""
    kind: Any = STANDARD_EXCHANGE_TYPES.get(queue.exchange.type, DirectExchange)
    for key in (queue.routing_key, *(bound.routing_key for bound in queue.bindings or ())):
        row = kind(None).prepare_bind(queue.name, queue.exchange.name, key or "", None)
        yield (row[0] or "", row[1] or "", row[2])


def _matches(row: tuple[str, str, str], key: str) -> bool:
    if row[1]:
        return bool(TopicExchange(None)._match(row[1], key))
    return row[0] == key
