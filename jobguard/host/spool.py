"""Entries that Postgres could not take, until it can: one class behind one interface.

This class keeps them in memory, up to a bound, so they are lost with the process. Every entry is
counted, and an entry without room is counted and logged: nothing is dropped silently.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from jobguard.model import Delivery, End, new_token


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A cancel that Postgres does not have yet, and the deliveries it meant when it was made.

    Its ids and its queue do not mean deliveries that were sent later, even if the cancel is written
    late.
    """

    tokens: Sequence[UUID]
    job_ids: Sequence[str]
    queue: str | None
    waiting: Sequence[UUID] = ()
    """The deliveries that it means in this process's own spool; they are recorded after the cancel."""
    made_at: float = field(default_factory=time.monotonic)
    until: UUID = field(default_factory=new_token)
    """Every later token of this process sorts after it."""

    @property
    def age(self) -> float:
        """Return the seconds since it was made."""
        return time.monotonic() - self.made_at


@dataclass(frozen=True, slots=True)
class JoinOpened:
    """A join, or the end of a join, that Postgres does not have yet."""

    join: str
    size: int
    state: bytes = b""
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Adoptable:
    """A record without its envelope, for which there was no room. The job is in Redis.

    It is never written to Postgres: the worker that starts the job records it.
    """

    token: UUID
    job_id: str
    queue: str


Entry = Delivery | End | Cancelled | JoinOpened | Adoptable

_OVERHEAD = 500
"""Bytes that an entry takes in addition to its content."""
_ASIDE = 1000
"""The maximum number of entries that are set aside; the oldest is given up for one more."""


def size_of(entry: Entry) -> int:
    """Return about how many bytes an entry takes."""
    if isinstance(entry, Delivery):
        return _OVERHEAD + len(entry.envelope) + len(entry.job_id) + len(entry.queue)
    if isinstance(entry, End):
        state = entry.part.state if entry.part is not None else b""
        return _OVERHEAD + len(state) + len(entry.error or "") + len(entry.job_id)
    if isinstance(entry, Cancelled):
        ids = sum(map(len, entry.job_ids))
        return _OVERHEAD + ids + 100 * (len(entry.tokens) + len(entry.waiting))
    if isinstance(entry, JoinOpened):
        return _OVERHEAD + len(entry.state) + len(entry.join)
    return _OVERHEAD + len(entry.job_id) + len(entry.queue)


def is_adoptable(entry: Entry) -> bool:
    """Return True if a worker can record it as well, because it changes no other deliveries."""
    return (
        isinstance(entry, Delivery)
        and entry.parent is None
        and entry.closes is None
        and not entry.derived
    )


def is_report(entry: Entry) -> bool:
    """Return True if a leader must wait for it, because no decision is possible without it."""
    if isinstance(entry, Delivery):
        return entry.parent is not None
    return isinstance(entry, End | Cancelled)


@dataclass(slots=True)
class SpoolCounts:
    """The number of entries that came in, were replayed, or found no room."""

    taken: int = 0
    replayed: int = 0
    lost: int = 0
    quarantined: int = 0
    adoptable: int = 0
    """Of the entries taken: records that lost their envelopes because there was no room."""


class Spool(Protocol):
    """Keeps entries in order until they are replayed."""

    counts: SpoolCounts

    def put(self, entries: Sequence[Entry]) -> bool:
        """Keep all of these entries or none; return False if there is no room."""

    def peek(self, limit: int, size: int | None = None) -> Sequence[Entry]:
        """Return the oldest entries, all of one kind; they stay until they are dropped.

        ``size``: at most this many bytes, but at least one entry.
        """

    def drop(self, entries: Sequence[Entry]) -> None:
        """Remove these entries, which Postgres now has."""

    def set_aside(self, entry: Entry) -> None:
        """Move the first entry, which Postgres does not take, out of the way of the others."""

    def aside(self) -> Sequence[Entry]:
        """Return the entries that were set aside, oldest first."""

    def drop_aside(self, entry: Entry, *, lost: bool) -> None:
        """Remove an entry that was set aside: Postgres has it, or it is ``lost``."""

    def left(self) -> Sequence[Entry]:
        """Return all waiting entries, those that were set aside first."""

    def only_adoptable(self) -> bool:
        """Return True if all waiting entries are records of jobs that are in Redis."""

    @property
    def pending(self) -> int:
        """Return how many entries wait, including those that were set aside."""

    @property
    def size(self) -> int:
        """Return how many bytes wait."""

    def remove(self, tokens: Sequence[UUID]) -> None:
        """Remove the records of these deliveries, which are withdrawn."""

    def waiting(self, job_ids: Sequence[str], queue: str | None) -> Sequence[UUID]:
        """Return the deliveries with these ids, or to this queue, that wait for their record."""

    def oldest(self) -> float | None:
        """Return when the oldest report was put in, in seconds since the epoch; None if there is none."""

    def __len__(self) -> int:
        """Return how many entries wait for their turn, without those that were set aside."""


@dataclass(slots=True)
class _Slot:
    at: float
    entry: Entry
    size: int


