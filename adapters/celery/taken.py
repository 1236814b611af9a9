"""Which queue a message was taken from. Where an exchange has a name, the routing key does not tell.

A worker records what its producer could not: a message to several queues, or one of an unguarded
program. That record must name the queue that the worker consumes, or nobody brings it back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from kombu.transport.redis import Transport

from jobguard.adapters.celery import sessions
from jobguard.adapters.celery.header import QUEUE
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.wall import our_own_affair

Hook = Callable[..., Any]


def put_on(hooks: Hooks) -> None:
    """Hear of each message and its queue."""
    hooks.put(Transport, "_deliver", deliver)


def deliver(original: Hook) -> Hook:
    """Transport._deliver: a message was taken from a queue."""

    @wraps(original)
    def hook(self: Any, message: Any, queue: Any) -> Any:
        with our_own_affair("note the queue of a message"):
            if sessions.is_worker():
                _note(message, queue)
        return original(self, message, queue)

    return hook


def _note(message: Any, queue: Any) -> None:
    headers = message.get("headers") if isinstance(message, dict) else None
    if not isinstance(headers, dict):
        return
    headers.pop(QUEUE, None)
    info = message["properties"].get("delivery_info") or {}
    if info.get("exchange") and info.get("routing_key") != queue:
        headers[QUEUE] = queue


def queue_of(request: Any) -> str:
    """Return the queue that a task came from, as far as its message says so."""
    queue = request.get(QUEUE) or (request.delivery_info or {}).get("routing_key")
    return queue if isinstance(queue, str) else ""
