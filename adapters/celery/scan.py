"""One scan of a broker: the lists of its queues, and the messages that workers have taken.

Messages move during the scan. The scan goes from head to tail, so a push can only make one message
appear twice. A message that a worker takes meanwhile appears in ``unacked``, which is read after
the lists. A message that goes back from there goes to an end of its list, and both ends are read
once more at last. A message on its way to a worker is in neither place; so only two scans, a grace
apart, show that a message is lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from jobguard.adapters.celery.envelope import holder_in, token_in
from jobguard.adapters.celery.layout import Layout

if TYPE_CHECKING:
    import redis

CHUNK = 1_000
"""Messages in one call, which blocks Redis for about 0.7 ms."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A message in ``unacked``."""

    tag: str
    holder: str = ""
    """The session of the guarded worker that took it, in hex; "" for an unguarded one."""


@dataclass(slots=True)
class Scan:
    """The messages that one scan saw, by token in hex."""

    queues: frozenset[str]
    redis_time: int
    """The time at which the scan began, by Redis' clock, in microseconds."""
    waiting: set[bytes] = field(default_factory=set)
    taken: dict[bytes, Taken] = field(default_factory=dict)
    begun: float = 0.0
    cost: float = 0.0
    asked_for: set[bytes] = field(default_factory=set)
    """Tokens that this scan answered for already: it is never the second inspection of these."""


def read_broker(client: redis.Redis, layout: Layout, queues: Iterable[str]) -> Scan:
    """Scan these queues, and all messages that workers have taken. Raise RedisError."""
    begun = time.monotonic()
    seconds, micros = cast(Any, client).time()
    scan = Scan(frozenset(queues), int(seconds) * 1_000_000 + int(micros), begun=begun)
    keys = layout.lists_of(sorted(scan.queues))
    for raw in messages_in(client, keys):
        _add_waiting(scan, raw)
    for tag, raw in _entries(client, layout.unacked):
        token = token_in(raw)
        if token is not None:
            scan.taken[token] = Taken(tag, holder_in(raw))
    for key in keys:
        for raw in (*_range(client, key, -CHUNK, -1), *_range(client, key, 0, CHUNK - 1)):
            _add_waiting(scan, raw)
    scan.cost = time.monotonic() - begun
    return scan


def messages_in(client: Any, keys: Sequence[str]) -> Iterator[bytes]:
    """Yield every message in these lists."""
    for key in keys:
        at = 0
        while True:
            chunk = _range(client, key, at, at + CHUNK - 1)
            yield from chunk
            if len(chunk) < CHUNK:
                break
            at += len(chunk)


def taken(client: Any, key: str) -> Iterator[bytes]:
    """Yield every message that workers have taken."""
    for _, raw in _entries(client, key):
        yield raw


def _entries(client: Any, key: str) -> Iterator[tuple[str, bytes]]:
    for tag, raw in client.hscan_iter(key, count=500):
        yield tag.decode(errors="replace"), raw


def _range(client: Any, key: str, start: int, end: int) -> list[bytes]:
    found: list[bytes] = client.lrange(key, start, end)
    return found


def _add_waiting(scan: Scan, raw: bytes) -> None:
    token = token_in(raw)
    if token is not None:
        scan.waiting.add(token)
