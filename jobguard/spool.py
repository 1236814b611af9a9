"""What Postgres could not take, until it can: one class behind one interface.

This one keeps it in memory, up to a bound, and so loses it with the process. Everything that is
put in is counted, and what does not fit is counted and logged: nothing is dropped silently.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from jobguard.job import Delivery, End, new_token


@dataclass(frozen=True, slots=True)
class Cancelled:
    """An intent that Postgres has not heard of yet, and what was there when it was made.

    Its ids and its queue mean nothing that was sent later, however late it is told.
    """

    tokens: Sequence[UUID]
    job_ids: Sequence[str]
    queue: str | None
    waiting: Sequence[UUID] = ()
    """What it means of this process's own spool: Postgres will take that for later than it was."""
    made_at: float = field(default_factory=time.monotonic)
    until: UUID = field(default_factory=new_token)
    """Every later token of this process sorts behind it."""

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.made_at


@dataclass(frozen=True, slots=True)
class JoinOpened:
    """A join that Postgres has not heard of yet, or whose end it has not heard of."""

    join: str
    size: int
    state: bytes = b""
    closed: bool = False


Entry = Delivery | End | Cancelled | JoinOpened


@dataclass(slots=True)
class SpoolCounts:
    """What went in, what came out again, what found no place."""

    taken: int = 0
    replayed: int = 0
    lost: int = 0
    quarantined: int = 0


class Spool(Protocol):
    """Keeps entries in order until they are replayed."""

    counts: SpoolCounts

    def put(self, entries: Sequence[Entry]) -> bool:
        """Keep these, all or none; False if there is no room."""

    def peek(self, limit: int) -> Sequence[Entry]:
        """The oldest entries, of one kind, which stay until they are dropped."""

    def drop(self, entries: Sequence[Entry]) -> None:
        """Postgres has these now."""

    def remove(self, tokens: Sequence[UUID]) -> None:
        """Forget the records of these deliveries: they are withdrawn."""

    def waiting(self, job_ids: Sequence[str], queue: str | None) -> Sequence[UUID]:
        """Which deliveries of these ids, or to this queue, wait for their record."""

    def oldest(self) -> float | None:
        """When the oldest entry was put in, in seconds since the epoch; None: empty."""

    def __len__(self) -> int:
        """How many entries wait."""


class MemorySpool:
    """A spool in memory. ``changed`` is called after whatever came or went."""

    def __init__(self, size: int, changed: Callable[[], None] = lambda: None) -> None:
        self._size = size
        self._changed = changed
        self._lock = threading.Lock()
        self._entries: deque[tuple[float, Entry]] = deque()
        self.counts = SpoolCounts()

    def put(self, entries: Sequence[Entry]) -> bool:
        """Keep these, all or none; see Spool."""
        with self._lock:
            if len(self._entries) + len(entries) > self._size:
                self.counts.lost += len(entries)
                return False
            at = time.time()
            self._entries.extend((at, entry) for entry in entries)
            self.counts.taken += len(entries)
        self._changed()
        return True

    def peek(self, limit: int) -> Sequence[Entry]:
        """The oldest entries of one kind; see Spool."""
        with self._lock:
            found: list[Entry] = []
            for _, entry in self._entries:
                if len(found) == limit or (found and type(entry) is not type(found[0])):
                    break
                found.append(entry)
            return found

    def drop(self, entries: Sequence[Entry]) -> None:
        """Postgres has these now; see Spool."""
        with self._lock:
            for entry in entries:
                if self._entries and self._entries[0][1] is entry:
                    self._entries.popleft()
                    self.counts.replayed += 1
        self._changed()

    def remove(self, tokens: Sequence[UUID]) -> None:
        """Forget the records of these deliveries; see Spool."""
        with self._lock:
            self._entries = deque(
                (at, entry)
                for at, entry in self._entries
                if not (isinstance(entry, Delivery) and entry.token in tokens)
            )
        self._changed()

    def waiting(self, job_ids: Sequence[str], queue: str | None) -> Sequence[UUID]:
        """Which deliveries of these ids, or to this queue, wait; see Spool."""
        ids = frozenset(job_ids)
        with self._lock:
            return tuple(
                entry.token
                for _, entry in self._entries
                if isinstance(entry, Delivery) and (entry.job_id in ids or entry.queue == queue)
            )

    def oldest(self) -> float | None:
        """When the oldest entry was put in; see Spool."""
        with self._lock:
            return self._entries[0][0] if self._entries else None

    def __len__(self) -> int:
        """How many entries wait."""
        return len(self._entries)
