"""The result backend and the canvas, as far as they have to do with sending.

A group is recorded in one statement. A chord's size is a counter in the Redis of the results: the
ledger learns of it before its members are sent. And to look forward to a result, which Celery does
before it sends a task, must not keep it from being accepted while Redis is away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from celery import canvas
from celery.backends.redis import RedisBackend

from jobguard.adapters.celery import lookup
from jobguard.adapters.celery.hooks import Hooks
from jobguard.adapters.celery.results import results_of

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]


def put_on(hooks: Hooks) -> None:
    """Put the hooks on."""
    hooks.put(canvas.group, "apply_async", apply_group)
    hooks.put(RedisBackend, "set_chord_size", set_chord_size)
    hooks.put(RedisBackend, "on_task_call", on_task_call)


def apply_group(original: Hook) -> Hook:
    """group.apply_async: all of it is one batch; so are the header of a chord, and chunks."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        app = self.app
        tracker = lookup.tracker_for(app)
        if tracker is None or app.conf.task_always_eager:
            return original(self, *args, **kwargs)
        with tracker.batch():
            return original(self, *args, **kwargs)

    return hook


def set_chord_size(original: Hook) -> Hook:
    """RedisBackend.set_chord_size: how many parts the body of a chord waits for."""

    @wraps(original)
    def hook(self: Any, group_id: str, chord_size: int, *args: Any, **kwargs: Any) -> Any:
        tracker = lookup.tracker_for(self.app)
        if tracker is not None:
            results = results_of(self, tracker.source.address)
            if results is not None:
                tracker.open_join(group_id, int(chord_size), json.dumps(results.told()).encode())
        return original(self, group_id, chord_size, *args, **kwargs)

    return hook


def on_task_call(original: Hook) -> Hook:
    """RedisBackend.on_task_call: subscribes to the result; one that asks for it does so again."""

    @wraps(original)
    def hook(self: Any, producer: Any, task_id: str) -> Any:
        tracker = lookup.tracker_for(self.app)
        shared = tracker is not None and results_of(self, tracker.source.address) is not None
        if tracker is not None and shared and tracker.broker_in_doubt():
            return None
        return original(self, producer, task_id)

    return hook
