"""The consumers of a Redis, counted by their connections.

Names of workers can be shared, switched off, or lost with Redis. A connection cannot: every consumer has
one, and ``CLIENT LIST`` shows its last command. A guarded process names its connections
(client_names.py). A client that takes jobs on a connection without such a name is an unguarded worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from jobguard.client_names import Mark, mark_of, read_mark

if TYPE_CHECKING:
    import redis

    from jobguard.adapter import Source

_SHARE = 20
"""Listing may take one part in this many of the time: Redis does nothing else while it lists clients."""


class Consumers(Mapping[str, frozenset[str]]):
    """Names of consumers by queue. Strangers count for every queue, also for a queue not in the mapping."""

    def __init__(
        self,
        by_queue: Mapping[str, frozenset[str]],
        strangers: frozenset[str],
        uncounted: str = "",
        proved: frozenset[str] = frozenset(),
        alive: frozenset[str] = frozenset(),
        passing: frozenset[str] = frozenset(),
        sessions: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._by_queue = by_queue
        self._strangers = strangers
        self.proved = proved
        """Names whose connections show that they are guarded, also if the ledger does not know them."""
        self.alive = alive
        """Those of them that are alive at this moment, so that their ledger knows them."""
        self.sessions = sessions
        """The ids in hex of the sessions that Redis names for registered workers: several workers of one
        process have one session, which has the name of the first."""
        self.passing = passing
        """Strangers that may be no consumers: they have not taken for long enough to be sure."""
        self.uncounted = uncounted
        """Why the connections could not be counted; "": they were counted."""

    def __getitem__(self, queue: str) -> frozenset[str]:
        return self._by_queue.get(queue, frozenset()) | self._strangers

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_queue)

    def __len__(self) -> int:
        return len(self._by_queue)


@dataclass(frozen=True, slots=True)
class Listener:
    """One client of Redis."""

    text: str
    """For people: the address, the name, the last command, and the time of the connect."""
    command: str
    blocked: bool
    idle: int
    here: bool
    """True if the client uses the database of the source."""
    subscribes: bool
    """True if the client is subscribed to one channel."""
    mark: Mark | None
    ours: bool
    """True for a guarded process of this source, or of a source whose queues have other keys."""


class Listeners:
    """The clients of one source's Redis."""

    def __init__(self, client: redis.Redis, source: Source) -> None:
        self._client: Any = client
        self._mark = mark_of(source)
        self._db = int(client.connection_pool.connection_kwargs.get("db") or 0)
        self._since: dict[
            str, str
        ] = {}  # as first seen: a changed text would look like another client
        self._next = float("-inf")
        self._last: tuple[Listener, ...] = ()
        self.refused = ""
        """Why Redis does not list its clients; "": Redis lists them."""

    def inspect(self) -> tuple[Listener, ...]:
        """Return the clients of the types normal and pubsub; return none if Redis refuses to list them."""
        began = time.monotonic()
        if began < self._next:
            return self._last
        try:
            rows = [row for kind in ("normal", "pubsub") for row in self._list(kind)]
        except ResponseError as error:
            self.refused = str(error)
            rows = []
        else:
            self.refused = ""
        took = time.monotonic() - began
        self._next = began + _SHARE * took if took > 0.05 else began
        since = self._since
        self._since = {row["id"]: since.get(row["id"]) or _since(row) for row in rows}
        self._last = tuple(map(self._read, rows))
        return self._last

    def _list(self, kind: str) -> Iterable[Mapping[str, str]]:
        rows: list[Mapping[str, str]] = self._client.client_list(_type=kind)
        return rows

    def _read(self, row: Mapping[str, str]) -> Listener:
        mark = read_mark(row.get("name", ""))
        same = mark is not None and mark.place == self._mark.place
        return Listener(
            text=_describe(row, self._since[row["id"]]),
            command=row.get("cmd", "").lower(),
            blocked="b" in row.get("flags", ""),
            idle=int(row.get("idle", 0)),
            here=int(row.get("db", 0)) == self._db,
            subscribes=row.get("sub", "0") == "1" and row.get("psub", "0") == "0",
            mark=mark,
            ours=mark is not None and (not same or mark.source == self._mark.source),
        )


def _since(row: Mapping[str, str]) -> str:
    at = time.time() - int(row.get("age", 0))
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _describe(row: Mapping[str, str], since: str) -> str:
    name = f", named {row['name']}" if row.get("name") else ""
    return f"{row.get('addr', '?')} ({row.get('cmd', '?')}{name}, since {since})"