class MemorySpool:
    """A spool in memory, bounded in entries and in bytes. ``changed`` is called after each change."""

    def __init__(
        self,
        size: int,
        changed: Callable[[], None] = lambda: None,
        *,
        most_bytes: int = 64 << 20,
        lightened: Callable[[int], None] = lambda _count: None,
    ) -> None:
        """Create the spool; call ``lightened`` with the number of records that lost their envelopes."""
        self._most = size
        self._most_bytes = most_bytes
        self._changed = changed
        self._lightened = lightened
        self._lock = threading.Lock()
        self._slots: deque[_Slot] = deque()
        self._aside: deque[_Slot] = deque()
        self._reports: deque[_Slot] = deque()  # the slots that are reports, in order
        self._bytes = 0
        self.counts = SpoolCounts()

    def put(self, entries: Sequence[Entry]) -> bool:
        """Keep all of these entries or none; see Spool."""
        at = time.time()
        slots = [_Slot(at, entry, size_of(entry)) for entry in entries]
        with self._lock:
            lightened = 0
            more = self._bytes + sum(slot.size for slot in slots) - self._most_bytes
            fits = len(self._slots) + len(self._aside) + len(slots) <= self._most
            if fits and more > 0:
                # Free an eighth of the bound more than is needed, so that the next calls need not
                # search again.
                freed, lightened = self._lighten(self._slots, more + self._most_bytes // 8)
                if freed < more:
                    freed_here, here = self._lighten(slots, more - freed)
                    freed, lightened = freed + freed_here, lightened + here
                fits = freed >= more
            if not fits:
                self.counts.lost += len(entries)
            else:
                for slot in slots:
                    self._append(slot)
                self.counts.taken += len(slots)
        if lightened:
            self._lightened(lightened)
        if fits:
            self._changed()
        return fits

    def _append(self, slot: _Slot) -> None:
        self._slots.append(slot)
        self._bytes += slot.size
        if is_report(slot.entry):
            self._reports.append(slot)

    def _lighten(self, slots: Iterable[_Slot], wanted: int) -> tuple[int, int]:
        """Drop envelopes of records that workers can write as well; return the bytes and the number."""
        freed = count = 0
        for slot in slots:
            if freed >= wanted:
                break
            entry = slot.entry
            if not isinstance(entry, Delivery) or not is_adoptable(entry):
                continue
            slot.entry = Adoptable(entry.token, entry.job_id, entry.queue)
            freed += slot.size - size_of(slot.entry)
            slot.size = size_of(slot.entry)
            count += 1
        if slots is self._slots:
            self._bytes -= freed
        self.counts.adoptable += count
        return freed, count

    def peek(self, limit: int, size: int | None = None) -> Sequence[Entry]:
        """Return the oldest entries of one kind; see Spool."""
        with self._lock:
            found: list[Entry] = []
            total = 0
            for slot in self._slots:
                total += slot.size
                if len(found) == limit or (
                    found
                    and (
                        type(slot.entry) is not type(found[0])
                        or (size is not None and total > size)
                    )
                ):
                    break
                found.append(slot.entry)
            return found

    def drop(self, entries: Sequence[Entry]) -> None:
        """Remove these entries, which Postgres now has; see Spool."""
        with self._lock:
            for entry in entries:
                if self._slots and self._slots[0].entry is entry:
                    self._pop()
                    self.counts.replayed += 1
        self._changed()

    def _pop(self) -> _Slot:
        slot = self._slots.popleft()
        self._bytes -= slot.size
        if self._reports and self._reports[0] is slot:
            self._reports.popleft()
        return slot

    def set_aside(self, entry: Entry) -> None:
        """Move the first entry out of the way; see Spool."""
        with self._lock:
            if self._slots and self._slots[0].entry is entry:
                slot = self._pop()
                self._bytes += slot.size
                self._aside.append(slot)
                if len(self._aside) > _ASIDE:
                    self._bytes -= self._aside.popleft().size
                    self.counts.lost += 1
        self._changed()

    def aside(self) -> Sequence[Entry]:
        """Return the entries that were set aside; see Spool."""
        with self._lock:
            return [slot.entry for slot in self._aside]

    def drop_aside(self, entry: Entry, *, lost: bool) -> None:
        """Remove an entry that was set aside; see Spool."""
        with self._lock:
            for slot in self._aside:
                if slot.entry is entry:
                    self._aside.remove(slot)
                    self._bytes -= slot.size
                    self.counts.lost += lost
                    self.counts.replayed += not lost
                    break
        self._changed()

    def left(self) -> Sequence[Entry]:
        """Return all waiting entries; see Spool."""
        with self._lock:
            return [slot.entry for slot in (*self._aside, *self._slots)]

    def only_adoptable(self) -> bool:
        """Return True if all waiting entries are records of jobs that are in Redis; see Spool."""
        return all(isinstance(one, Adoptable) or is_adoptable(one) for one in self.left())

    @property
    def pending(self) -> int:
        """Return how many entries wait; see Spool."""
        return len(self._slots) + len(self._aside)

    @property
    def size(self) -> int:
        """Return how many bytes wait; see Spool."""
        return self._bytes

    def remove(self, tokens: Sequence[UUID]) -> None:
        """Remove the records of these deliveries; see Spool."""
        gone = frozenset(tokens)

        def stays(slot: _Slot) -> bool:
            return not (isinstance(slot.entry, Delivery | Adoptable) and slot.entry.token in gone)

        with self._lock:
            self._slots = deque(filter(stays, self._slots))
            self._aside = deque(filter(stays, self._aside))
            self._reports = deque(filter(stays, self._reports))
            self._bytes = sum(slot.size for slot in (*self._slots, *self._aside))
        self._changed()

    def waiting(self, job_ids: Sequence[str], queue: str | None) -> Sequence[UUID]:
        """Return the waiting deliveries with these ids, or to this queue; see Spool."""
        ids = frozenset(job_ids)
        with self._lock:
            return tuple(
                slot.entry.token
                for slot in (*self._aside, *self._slots)
                if isinstance(slot.entry, Delivery | Adoptable)
                and (slot.entry.job_id in ids or slot.entry.queue == queue)
            )

    def oldest(self) -> float | None:
        """Return when the oldest report was put in; see Spool."""
        with self._lock:
            return self._reports[0].at if self._reports else None

    def __len__(self) -> int:
        """Return how many entries wait for their turn."""
        return len(self._slots)
