"""Messages that a worker takes and cannot begin: the task is unknown, or the message is unreadable.

A rolling deploy makes unknown tasks: another worker may know the task, or this one may know it
tomorrow. The message goes back, later each time. An unreadable message has failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import kombu.compression
from celery import signals
from celery.worker.consumer.consumer import Consumer

from jobguard.adapters.celery import killed_runs, sessions
from jobguard.adapters.celery.envelope import token_of
from jobguard.adapters.celery.message import describe
from jobguard.errors import StoreUnavailable
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Outcome
from jobguard.patching import Hooks

if TYPE_CHECKING:
    from uuid import UUID

    from jobguard.model import Delivery

Hook = Callable[..., Any]


def put_on(hooks: Hooks) -> None:
    """Hook the messages that the consumer drops."""
    hooks.put(Consumer, "on_unknown_task", on_unknown_task)
    hooks.put(Consumer, "on_decode_error", on_decode_error)


def on_unknown_task(original: Hook) -> Hook:
    """Consumer.on_unknown_task: the name is not registered here."""

    @wraps(original)
    def hook(self: Any, body: Any, message: Any, exc: Any) -> Any:
        with contain_errors("decline an unknown task", let_pass=StoreUnavailable):
            if _is_declined(self, message, exc):
                return None
        result = original(self, body, message, exc)
        with contain_errors("report an unknown task", let_pass=StoreUnavailable):
            _report_failed(self, message, f"unregistered task {_named(message)[1]}")
        return result

    return hook


def _is_declined(consumer: Any, message: Any, exc: Any) -> bool:
    """Return True if the leader lets others try the task; Celery then does nothing more about it."""
    working, token = sessions.working_for(consumer.app), token_of(message.headers)
    if working is None or token is None:
        return False
    job_id, name = _named(message)
    declined = working.session.decline(
        token,
        job_id=job_id,
        error=f"unregistered task {name}",
        describe=lambda: _described(consumer.app, message, token),
    )
    if not declined:
        return False
    log_event("task_unknown", job_id=job_id, task=name)
    message.reject_log_error(logging.getLogger("jobguard"), consumer.connection_errors)
    signals.task_unknown.send(sender=consumer, message=message, exc=exc, name=name, id=job_id)
    return True


def _described(app: Any, message: Any, token: UUID) -> Delivery:
    """Return the record of a message that is not recorded; kombu has inflated its body."""
    body, compression = message.body, message.headers.get("compression")
    if compression:
        body, _ = kombu.compression.compress(body, compression)
    return describe(
        app,
        message.headers,
        body,
        message.content_type,
        message.content_encoding,
        message.properties,
        queue=vars(message).get(sessions.QUEUE) or message.delivery_info.get("routing_key") or "",
        priority=message.properties.get("priority") or 0,
        token=token,
        task=_task_in(message),
    )


def on_decode_error(original: Hook) -> Hook:
    """Consumer.on_decode_error: the body does not match its content type; Celery only logs that."""

    @wraps(original)
    def hook(self: Any, message: Any, exc: Any) -> Any:
        with contain_errors("report an unreadable message", let_pass=StoreUnavailable):
            _report_failed(self, message, repr(exc))
        return original(self, message, exc)

    return hook


def was_rejected(sender: Any = None, message: Any = None, exc: Any = None, **_: Any) -> None:
    """task_rejected: the message is no task, or its content type is not accepted."""
    with contain_errors("report a rejected message", let_pass=StoreUnavailable):
        _report_failed(sender, message, repr(exc))


def _report_failed(consumer: Any, message: Any, error: str) -> None:
    working, token = sessions.working_for(consumer.app), token_of(message.headers)
    if working is not None and token is not None:
        job_id = str((message.headers or {}).get("id") or "")
        queue = vars(message).get(sessions.QUEUE) or ""
        killed_runs.report(working, token, Outcome.FAILED, job_id=job_id, error=error, queue=queue)


def _named(message: Any) -> tuple[str, str]:
    """Return the id and the name of a message's task."""
    named = _task_in(message)
    return str(named["id"]), str(named["task"])


def _task_in(message: Any) -> Mapping[str, Any]:
    """Return the mapping with the task's id and name: the headers, or with protocol 1 the body."""
    found: Mapping[str, Any] = message.headers if "task" in message.headers else message.payload
    return found
