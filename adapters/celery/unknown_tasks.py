"""Messages that a worker takes and cannot begin: of a task it does not know, or that nobody can read.

An unknown task is what a rolling deploy makes: another worker may know it, or this one tomorrow. It
goes back, later each time. What cannot be read has failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from celery import signals
from celery.worker.consumer.consumer import Consumer

from jobguard.adapters.celery import killed_runs, sessions
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.header import token_of
from jobguard.adapters.celery.hooks import Hooks
from jobguard.model import Outcome

log = logging.getLogger("jobguard")
Hook = Callable[..., Any]


def put_on(hooks: Hooks) -> None:
    """Hear of what the consumer drops."""
    hooks.put(Consumer, "on_unknown_task", on_unknown_task)
    hooks.put(Consumer, "on_decode_error", on_decode_error)


def on_unknown_task(original: Hook) -> Hook:
    """Consumer.on_unknown_task: the name is not registered here."""

    @wraps(original)
    def hook(self: Any, body: Any, message: Any, exc: Any) -> Any:
        with contain_errors("see to an unknown task"):
            if _goes_back(self, message, exc):
                return None
        result = original(self, body, message, exc)
        with contain_errors("report an unknown task"):
            _has_failed(self, message, f"unregistered task {_named(message)[1]}")
        return result

    return hook


def _goes_back(consumer: Any, message: Any, exc: Any) -> bool:
    """Whether the leader lets others try it; then it is out of Celery's hands."""
    working, token = sessions.working_for(consumer.app), token_of(message.headers)
    if working is None or token is None:
        return False
    if token not in (working.tracker.recovers([token], began=False) or ()):
        return False
    job_id, name = _named(message)
    log.error("task %s[%s] is not registered here: it goes back, for others", name, job_id)
    working.session.decline(token, job_id=job_id, error=f"unregistered task {name}")
    message.reject_log_error(log, consumer.connection_errors)
    signals.task_unknown.send(sender=consumer, message=message, exc=exc, name=name, id=job_id)
    return True


def on_decode_error(original: Hook) -> Hook:
    """Consumer.on_decode_error: the body is not what its type says; Celery says so only in the log."""

    @wraps(original)
    def hook(self: Any, message: Any, exc: Any) -> Any:
        with contain_errors("report a message that cannot be read"):
            _has_failed(self, message, repr(exc))
        return original(self, message, exc)

    return hook


def was_rejected(sender: Any = None, message: Any = None, exc: Any = None, **_: Any) -> None:
    """task_rejected: no task, or none that may be read."""
    with contain_errors("report a message that was rejected"):
        _has_failed(sender, message, repr(exc))


def _has_failed(consumer: Any, message: Any, error: str) -> None:
    working, token = sessions.working_for(consumer.app), token_of(message.headers)
    if working is not None and token is not None:
        job_id = str((message.headers or {}).get("id") or "")
        killed_runs.report(working, token, Outcome.FAILED, job_id=job_id, error=error)


def _named(message: Any) -> tuple[str, str]:
    """Return the id and the name of a message's task."""
    named = message.headers if "task" in message.headers else message.payload
    return str(named["id"]), str(named["task"])
