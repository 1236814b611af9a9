"""Entries that Postgres could not take, until it can: one class behind one interface.

This class keeps them in memory, up to a bound, and in the stream of the guarded Redis (stream.py),
so that they outlive the process. What the stream does not take is only in memory, until the stream
or Postgres takes it. Every entry is counted, and an entry without room is counted and logged:
nothing is dropped silently.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from jobguard.model import Delivery, End, Outcome, new_token
from jobguard.store.protocols import ClaimRequest


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


@dataclass(frozen=True, slots=True)
class Released:
    """A claim that its worker gave up, so that any worker can start the delivery again."""

    token: UUID
    worker: UUID
    number: int
    interrupted: bool = False
    """Its run began."""


@dataclass(frozen=True, slots=True)
class Unsent:
    """Recorded deliveries that a leader has to push."""

    tokens: Sequence[UUID]


Entry = Delivery | End | Cancelled | JoinOpened | Adoptable | Released | Unsent | ClaimRequest
"""A ClaimRequest is a start while Postgres is away. It is only in the stream, because the worker
that lives claims again by itself."""

_OVERHEAD = 500
"""Bytes that an entry takes in addition to its content."""
_COPIED_AT_ONCE = 250
"""The maximum number of entries that are copied to the stream in one call."""
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
    if isinstance(entry, Unsent):
        return _OVERHEAD + 100 * len(entry.tokens)
    if isinstance(entry, JoinOpened):
        return _OVERHEAD + len(entry.state) + len(entry.join)
    if isinstance(entry, Adoptable):
        return _OVERHEAD + len(entry.job_id) + len(entry.queue)
    return _OVERHEAD


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


def depends_on_order(entry: Entry) -> bool:
    """Return True if it has another effect when it is written before the entries before it."""
    if isinstance(entry, Cancelled):
        return bool(entry.job_ids) or entry.queue is not None
    return isinstance(entry, Released | Unsent)


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
        """Return the entries that would be lost with this process, those that were set aside first."""

    def only_adoptable(self) -> bool:
        """Return True if all of these are records of jobs that are in Redis."""

    def copy(self) -> bool:
        """Copy to the stream what is only in memory, oldest first; return True if nothing is.

        What Redis has lost since is copied once more.
        """

    @property
    def pending(self) -> int:
        """Return how many entries wait, including those that were set aside."""

    @property
    def size(self) -> int:
        """Return how many bytes wait."""

    def remove(self, tokens: Sequence[UUID]) -> bool:
        """Remove the records of these deliveries, which are withdrawn.

        Return False if one of them may be in the stream or in Postgres.
        """

    def waiting(self, job_ids: Sequence[str], queue: str | None) -> Sequence[UUID]:
        """Return the deliveries with these ids, or to this queue, that wait for their record."""

    def outcome_of(self, token: UUID) -> Outcome | None:
        """Return how this delivery has ended, by the entries that wait; None if none says so."""

    def oldest(self) -> float | None:
        """Return when the oldest report was put in, in seconds since the epoch; None if there is none."""

    def __len__(self) -> int:
        """Return how many entries wait for their turn, without those that were set aside."""


class Stream(Protocol):
    """The stream as a spool uses it; see jobguard.host.stream.ReportStream."""

    def append(self, entries: Sequence[Entry]) -> Sequence[bytes] | None:
        """Add these entries; return their ids, or None if not all of them are surely there."""

    def forget(self, ids: Sequence[bytes]) -> int:
        """Delete these entries; return how many were surely deleted now."""

    def has_lost(self) -> bool:
        """Return True once if Redis has lost entries of this process."""


@dataclass(slots=True)
class _Slot:
    at: float
    entry: Entry
    size: int
    id: bytes | None = None
    """Its id in the stream; None: it is only here."""
    gone: bool = False

    def is_record(self) -> bool:
        return isinstance(self.entry, Delivery | Adoptable)


class MemorySpool:
    """A spool in memory, bounded in entries and in bytes. ``changed`` is called after each change."""

    def __init__(
        self,
        size: int,
        changed: Callable[[], None] = lambda: None,
        *,
        most_bytes: int = 64 << 20,
        lightened: Callable[[int], None] = lambda _count: None,
        stream: Stream | None = None,
        left_to_stream: Callable[[Sequence[Entry]], None] = lambda _entries: None,
    ) -> None:
        """Create the spool.

        ``lightened`` is called with the number of records that lost their envelopes.
        ``left_to_stream`` is called with entries that only the stream has, for want of room here.
        """
        self._most = size
        self._most_bytes = most_bytes
        self._changed = changed
        self._lightened = lightened
        self._stream = stream
        self._left_to_stream = left_to_stream
        self._copying = threading.Lock()
        self._uncopied = 0
        self._lock = threading.Lock()
        self._slots: deque[_Slot] = deque()
        self._aside: deque[_Slot] = deque()
        self._reports: deque[_Slot] = deque()  # the slots that are reports, in order
        self._bytes = 0
        self.counts = SpoolCounts()

    def put(self, entries: Sequence[Entry]) -> bool:
        """Keep all of these entries or none; see Spool."""
        ids = self._append(entries)
        at = time.time()
        slots = [
            _Slot(at, entry, size_of(entry), id) for entry, id in zip(entries, ids, strict=True)
        ]
        copied = None not in ids
        with self._lock:
            fits, lightened = self._make_room(slots)
            if fits:
                for slot in slots:
                    self._append_slot(slot)
            if fits or copied:
                self.counts.taken += len(slots)
            else:
                self.counts.lost += len(slots)
        if lightened:
            self._lightened(lightened)
        if fits:
            self._changed()
        elif copied:
            self._left_to_stream(entries)
        return fits or copied

    def _append(self, entries: Sequence[Entry]) -> Sequence[bytes | None]:
        """Add these to the stream, after the entries before them; return their ids there."""
        if self._stream is not None and self._copy():
            ids = self._stream.append(entries)
            if ids is not None:
                return ids
        return [None] * len(entries)

    def copy(self) -> bool:
        """Copy to the stream what is only in memory, or what Redis has lost; see Spool."""
        if self.pending and self._stream is not None and self._stream.has_lost():
            with self._lock:
                for slot in (*self._aside, *self._slots):
                    self._uncopied += slot.id is not None
                    slot.id = None
        return self._copy()

    def _copy(self) -> bool:
        if not self._uncopied:
            return True
        if self._stream is None:
            return False
        with self._copying:
            while waiting := self._only_here():
                for start in range(0, len(waiting), _COPIED_AT_ONCE):
                    batch = [
                        slot for slot in waiting[start : start + _COPIED_AT_ONCE] if not slot.gone
                    ]
                    if batch and not self._copy_these(self._stream, batch):
                        return False
        return True

    def _only_here(self) -> list[_Slot]:
        with self._lock:
            return [slot for slot in (*self._aside, *self._slots) if slot.id is None]

    def _copy_these(self, stream: Stream, slots: Sequence[_Slot]) -> bool:
        ids = stream.append([slot.entry for slot in slots])
        if ids is None:
            return False
        with self._lock:
            for slot, id in zip(slots, ids, strict=True):
                slot.id = id
                self._uncopied -= not slot.gone
            late = [slot for slot in slots if slot.gone]
        self._forget(late)
        return True

    def _forget(self, slots: Iterable[_Slot]) -> bool:
        """Delete the copies of these in the stream; return True if surely none is left of any.

        What depends on the order stays. Records that a cancel means, or the claim that was released,
        may be before it in the stream, and only the leader writes it after them.
        """
        ids = [
            slot.id for slot in slots if slot.id is not None and not depends_on_order(slot.entry)
        ]
        return not ids or (self._stream is not None and self._stream.forget(ids) == len(ids))

    def _make_room(self, slots: Sequence[_Slot]) -> tuple[bool, int]:
        """Return whether these fit, and how many records lost their envelopes for that."""
        size = sum(slot.size for slot in slots)
        if not self._fit(len(slots), size):
            self._leave_records_to_stream(len(slots), size)
        more, lightened = self._bytes + size - self._most_bytes, 0
        fits = self._fit(len(slots), 0)
        if fits and more > 0:
            # Free an eighth of the bound more than is needed, so that the next calls need not
            # search again.
            freed, lightened = self._lighten(self._slots, more + self._most_bytes // 8)
            if freed < more:
                freed_here, here = self._lighten(slots, more - freed)
                freed, lightened = freed + freed_here, lightened + here
            fits = freed >= more
        return fits, lightened

    def _fit(self, count: int, size: int) -> bool:
        waiting = len(self._slots) + len(self._aside)
        return waiting + count <= self._most and self._bytes + size <= self._most_bytes

    def _leave_records_to_stream(self, count: int, size: int) -> None:
        """Drop the oldest records that the stream has, and an eighth of the bounds more than needed."""
        entries = len(self._slots) + len(self._aside) + count - self._most + self._most // 8
        freed = self._bytes + size - self._most_bytes + self._most_bytes // 8
        for slot in self._slots:
            if entries <= 0 and freed <= 0:
                break
            if slot.id is not None and slot.is_record():
                slot.gone = True
                entries, freed = entries - 1, freed - slot.size
        self._slots = deque(slot for slot in self._slots if not slot.gone)
        self._reports = deque(slot for slot in self._reports if not slot.gone)
        self._bytes = sum(slot.size for slot in (*self._aside, *self._slots))

    def _append_slot(self, slot: _Slot) -> None:
        self._slots.append(slot)
        self._bytes += slot.size
        self._uncopied += slot.id is None
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
        dropped = []
        with self._lock:
            for entry in entries:
                if self._slots and self._slots[0].entry is entry:
                    slot = self._pop()
                    self._let_go(slot)
                    dropped.append(slot)
                    self.counts.replayed += 1
        self._forget(dropped)
        self._changed()

    def _pop(self) -> _Slot:
        slot = self._slots.popleft()
        self._bytes -= slot.size
        if self._reports and self._reports[0] is slot:
            self._reports.popleft()
        return slot

    def _let_go(self, slot: _Slot) -> None:
        slot.gone = True
        self._uncopied -= slot.id is None

    def set_aside(self, entry: Entry) -> None:
        """Move the first entry out of the way; see Spool."""
        with self._lock:
            if self._slots and self._slots[0].entry is entry:
                slot = self._pop()
                self._bytes += slot.size
                self._aside.append(slot)
                if len(self._aside) > _ASIDE:
                    given_up = self._aside.popleft()
                    self._bytes -= given_up.size
                    self._let_go(given_up)
                    self.counts.lost += given_up.id is None
        self._changed()

    def aside(self) -> Sequence[Entry]:
        """Return the entries that were set aside; see Spool."""
        with self._lock:
            return [slot.entry for slot in self._aside]

    def drop_aside(self, entry: Entry, *, lost: bool) -> None:
        """Remove an entry that was set aside; see Spool."""
        with self._lock:
            found = next((slot for slot in self._aside if slot.entry is entry), None)
            if found is not None:
                self._aside.remove(found)
                self._bytes -= found.size
                self._let_go(found)
                self.counts.lost += lost
                self.counts.replayed += not lost
        if found is not None:
            self._forget([found])
        self._changed()

    def left(self) -> Sequence[Entry]:
        """Return the entries that would be lost with this process; see Spool."""
        with self._lock:
            return [slot.entry for slot in (*self._aside, *self._slots) if slot.id is None]

    def only_adoptable(self) -> bool:
        """Return True if all of these are records of jobs that are in Redis; see Spool."""
        return all(isinstance(one, Adoptable) or is_adoptable(one) for one in self.left())

    @property
    def pending(self) -> int:
        """Return how many entries wait; see Spool."""
        return len(self._slots) + len(self._aside)

    @property
    def size(self) -> int:
        """Return how many bytes wait; see Spool."""
        return self._bytes

    def remove(self, tokens: Sequence[UUID]) -> bool:
        """Remove the records of these deliveries; see Spool."""
        gone = frozenset(tokens)
        removed = []
        with self._lock:
            for slot in (*self._slots, *self._aside):
                if isinstance(slot.entry, Delivery | Adoptable) and slot.entry.token in gone:
                    self._let_go(slot)
                    removed.append(slot)
            self._slots = deque(slot for slot in self._slots if not slot.gone)
            self._aside = deque(slot for slot in self._aside if not slot.gone)
            self._reports = deque(slot for slot in self._reports if not slot.gone)
            self._bytes = sum(slot.size for slot in (*self._slots, *self._aside))
        self._changed()
        # A record that is not here may be in the stream alone, for want of room, or in Postgres.
        return self._forget(removed) and len(removed) == len(gone)

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

    def outcome_of(self, token: UUID) -> Outcome | None:
        """Return how this delivery has ended; see Spool."""
        for entry in self.left():
            if isinstance(entry, End) and entry.token == token:
                return entry.outcome
            if isinstance(entry, Delivery) and entry.parent and entry.parent.token == token:
                return entry.parent.outcome
        return None

    def oldest(self) -> float | None:
        """Return when the oldest report was put in; see Spool."""
        with self._lock:
            return self._reports[0].at if self._reports else None

    def __len__(self) -> int:
        """Return how many entries wait for their turn."""
        return len(self._slots)
