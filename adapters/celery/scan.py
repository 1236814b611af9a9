"""One scan of a broker: the lists of its queues, and the messages that workers have taken.

Messages move during the scan. The scan goes from head to tail, so a push can only make one message
appear twice. A message that a worker takes meanwhile appears in ``unacked``, which is read after
the lists. A message that goes back from there goes to an end of its list, and both ends are read
once more at last. A message on its way to a worker is in neither place; so only two scans, a grace
apart, show that a message is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from jobguard.adapters.celery.envelope import holder_in, token_in
from jobguard.adapters.celery.layout import Layout
from jobguard.members import Members, nothing
from jobguard.scripts import chunks

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
    waiting: Members = field(default_factory=Members)
    taken: dict[bytes, Taken] = field(default_factory=dict)
    begun: float = 0.0
    cost: float = 0.0
    full_begun: float = 0.0
    full_cost: float = 0.0
    """The same of the reading of whole lists; ``begun`` and ``cost`` are of the last one."""
    heads: dict[str, frozenset[int]] = field(default_factory=dict)
    """For each list: hashes of the messages at its head, in the last reading."""
    asked_for: set[bytes] = field(default_factory=set)
    """Tokens that this scan answered for already: it is never the second inspection of these."""


def read_broker(
    client: redis.Redis,
    layout: Layout,
    queues: Iterable[str],
    pause: Callable[[], None] = nothing,
) -> Scan:
    """Scan these queues, and all messages that workers have taken. Raise RedisError.

    ``pause`` is called between two pieces.
    """
    begun = time.monotonic()
    seconds, micros = cast(Any, client).time()
    scan = Scan(frozenset(queues), int(seconds) * 1_000_000 + int(micros), begun=begun)
    # Most lists of a queue do not exist: one for each priority.
    keys = layout.lists_of(sorted(scan.queues))
    lengths = _lengths(client, keys)
    scan.waiting = Members(sum(lengths.values()))
    full = [key for key in keys if lengths[key]]
    for nth, raw in enumerate(messages_in(client, full)):
        _add_waiting(scan, raw)
        if nth % CHUNK == 0:
            pause()
    for nth, (tag, raw) in enumerate(_entries(client, layout.unacked)):
        token = token_in(raw)
        if token is not None:
            scan.taken[token] = Taken(tag, holder_in(raw))
        if nth % CHUNK == 0:
            pause()
    for key, length in _lengths(client, keys).items():
        # A message of an empty list can only have come meanwhile.
        ends = ((0, CHUNK - 1),) if length <= CHUNK else ((-CHUNK, -1), (0, CHUNK - 1))
        for start, end in ends if length else ():
            for raw in _range(client, key, start, end):
                _add_waiting(scan, raw)
            pause()
    for key in full:
        scan.heads[key] = frozenset(map(hash, _range(client, key, 0, CHUNK - 1)))
    scan.full_begun, scan.full_cost = begun, time.monotonic() - begun
    scan.cost = scan.full_cost
    return scan


def read_again(
    client: redis.Redis, layout: Layout, scan: Scan, pause: Callable[[], None] = nothing
) -> None:
    """Read what came into these lists since the last reading. Raise RedisError.

    Messages come at the head, and go back to either end. So each list is read from its head until a
    message that was at its head before, and at its tail; the rest was there before. A message that has
    left meanwhile counts as waiting until all is read again.
    """
    begun = time.monotonic()
    seconds, micros = cast(Any, client).time()
    for key, length in _lengths(client, layout.lists_of(sorted(scan.queues))).items():
        if not length:
            continue
        known, at, head = scan.heads.get(key, frozenset[int]()), 0, frozenset[int]()
        while True:
            chunk = _range(client, key, at, at + CHUNK - 1)
            hashes = frozenset(map(hash, chunk))
            head = head if at else hashes
            for raw in chunk:
                _add_waiting(scan, raw)
            pause()
            at += len(chunk)
            if len(chunk) < CHUNK or not known.isdisjoint(hashes):
                break
        for raw in _range(client, key, -CHUNK, -1):
            _add_waiting(scan, raw)
        scan.heads[key] = head
    taken: dict[bytes, Taken] = {}
    for nth, (tag, raw) in enumerate(_entries(client, layout.unacked)):
        token = token_in(raw)
        if token is not None:
            taken[token] = Taken(tag, holder_in(raw))
        if nth % CHUNK == 0:
            pause()
    for token in scan.taken.keys() - taken.keys():
        scan.waiting.add(token)  # It was acknowledged, or it went back.
    scan.taken = taken
    scan.redis_time = int(seconds) * 1_000_000 + int(micros)
    scan.asked_for.clear()
    scan.begun, scan.cost = begun, time.monotonic() - begun


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


def _lengths(client: Any, keys: Sequence[str]) -> dict[str, int]:
    lengths: dict[str, int] = {}
    for some in chunks(keys, CHUNK):
        with client.pipeline(transaction=False) as pipe:
            for key in some:
                pipe.llen(key)
            lengths.update(zip(some, pipe.execute(), strict=True))
    return lengths


def _range(client: Any, key: str, start: int, end: int) -> list[bytes]:
    found: list[bytes] = client.lrange(key, start, end)
    return found


def _add_waiting(scan: Scan, raw: bytes) -> None:
    token = token_in(raw)
    if token is not None:
        scan.waiting.add(token)
