"""Write to Postgres what waits in the stream of a source, in order, before absence is judged.

What is read is written as the host processes would write it. Writing an entry twice changes nothing:
a record of a delivery that is known or has ended is skipped, an end of an ended delivery is late, and
a claim is known by its nonce. So an entry is deleted only after Postgres has it, and it does not matter
which leader, old or new, wrote it, or whether its process wrote it too.

Entries are read in chunks. Inside a chunk, records come before claims and claims before ends, between
the entries whose effect depends on their place (cancels, joins, releases).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobguard.host.circuit import Circuit
from jobguard.host.replay import BATCH, Replay
from jobguard.host.spool import Adoptable, Entry, SpoolCounts, size_of
from jobguard.host.stream_entries import UnknownEntry, decode
from jobguard.log import log_event
from jobguard.model import Delivery, End
from jobguard.store.protocols import ClaimRequest

if TYPE_CHECKING:
    from jobguard.adapter import Source
    from jobguard.host.stream import ReportStream
    from jobguard.store.protocols import HostStore

_CHUNK = 1000
"""Entries that are read at once."""
_CHUNK_BYTES = 8 << 20
_BUDGET = 1.0
"""Seconds of one step, so that the pulse and the lease are looked after between two steps."""
_RETRY = 1.0


class StreamDrain:
    """Drains the stream of one source while this process leads."""

    def __init__(
        self,
        stream: ReportStream,
        host: HostStore,
        source: Source,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._clock = clock
        self._reader = _StreamSpool(stream, str(source))
        self._circuit = Circuit(host.probe, retry_interval=_RETRY, on_change=self._circuit_changed)
        self._replay = Replay(
            source,
            self._reader,
            self._circuit,
            lambda: host,
            retry_interval=_RETRY,
            announces=False,
            stream=stream,
        )
        self._began: float | None = None
        self._written = 0
        self.stalled = False
        """True if the last step wrote nothing although entries wait: Postgres is away, or refuses."""

    def step(self) -> bool:
        """Write entries for a bounded time; return True if all that was there at the start is written.

        Raises RedisError. If Postgres is away, the entries stay.
        """
        began = self._clock()
        self.stalled = False
        self._reader.read()
        while len(self._reader) and self._clock() - began < _BUDGET:
            if self._began is None:
                self._began = began
            written = self._replay.some(BATCH)
            self._written += written
            if not written:
                self.stalled = True
                return False
            self._reader.read()
        if not len(self._reader):
            self._replay.some(BATCH)  # an entry that was set aside may be due
            self._note_drained()
        return not len(self._reader)

    def take_references(self) -> bool:
        """Return True if references were drained since the last call: the jobs have no records yet."""
        found, self._reader.references = self._reader.references, 0
        return found > 0

    def _circuit_changed(self, closed: bool) -> None:
        if not closed:
            log_event("postgres_away", error=self._circuit.why)

    def _note_drained(self) -> None:
        if self._began is not None:
            seconds = round(self._clock() - self._began, 1)
            log_event(
                "stream_drained", source=str(self._source), count=self._written, seconds=seconds
            )
        self._began, self._written = None, 0


class _StreamSpool:
    """The stream as a spool that Replay writes."""

    def __init__(self, stream: ReportStream, name: str) -> None:
        self.counts = SpoolCounts()
        self.references = 0
        self._stream = stream
        self._name = name
        self._after = b""
        self._keys: dict[int, list[bytes]] = {}
        """By entry (its ``id``): its ids in the stream, which may have it twice."""
        self._entries: list[Entry] = []
        self._aside: list[Entry] = []
        self._unreadable: dict[bytes, str] = {}

    def read(self) -> None:
        """Read the next chunk, if the last one is written."""
        if self._entries:
            return
        found = self._stream.read(self._after, _CHUNK)
        if not found and self._has_older_entries():
            # The ids begin again if the clock of Redis went back, or another Redis is the primary.
            self._after, self._unreadable = b"", {}
            found = self._stream.read(self._after, _CHUNK)
        held = {key for entry in self._aside for key in self._keys[id(entry)]}
        entries, total = [], 0
        for key, raw in found:
            self._after = key
            if key in held:
                continue
            try:
                entry = decode(raw)
            except UnknownEntry as error:
                self._note_unreadable(key, str(error))
                continue
            self._keys[id(entry)] = [key]
            entries.append(entry)
            total += len(raw)
            if total > _CHUNK_BYTES:
                break
        self._entries = list(self._in_order(entries))

    def _has_older_entries(self) -> bool:
        length = self._stream.length() if self._after else None
        if length is None:
            return False
        if not length[0]:
            self._after = b""
        return length[0] > len(self._unreadable) + len(self._aside)

    def _note_unreadable(self, key: bytes, error: str) -> None:
        if not self._unreadable:
            log_event("stream_left", source=self._name, error=error)
        self._unreadable[key] = error

    def _in_order(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield the entries, sorted by kind between those whose place matters."""
        segment: list[Entry] = []
        for entry in entries:
            if isinstance(entry, Delivery | End | Adoptable | ClaimRequest):
                segment.append(entry)
                continue
            yield from self._sorted(segment)
            segment = []
            yield entry
        yield from self._sorted(segment)

    def _sorted(self, segment: Sequence[Entry]) -> Iterator[Entry]:
        records: dict[UUID, Delivery] = {}
        ended = {entry.token: entry for entry in segment if isinstance(entry, End)}
        needless: list[Entry] = []
        for entry in segment:
            if isinstance(entry, Delivery):
                if entry.token in records:
                    self._share(records[entry.token], entry)
                else:
                    records[entry.token] = entry
            elif isinstance(entry, Adoptable):
                self.references += entry.token not in ended
                needless.append(entry)
            elif isinstance(entry, ClaimRequest) and entry.token in ended:
                self._share(ended[entry.token], entry)
        yield from records.values()
        yield from needless
        yield from (
            one for one in segment if isinstance(one, ClaimRequest) and one.token not in ended
        )
        yield from (one for one in segment if isinstance(one, End))

    def _share(self, entry: Entry, other: Entry) -> None:
        """Delete the other one together with this one, which says all that it says."""
        self._keys[id(entry)] += self._keys.pop(id(other))

    # -- what Replay asks of a spool ---------------------------------------------------------------

    def peek(self, limit: int, size: int | None = None) -> Sequence[Entry]:
        """Return the next entries, all of one kind; see Spool."""
        found: list[Entry] = []
        total = 0
        for entry in self._entries[:limit]:
            total += size_of(entry)
            other = bool(found) and type(entry) is not type(found[0])
            if other or (found and size is not None and total > size):
                break
            found.append(entry)
        return found

    def drop(self, entries: Sequence[Entry]) -> None:
        """Delete these from the stream: Postgres has them."""
        self.counts.replayed += len(entries)
        self._entries = self._entries[len(entries) :]
        self._forget(entries)

    def set_aside(self, entry: Entry) -> None:
        """Leave the first entry in the stream, and go on with the others; see Spool."""
        self._entries = self._entries[1:]
        self._aside.append(entry)

    def aside(self) -> Sequence[Entry]:
        """Return the entries that were set aside."""
        return list(self._aside)

    def drop_aside(self, entry: Entry, *, lost: bool) -> None:
        """Delete an entry that was set aside; see Spool."""
        self._aside = [one for one in self._aside if one is not entry]
        self.counts.lost += lost
        self._forget([entry])

    def _forget(self, entries: Sequence[Entry]) -> None:
        keys = [key for entry in entries for key in self._keys.pop(id(entry), ())]
        # If Redis does not answer now, they stay there, and the next walk writes them once more.
        self._stream.forget(keys)

    def copy(self) -> bool:
        """Return True: everything is in the stream."""
        return True

    @property
    def pending(self) -> int:
        """Return how many entries of the chunk wait, with those that were set aside."""
        return len(self._entries) + len(self._aside)

    @property
    def size(self) -> int:
        """Return how many bytes of the chunk wait."""
        return sum(map(size_of, self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a stream is only read: {name}")
