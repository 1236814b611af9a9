"""Hooks on the result backend and on the canvas, where they take part in sending.

A group is recorded in one statement. The size of a chord is a counter in the Redis of the results:
the ledger gets that size before the chord's members are sent. Celery subscribes to a result before
it sends the task; a failure of that subscription must not keep the task from being accepted while
Redis is away.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import TYPE_CHECKING, Any

from celery import canvas
from celery.backends.redis import RedisBackend, ResultConsumer

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.connection import check_out
from jobguard.adapters.celery.push import BROKER_DOWN
from jobguard.adapters.celery.results import results_of
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.patching import Hooks

if TYPE_CHECKING:
    from jobguard.adapter import Tracker

Hook = Callable[..., Any]

_PATIENCE = 0.8
"""Seconds that a member waits for the others: a group may come from a slow generator.

A thousand signatures that exist already become messages in less time.
"""
_sending: ContextVar[bool] = ContextVar("jobguard_celery_sends_a_group", default=False)
_MISSED = "_jobguard_missed"
"""The results that are not subscribed to yet, because Redis was away."""


def put_on(hooks: Hooks) -> None:
    """Put the hooks on."""
    hooks.put(canvas.group, "apply_async", apply_group)
    hooks.put(RedisBackend, "set_chord_size", set_chord_size)
    hooks.put(ResultConsumer, "consume_from", consume_from)
    hooks.put(ResultConsumer, "cancel_for", cancel_for)
    hooks.put(ResultConsumer, "on_wait_for_pending", on_wait_for_pending)


def apply_group(original: Hook) -> Hook:
    """group.apply_async: send the whole group as one batch; also the header of a chord, and chunks."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracker = _tracker_of_group(self)
        if tracker is None:
            return original(self, *args, **kwargs)
        # If the tasks come from a generator, the group took the first elements when it was created.
        slow = not getattr(self.tasks, "_regen__done", True)
        inside = _sending.get()
        before = _sending.set(slow)
        try:
            # Messages that a generator sends, and perhaps waits for, are not members of the group.
            with tracker.batch(patience=_PATIENCE, first_at_once=slow, apart=inside):
                return original(self, *args, **kwargs)
        finally:
            _sending.reset(before)

    return hook


def sends_a_group() -> bool:
    """Return True inside of a group's apply_async, and so perhaps in the generator of its tasks."""
    return _sending.get()


def set_chord_size(original: Hook) -> Hook:
    """RedisBackend.set_chord_size: the number of parts that the body of a chord waits for."""

    @wraps(original)
    def hook(self: Any, group_id: str, chord_size: int, *args: Any, **kwargs: Any) -> Any:
        known = _open_join(self, group_id, chord_size)
        try:
            return original(self, group_id, chord_size, *args, **kwargs)
        except BROKER_DOWN as error:
            if not known:
                raise
            log_event("chord_size_waits", chord=group_id, error=error)
            return None

    return hook


def _open_join(backend: Any, group_id: str, size: int) -> bool:
    """Record the chord in the ledger; return True if a leader restores its size in case Redis loses it."""
    with contain_errors("open the join of a chord", let_pass=StoreUnavailable):
        tracker = lookup.tracker_for(backend.app)
        results = results_of(backend, tracker.source.address) if tracker is not None else None
        if tracker is not None and results is not None:
            fields = json.dumps(results.as_fields()).encode()
            return tracker.accepts_without_broker(tracker.open_join(group_id, int(size), fields))
    return False


def _tracker_of_group(group: Any) -> Tracker | None:
    with contain_errors("batch a group", let_pass=StoreUnavailable):
        app = group.app
        tracker = lookup.tracker_for(app)
        return None if tracker is None or app.conf.task_always_eager else tracker
    return None


def consume_from(original: Hook) -> Hook:
    """ResultConsumer.consume_from: subscribe to a result. Celery retries for 30 s if Redis is away."""

    @wraps(original)
    def hook(self: Any, task_id: str) -> Any:
        if _is_away(self.backend):
            vars(self).setdefault(_MISSED, set()).add(task_id)
            return None
        _catch_up(self, original)
        return original(self, task_id)

    return hook


def cancel_for(original: Hook) -> Hook:
    """ResultConsumer.cancel_for: unsubscribe from a result that was perhaps never subscribed to.

    The call comes from ``AsyncResult.__del__``, and Celery before 5.5 goes to Redis for it in any
    case.
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
    """ResultConsumer.on_wait_for_pending: the caller waits for results, so subscribe to the missed ones."""

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
    """Return True if these results are in the guarded Redis, and that Redis is away."""
    with contain_errors("check the Redis of the results", let_pass=StoreUnavailable):
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
