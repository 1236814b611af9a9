"""What a guarded worker holds is left to it by the others, for as long as it lives.

kombu hands a message on when it was not acknowledged for ``visibility_timeout``, though its worker
waits for its time to come (an ETA), or runs it still. The fence refuses that second run, but not while
Postgres is away. So a guarded worker says at its beats that what it holds was taken just now: that is
what the time in ``unacked_index`` means. What it holds no longer, for it lost its connection, it says
nothing of.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import redis

from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.places import client_of
from jobguard.adapters.celery.push import TIMEOUT
from jobguard.clients import own_client
from jobguard.scripts import chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kombu.transport.redis import QoS

    from jobguard.adapter import Source

log = logging.getLogger("jobguard")

_SHARE = 4
"""Of the visibility timeout, after which it is said again."""
_CHUNK = 1000  # tags at a time block nobody else


class Held:
    """The messages that one worker has taken and not acknowledged."""

    def __init__(self, app: Any, source: Source, is_ours: Callable[[Any], bool]) -> None:
        """``is_ours``: whether the worker still consumes by a connection of kombu's."""
        self._client: Any = own_client(client_of(app.connection_for_read()), timeout=TIMEOUT)
        self._index = Layout.parse(source.prefix).unacked_index
        self._is_ours = is_ours
        self._books: WeakSet[QoS] = WeakSet()
        self._timeout = math.inf
        self._renewed = time.monotonic()

    def add(self, books: QoS) -> None:
        """Remember where kombu notes what it has taken; in its own thread, where it may be asked."""
        self._timeout = float(books.visibility_timeout)
        self._books.add(books)

    def renew(self) -> None:
        """Say that all of it was taken just now, if that is due. From any thread; raises nothing."""
        now = time.monotonic()
        if now - self._renewed < self._timeout / _SHARE:
            return
        self._renewed = now
        tags = [tag for books in snapshot(self._books) for tag in self._tags(books)]
        at = time.time()  # kombu's clock, too
        try:
            for some in chunks(tags, _CHUNK):
                self._client.zadd(self._index, dict.fromkeys(some, at), xx=True)
        except redis.RedisError as error:
            log.debug("a worker could not say what it holds: %s", error)

    def _tags(self, books: Any) -> Iterable[str]:
        channel = books.channel
        if channel.closed or not self._is_ours(getattr(channel.connection, "client", None)):
            return ()
        return snapshot(books._delivered)


def snapshot(of: Iterable[Any]) -> list[Any]:
    """Copy what another thread may be changing."""
    while True:
        try:
            return list(of)
        except RuntimeError:
            continue
