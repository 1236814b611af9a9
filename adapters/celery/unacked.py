"""What a guarded worker holds is left to it by the others, for as long as it lives and holds it.

kombu hands a message on when it was not acknowledged for ``visibility_timeout``, though its worker
waits for its time to come (an ETA), or runs it still. The fence refuses that second run, but not while
Postgres is away. So a guarded worker says at its beats that what it holds was taken just now: that is
what the time in ``unacked_index`` means.

What it had taken by a connection that broke, Celery forgets; kombu would put it back, but Redis is
away just then, and it stays in ``unacked`` for the rest of the visibility timeout, in the name of a
worker that lives. So the worker says that it has let go of it, and a leader puts it back.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import redis

from jobguard.adapters.celery.connection import client_of
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.push import TIMEOUT
from jobguard.clients import own_client
from jobguard.model import DROPPED_BY_LIVE_WORKER
from jobguard.scripts import Script, chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    from kombu.transport.redis import QoS

    from jobguard.adapter import Source

log = logging.getLogger("jobguard")

_SHARE = 4
"""Of the visibility timeout, after which it is said again."""
_CHUNK = 1000  # tags at a time block nobody else


@dataclass(slots=True)
class _Taken:
    """What was taken by one channel."""

    by: Any
    """Its connection; another channel of the same one is no later one."""
    since: float = field(default_factory=time.time)  # kombu's clock, too
    in_doubt: set[str] = field(default_factory=set)


class Unacked:
    """The messages that one worker has taken and not acknowledged."""

    def __init__(
        self,
        app: Any,
        source: Source,
        *,
        session: Callable[[], UUID],
        is_ours: Callable[[Any], bool],
        runs: Callable[[], set[str]],
    ) -> None:
        """``is_ours``: whether the worker still consumes by a connection of kombu's.

        ``runs``: the tags of what it will run although it lost it.
        """
        self._client: Any = own_client(client_of(app.connection_for_read()), timeout=TIMEOUT)
        self._report_dropped = Script(self._client, __package__, "let_go.lua")
        self._layout = Layout.parse(source.prefix)
        self._session = session
        self._is_ours = is_ours
        self._runs = runs
        self._books: dict[QoS, _Taken] = {}
        self._dropped: set[str] = set()
        self._timeout = math.inf
        self._renewed = time.monotonic()

    def add(self, books: QoS) -> None:
        """Remember where kombu notes what it has taken; in its own thread, where it may be asked."""
        if books not in self._books:
            self._timeout = float(books.visibility_timeout)
            self._books[books] = _Taken(books.channel.connection.client)

    def doubt(self, books: QoS, tag: str) -> None:
        """Redis broke off while it was told that we take this: it may have heard it."""
        self._books[books].in_doubt.add(tag)

    def drop(self, tag: str) -> None:
        """Celery neither runs nor acknowledges this any more: after its timeout it is anyone's."""
        self._dropped.add(tag)

    def tend(self) -> None:
        """Say what is held, if that is due, and what no longer is. From any thread; raises nothing."""
        try:
            for books, taken in snapshot(self._books.items()):
                if not self._is_open(books):
                    self._give_up(books, taken)
            now = time.monotonic()
            if now - self._renewed >= self._timeout / _SHARE:
                self._renewed = now
                self._renew()
        except redis.RedisError as error:
            log.debug("a worker could not say what it holds: %s", error)

    def _renew(self) -> None:
        """Say that all of it was taken just now."""
        at = time.time()
        books = filter(self._is_open, snapshot(self._books))
        unacked = {tag for each in books for tag in snapshot(each._delivered)}
        self._dropped &= unacked
        tags = sorted(unacked - self._dropped)
        for some in chunks(tags, _CHUNK):
            self._client.zadd(self._layout.unacked_index, dict.fromkeys(some, at), xx=True)

    def _give_up(self, books: QoS, taken: _Taken) -> None:
        """Say that nobody holds what was taken by a connection that is gone; at every beat until told."""
        now = time.time()  # before it is looked who came later
        others = [one for one in snapshot(self._books.values()) if one.by is not taken.by]
        later = min((one.since for one in others if one.since > taken.since), default=now)
        tags = {*snapshot(books._delivered), *taken.in_doubt}
        running = tags & self._runs()
        keys = (self._layout.unacked, self._layout.unacked_index)
        said = (self._session().hex, DROPPED_BY_LIVE_WORKER, repr(later))
        lost = sorted(tags - running)
        answers = self._report_dropped.run(
            [(keys, (*said, *some)) for some in chunks(lost, _CHUNK)]
        )
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        if not running:
            self._books.pop(books, None)

    def _is_open(self, books: Any) -> bool:
        channel = books.channel
        return not channel.closed and self._is_ours(getattr(channel.connection, "client", None))


def snapshot(of: Iterable[Any]) -> list[Any]:
    """Copy what another thread may be changing."""
    while True:
        try:
            return list(of)
        except RuntimeError:
            continue
