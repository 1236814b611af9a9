"""A crash of kombu's that takes a worker along when Redis dies, mended.

In kombu 5.6 and 5.7 a worker that holds an unacknowledged message (an ETA is enough) ends with exit
code 1 when its Redis is killed: its channel is closed twice, the second time when its connection has
forgotten where it led, and the ``AttributeError`` is none of the errors after which Celery connects
again. Said as what it is, a connection that is closed, it is one of them.

A worker also ends when its Redis becomes a replica (READONLY, UNBLOCKED), waits for its master
(MASTERDOWN), or refuses all writes for a while (MISCONF, NOREPLICAS): kombu reports an error of the
channel. In a worker, such an answer is an error of the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import kombu
import redis
from kombu.transport.redis import Channel

from jobguard.adapters.celery import sessions
from jobguard.adapters.celery.contain_errors import contain_errors
from jobguard.adapters.celery.hooks import Hooks

_ILL = ((5, 6), (5, 7))
_AWAY = ("UNBLOCKED", "READONLY", "MASTERDOWN", "LOADING", "MISCONF", "NOREPLICAS", "CLUSTERDOWN")
"""How the answers of a server begin that cannot serve for a while."""


def put_on(hooks: Hooks) -> None:
    """Mend this kombu."""
    if hasattr(Channel._connparams, "__wrapped__"):
        return
    if tuple(kombu.VERSION[:2]) in _ILL:
        hooks.put(Channel, "_connparams", connparams)
    hooks.put(Channel, "_connparams", reconnecting)


def connparams(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._connparams: where to connect to."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.connection is None or self.connection.client is None:
            raise redis.exceptions.ConnectionError("this channel is closed")
        return original(self, *args, **kwargs)

    return hook


def reconnecting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._connparams: with a kind of connection that breaks when its server cannot serve."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = original(self, *args, **kwargs)
        with contain_errors("mend a connection"):
            kind = given.get("connection_class")
            if isinstance(kind, type) and sessions.is_worker():
                given["connection_class"] = _breaking(kind)
        return given

    return hook


def _breaking(kind: type[Any]) -> type[Any]:
    class Breaking(kind):  # type: ignore[misc]  # whatever class kombu has chosen
        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().read_response(*args, **kwargs)
            except redis.exceptions.ResponseError as error:
                if not _says_away(error):
                    raise
                self.disconnect()
                raise redis.exceptions.ConnectionError(f"Redis cannot serve: {error}") from error

    return Breaking


def _says_away(error: redis.exceptions.ResponseError) -> bool:
    # redis-py takes the first word off an answer that it knows.
    known = (redis.exceptions.ReadOnlyError, redis.exceptions.MasterDownError)
    return isinstance(error, known) or str(error).startswith(_AWAY)
