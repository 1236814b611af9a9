"""Fixes for crashes of kombu that end a worker when its Redis dies.

In kombu 5.6 and 5.7 a worker with an unacknowledged message (a task with an ETA is enough) ends
with exit code 1 when its Redis is killed: its channel is closed twice, the second time after its
connection has lost its parameters. The ``AttributeError`` of that second time is none of the errors
after which Celery connects again. The fix raises the error of a closed connection, which is one of
them.

A worker also ends when its Redis becomes a replica (READONLY, UNBLOCKED), waits for its master
(MASTERDOWN), or refuses all writes for a while (MISCONF, NOREPLICAS): kombu reports an error of the
channel. In a worker, the fix turns such an answer into an error of the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import kombu
import redis
from kombu.transport.redis import Channel

from jobguard.adapters.celery import sessions
from jobguard.host_safety import contain_errors
from jobguard.patching import Hooks

_BROKEN_VERSIONS = ((5, 6), (5, 7))
_UNAVAILABLE = (
    "UNBLOCKED",
    "READONLY",
    "MASTERDOWN",
    "LOADING",
    "MISCONF",
    "NOREPLICAS",
    "CLUSTERDOWN",
)
"""The first words of the answers of a server that cannot serve for a while."""


def put_on(hooks: Hooks) -> None:
    """Install the fixes that this kombu needs."""
    if hasattr(Channel._connparams, "__wrapped__"):
        return
    if tuple(kombu.VERSION[:2]) in _BROKEN_VERSIONS:
        hooks.put(Channel, "_connparams", connparams)
    hooks.put(Channel, "_connparams", reconnecting)


def connparams(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._connparams: the parameters of the connection."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.connection is None or self.connection.client is None:
            raise redis.exceptions.ConnectionError("this channel is closed")
        return original(self, *args, **kwargs)

    return hook


def reconnecting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._connparams: use a kind of connection that breaks when its server cannot serve."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = original(self, *args, **kwargs)
        with contain_errors("fix a connection of kombu"):
            kind = given.get("connection_class")
            if isinstance(kind, type) and sessions.is_worker():
                given["connection_class"] = _breaking(kind)
        return given

    return hook


def _breaking(kind: type[Any]) -> type[Any]:
    class Breaking(kind):  # type: ignore[misc]  # the class that kombu has chosen
        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().read_response(*args, **kwargs)
            except redis.exceptions.ResponseError as error:
                if not _is_unavailable(error):
                    raise
                self.disconnect()
                raise redis.exceptions.ConnectionError(f"Redis cannot serve: {error}") from error

    return Breaking


def _is_unavailable(error: redis.exceptions.ResponseError) -> bool:
    # redis-py removes the first word of an answer that it knows.
    known = (redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError)
    return isinstance(error, known) or str(error).startswith(_UNAVAILABLE)
