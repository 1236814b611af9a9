"""The result backend and the canvas, as far as they have to do with sending.

A group is recorded in one statement. A chord's size is a counter in the Redis of the results: the
ledger learns of it before its members are sent. And to look forward to a result, which Celery does
before it sends a task, must not keep it from being accepted while Redis is away.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

from celery import canvas
from celery.backends.redis import RedisBackend, ResultConsumer

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.connection import check_out
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.push import BROKER_DOWN
from jobguard.adapters.celery.results import results_of

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]

_PATIENCE = 0.8
"""Seconds that a member waits for the others: a group may come from a generator that takes its time.

A thousand signatures that are ready are made into messages in less."""
_sending: ContextVar[bool] = ContextVar("jobguard_celery_sends_a_group", default=False)
_MISSED = "_jobguard_missed"
"""Results that nobody is subscribed to yet, because Redis was away."""


def put_on(hooks: Hooks) -> None:
    """Put the hooks on."""
    hooks.put(canvas.group, "apply_async", apply_group)
    hooks.put(RedisBackend, "set_chord_size", set_chord_size)
    hooks.put(ResultConsumer, "consume_from", consume_from)
    hooks.put(ResultConsumer, "cancel_for", cancel_for)
    hooks.put(ResultConsumer, "on_wait_for_pending", on_wait_for_pending)


def apply_group(original: Hook) -> Hook:
    """group.apply_async: all of it is one batch; so are the header of a chord, and chunks."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracker = _tracker_of_group(self)
        if tracker is None:
            return original(self, *args, **kwargs)
        # Of a generator the group has taken the first elements when it was made.
        slow = not getattr(self.tasks, "_regen__done", True)
        inside = _sending.get()
        before = _sending.set(slow)
        try:
            # What a generator sends, and perhaps waits for, is no part of what it is to yield.
            with tracker.batch(patience=_PATIENCE, first_at_once=slow, apart=inside):
                return original(self, *args, **kwargs)
        finally:
            _sending.reset(before)

    return hook


def sends_a_group() -> bool:
    """Whether this is inside of a group's apply_async, and perhaps in the generator it comes from."""
    return _sending.get()


def set_chord_size(original: Hook) -> Hook:
    """RedisBackend.set_chord_size: how many parts the body of a chord waits for."""

    @wraps(original)
    def hook(self: Any, group_id: str, chord_size: int, *args: Any, **kwargs: Any) -> Any:
        known = _open_join(self, group_id, chord_size)
        try:
            return original(self, group_id, chord_size, *args, **kwargs)
        except BROKER_DOWN as error:
            if not known:
                raise
            log.warning(
                "the size of chord %s is put into Redis when it is back: %r", group_id, error
            )
            return None

    return hook


def _open_join(backend: Any, group_id: str, size: int) -> bool:
    """Have the ledger know of it; whether a leader puts the size back, should Redis not take it."""
    with contain_errors("open a chord"):
        tracker = lookup.tracker_for(backend.app)
        results = results_of(backend, tracker.source.address) if tracker is not None else None
        if tracker is not None and results is not None:
            fields = json.dumps(results.as_fields()).encode()
            return tracker.accepts_without_broker(tracker.open_join(group_id, int(size), fields))
    return False


def _tracker_of_group(group: Any) -> Tracker | None:
    with contain_errors("batch a group"):
        app = group.app
        tracker = lookup.tracker_for(app)
        return None if tracker is None or app.conf.task_always_eager else tracker
    return None


def consume_from(original: Hook) -> Hook:
    """ResultConsumer.consume_from: subscribes to a result, trying for half a minute if Redis is away."""

    @wraps(original)
    def hook(self: Any, task_id: str) -> Any:
        if _is_away(self.backend):
            vars(self).setdefault(_MISSED, set()).add(task_id)
            return None
        _catch_up(self, original)
        return original(self, task_id)

    return hook


def cancel_for(original: Hook) -> Hook:
    """ResultConsumer.cancel_for: a result that nobody holds any more, which may never have been heard of.

    It comes from ``AsyncResult.__del__``, and Celery before 5.5 goes to Redis for it in any case.
    """

    @wraps(original)
    def hook(self: Any, task_id: str) -> Any:
        missed: set[str] = vars(self).get(_MISSED) or set()
        if task_id in missed:
            missed.discard(task_id)
            return None
        return original(self, task_id)

    return hook


def on_wait_for_pending(original: Hook) -> Hook:
    """ResultConsumer.on_wait_for_pending: somebody waits for results, and wants to hear of them."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if vars(self).get(_MISSED) and not _is_away(self.backend):
            _catch_up(self, inspect.unwrap(type(self).consume_from))
        return original(self, *args, **kwargs)

    return hook


def _catch_up(consumer: Any, subscribe: Hook) -> None:
    missed: set[str] = vars(consumer).get(_MISSED) or set()
    with contain_errors("subscribe to results"):
        while missed:
            subscribe(consumer, missed.pop())


def _is_away(backend: Any) -> bool:
    """Whether the Redis of these results is the guarded one, and is away."""
    with contain_errors("ask for Redis"):
        tracker = lookup.tracker_for(backend.app)
        if tracker is None or results_of(backend, tracker.source.address) is None:
            return False
        if tracker.broker_in_doubt():
            return True
        try:
            check_out(backend.client.connection_pool)
        except BROKER_DOWN:
            tracker.broker_failed()
            return True
    return False
