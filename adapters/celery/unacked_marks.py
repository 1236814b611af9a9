"""Whose a message is that a worker has taken: written into ``unacked``, where a leader looks.

kombu moves what a worker has taken to the hash ``unacked``, and says there nothing of the worker. If
it dies, its messages lie there for the visibility timeout, an hour by default. A guarded worker
writes its session into what it puts there; a message that came without a token, from a program that
is not guarded, is given one, so that it is the same delivery however often it is put back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from celery.app.task import Task
from kombu.transport.redis import QoS, Transport

from jobguard.adapters.celery import killed_runs, sessions
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.header import TOKEN, WORKER, token_of
from jobguard.adapters.celery.hooks import Hooks
from jobguard.model import Outcome, new_token

Hook = Callable[..., Any]

_FROM = "_jobguard_from"


def put_on(hooks: Hooks) -> None:
    """Mark what this process' workers take, and hear of what they acknowledge."""
    hooks.put(QoS, "append", append)
    hooks.put(QoS, "ack", ack)
    hooks.put(Transport, "_deliver", deliver)


def deliver(original: Hook) -> Hook:
    """Transport._deliver: a message came from this queue, which kombu does not say in the message."""

    @wraps(original)
    def hook(self: Any, message: Any, queue: Any) -> Any:
        vars(self)[_FROM] = queue
        return original(self, message, queue)

    return hook


def append(original: Hook) -> Hook:
    """QoS.append: a message was popped off its queue, and is now written into ``unacked``."""

    @wraps(original)
    def hook(self: Any, message: Any, delivery_tag: Any) -> Any:
        with contain_errors("mark a message as this worker's"):
            _mark(self, message)
        try:
            return original(self, message, delivery_tag)
        except BaseException:
            with contain_errors("remember what this worker may have taken"):
                _redis_health(self, delivery_tag)
            raise

    return hook


def ack(original: Hook) -> Hook:
    """QoS.ack: for a task that a strategy of its own takes past the worker's pool, this is the end.

    Such a strategy (that of celery-batches) acknowledges messages of which no run ever asks us.
    """

    @wraps(original)
    def hook(self: Any, delivery_tag: Any) -> Any:
        headers = None
        with contain_errors("see what is acknowledged"):
            headers = _passed_by(self, delivery_tag)
        result = original(self, delivery_tag)
        if headers is not None:
            with contain_errors("report what was acknowledged"):
                _report(self, headers)
        return result

    return hook


def _passed_by(books: Any, tag: Any) -> dict[str, Any] | None:
    """Return the headers of a task that its own strategy has taken and not given to the pool."""
    headers = getattr(books._delivered.get(tag), "headers", None)
    if not isinstance(headers, dict) or token_of(headers) is None:
        return None
    working = sessions.consuming(books.channel.connection.client)
    if working is None:
        return None
    task = working.controller.app.tasks.get(headers.get("task"))
    if task is None or task.Strategy == Task.Strategy or working.handed_over(tag):
        return None
    return headers


def _report(books: Any, headers: dict[str, Any]) -> None:
    working, token = sessions.consuming(books.channel.connection.client), token_of(headers)
    if working is not None and token is not None:
        killed_runs.report(working, token, Outcome.COMPLETED, job_id=str(headers.get("id") or ""))


def _mark(books: Any, message: Any) -> None:
    working = sessions.consuming(books.channel.connection.client)
    headers = message.headers
    if working is None or not isinstance(headers, dict):
        return
    vars(message)[sessions.QUEUE] = vars(books.channel.connection).get(_FROM)
    if working.unacked is not None:
        working.unacked.add(books)
    if token_of(headers) is None:
        if not _is_a_task(message):
            return
        headers[TOKEN] = new_token().hex
    headers[WORKER] = working.session.id.hex
    message._raw["headers"] = headers


def _redis_health(books: Any, tag: str) -> None:
    working = sessions.consuming(books.channel.connection.client)
    if working is not None and working.unacked is not None:
        working.unacked.doubt(books, tag)


def _is_a_task(message: Any) -> bool:
    """Whether Celery will take this for a task, by its headers, or with protocol 1 by its body."""
    if "task" in message.headers:
        return True
    try:
        body = message.decode()
    except Exception:  # whatever it is, Celery is about to say so
        return False
    return isinstance(body, dict) and "task" in body
