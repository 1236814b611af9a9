"""A crash of kombu's that takes a worker along when Redis dies, mended.

In kombu 5.6 and 5.7 a worker that holds an unacknowledged message (an ETA is enough) ends with exit
code 1 when its Redis is killed: its channel is closed twice, the second time when its connection has
forgotten where it led, and the ``AttributeError`` is none of the errors after which Celery connects
again. Said as what it is, a connection that is closed, it is one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import kombu
import redis
from kombu.transport.redis import Channel

from jobguard.adapters.celery.hooks import Hooks

_ILL = ((5, 6), (5, 7))


def put_on(hooks: Hooks) -> None:
    """Mend this kombu, if it has the bug."""
    if tuple(kombu.VERSION[:2]) in _ILL and not hasattr(Channel._connparams, "__wrapped__"):
        hooks.put(Channel, "_connparams", connparams)


def connparams(original: Callable[..., Any]) -> Callable[..., Any]:
    """Channel._connparams: where to connect to."""

    @wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.connection is None or self.connection.client is None:
            raise redis.exceptions.ConnectionError("this channel is closed")
        return original(self, *args, **kwargs)

    return hook
