"""One look at all that a broker holds: the lists of its queues, and what workers have taken.

Messages move while it lasts. From head to tail a push can only make one be seen twice; what a worker
takes meanwhile is met in ``unacked``, which is read after the lists; and what goes back from there
goes to an end of its list, which is read once more at last. What is on its way to a worker, in
neither, is on nobody's list: so it takes two looks, a grace apart, to call something lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from jobguard.adapters.celery.header import holder_in, token_in
from jobguard.adapters.celery.layout import Layout

if TYPE_CHECKING:
    import redis

CHUNK = 1_000
"""Messages a call: Redis does nothing else for some 0.7 ms."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A message in ``unacked``."""

    tag: str
    holder: str = ""
    """The session of the guarded worker that took it, in hex; "": an unguarded one."""


@dataclass(slots=True)
class Scan:
    """What one look saw, by token in hex."""

    queues: frozenset[str]
    redis_time: int
    """When it began, by Redis' clock, in microseconds."""
    waiting: set[bytes] = field(default_factory=set)
    taken: dict[bytes, Taken] = field(default_factory=dict)
    begun: float = 0.0
    cost: float = 0.0
    asked_for: set[bytes] = field(default_factory=set)
    """Tokens of which this look was told already: it is never the second look at any of them."""

    def saw(self, token: bytes) -> bool:
        """Whether it is anywhere."""
        return token in self.waiting or token in self.taken


def read_broker(client: redis.Redis, layout: Layout, queues: Iterable[str]) -> Scan:
    """Look at these queues, and at all that workers have taken. Raises RedisError."""
    begun = time.monotonic()
    seconds, micros = cast(Any, client).time()
    scan = Scan(frozenset(queues), int(seconds) * 1_000_000 + int(micros), begun=begun)
    keys = layout.lists_of(sorted(scan.queues))
    for raw in messages_in(client, keys):
        _wait(scan, raw)
    for tag, raw in _entries(client, layout.unacked):
        token = token_in(raw)
        if token is not None:
            scan.taken[token] = Taken(tag, holder_in(raw))
    for key in keys:
        for raw in (*_range(client, key, -CHUNK, -1), *_range(client, key, 0, CHUNK - 1)):
            _wait(scan, raw)
    scan.cost = time.monotonic() - begun
    return scan


def messages_in(client: Any, keys: Sequence[str]) -> Iterator[bytes]:
    """Return every message in these lists."""
    for key in keys:
        at = 0
        while True:
            chunk = _range(client, key, at, at + CHUNK - 1)
            yield from chunk
            if len(chunk) < CHUNK:
                break
            at += len(chunk)


def taken(client: Any, key: str) -> Iterator[bytes]:
    """Return every message that workers have taken."""
    for _, raw in _entries(client, key):
        yield raw


def _entries(client: Any, key: str) -> Iterator[tuple[str, bytes]]:
    for tag, raw in client.hscan_iter(key, count=500):
        yield tag.decode(errors="replace"), raw


def _range(client: Any, key: str, start: int, end: int) -> list[bytes]:
    found: list[bytes] = client.lrange(key, start, end)
    return found


def _wait(scan: Scan, raw: bytes) -> None:
    token = token_in(raw)
    if token is not None:
        scan.waiting.add(token)
