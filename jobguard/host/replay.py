"""Write the entries of a spool to a store: oldest first, by one thread at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jobguard.errors import (
    BreakerOpen,
    NoRights,
    NotMigrated,
    StoreUnavailable,
    WrongInstallation,
    is_host_interrupt,
)
from jobguard.host.session import bare_end
from jobguard.host.spool import Cancelled, Entry, JoinOpened, Released, Spool, Unsent, size_of
from jobguard.host_safety import contain_errors
from jobguard.locks import Turn
from jobguard.log import log_event
from jobguard.model import Delivery, End, Recorded
from jobguard.store.protocols import ClaimRequest

if TYPE_CHECKING:
    from uuid import UUID

    from jobguard.adapter import Source
    from jobguard.host.circuit import Circuit
    from jobguard.host.stream import ReportStream
    from jobguard.store.protocols import HostStore

BATCH = 250
"""The maximum number of spool entries that one call of the host writes along with its own work."""
_BYTES = 1 << 20
"""The maximum number of bytes of them."""
_STRIKES = 2
"""How often an entry may fail, while Postgres answers other calls, before it is set aside."""
_TRIES = 8
"""How often an entry that was set aside is tried again before it is given up."""
_AGAIN = 10.0
"""Seconds until its first new try; the pause doubles each time, up to 10 minutes."""
_LONGEST = 30.0
"""The maximum seconds between two tries of the draining thread."""
_LEAST = 0.2
"""Seconds for a check whether Postgres is back, where a longer wait is no use."""


class Replay:
    """Writes one process's spool to a store.

    ``ended`` is called with the ends that the store has taken. ``stream``: what other processes reported.
    """

    def __init__(
        self,
        source: Source,
        spool: Spool,
        circuit: Circuit,
        ready: Callable[[], HostStore],
        *,
        retry_interval: float,
        ended: Callable[[Sequence[End]], None] = lambda _ends: None,
        stream: ReportStream | None = None,
        announces: bool = True,
    ) -> None:
        self._source = source
        self._spool = spool
        self._circuit = circuit
        self._ready = ready
        self._retry_interval = retry_interval
        self._ended = ended
        self._stream = stream
        self._announces = announces  # each batch in the log
        self._replaying = Turn()
        self._draining = threading.Lock()
        self._failing = False
        self._most = BATCH
        self._strikes = 0
        self._tried: dict[
            int, tuple[int, float]
        ] = {}  # by entry: the number of tries, and the time of the next

    def some(self, limit: int) -> int:
        """Write at most this many entries to Postgres; return how many it took."""
        if not self._replaying.take(0):
            return 0
        try:
            done = 0
            aside = len(self._spool.aside())
            began = self._spool.size
            while done < limit and began - self._spool.size < _BYTES:
                entries = self._spool.peek(min(limit - done, self._most), _BYTES)
                if not entries:
                    break
                if self._write(entries):
                    self._spool.drop(entries)
                    done += len(entries)
            if not len(self._spool):
                done += self._retry_set_aside()
            self._failing = False
        except (StoreUnavailable, WrongInstallation):
            self._spool.copy()
        except Exception as error:
            if is_host_interrupt(error):
                raise
            if not self._failing:
                log_event("guest_failed", where="replay", error=str(error), exc_info=True)
            self._failing = True
        finally:
            self._replaying.free()
        if done and self._announces:
            log_event("spool_replayed", count=done, left=self._spool.pending)
        if aside and not self._spool.aside():
            log_event("aside_written")
        return done

    def remove(self, tokens: Sequence[UUID], *, patience: float) -> bool:
        """Remove the records of these from the spool; see Spool.remove.

        A record that another thread is just writing is waited for: it is in Postgres after that.
        """
        waited = self._replaying.take(patience)
        try:
            return self._spool.remove(tokens) and waited
        finally:
            if waited:
                self._replaying.free()

    def _write(self, entries: Sequence[Entry]) -> bool:
        """Write these entries; return False if the first was set aside. Raises StoreUnavailable.

        After a failure, fewer entries are written at a time, and finally one. An entry that fails
        while Postgres answers other calls must not block all the others for ever, for any reason.
        """
        if not self._strikes:
            try:
                with self._circuit.calling():
                    self._each(self._ready(), entries)
            except (BreakerOpen, NotMigrated, NoRights):
                raise
            except StoreUnavailable:
                self._most = max(1, len(entries) // 4)
                self._strikes = 1 if len(entries) == 1 else 0
                raise
        else:
            with self._circuit.calling():
                self._ready().now()
            entry = entries[0]
            try:
                self._each(self._ready(), [entry])  # outside the circuit: it is the entry's failure
            except StoreUnavailable as error:
                self._strikes += 1
                if self._strikes <= _STRIKES:
                    raise
                self._strikes = 0
                self._spool.set_aside(entry)
                log_event(
                    "entry_set_aside",
                    job_id=getattr(entry, "job_id", ""),
                    kind=type(entry).__name__,
                    bytes=size_of(entry),
                    aside=len(self._spool.aside()),
                    error=str(error),
                )
                return False
            self._strikes = 0
        self._most = min(BATCH, self._most * 2)
        return True

    def _retry_set_aside(self) -> int:
        """Try the next entry that was set aside, if it is due; return how many were written."""
        now = time.monotonic()
        known = {id(entry): entry for entry in self._spool.aside()}
        self._tried = {which: self._tried.get(which, (0, now + _AGAIN)) for which in known}
        due = [which for which, (_, at) in self._tried.items() if at <= now]
        if not due:
            return 0
        entry = known[due[0]]
        tries = self._tried[due[0]][0] + 1
        with self._circuit.calling():
            self._ready().now()
        try:
            self._each(self._ready(), [entry])
        except StoreUnavailable as error:
            self._tried[due[0]] = (tries, now + min(600.0, _AGAIN * 2**tries))
            if tries >= _TRIES:
                self._spool.drop_aside(entry, lost=True)
                log_event("entry_given_up", job_id=getattr(entry, "job_id", ""), error=str(error))
            return 0
        self._spool.drop_aside(entry, lost=False)
        return 1

    def drain_for(self, patience: float) -> None:
        """Write all waiting entries within this many seconds.

        If Postgres has been away for longer than ``patience`` already, wait only as long as one
        check takes.
        """
        if not self._circuit.closed and self._circuit.open_for() > patience:
            patience = min(patience, _LEAST)
        until = time.monotonic() + patience
        self._circuit.end_pause()
        # What the stream has is safe: a process that ends need not wait for Postgres.
        while len(self._spool) and (self._circuit.closed or not self._spool.copy()):
            replayed = self.some(BATCH)
            if time.monotonic() >= until:
                break
            if not replayed:
                self._circuit.check()
                time.sleep(0.01)

    def drain(self) -> None:
        """Write all entries in a thread that ends by itself, even if the host makes no call."""
        if not self._draining.acquire(blocking=False):
            return
        try:
            threading.Thread(target=self._drain, name="jobguard-drain", daemon=True).start()
        except (
            RuntimeError
        ):  # the interpreter ends, or no thread can be started: the host's calls write them
            self._draining.release()

    def _drain(self) -> None:
        try:
            with contain_errors("drain"):
                self._drain_all()
        finally:
            self._draining.release()
        if self._spool.pending:
            self.drain()  # an entry came after the last check

    def _drain_all(self) -> None:
        pause = self._retry_interval / 4
        while self._spool.pending:
            time.sleep(pause)
            if not self._circuit.check():
                self._spool.copy()
                continue
            if self.some(BATCH):
                pause = self._retry_interval / 4
                while self.some(BATCH):
                    pass
            elif len(self._spool):  # Postgres accepts connections, and refuses statements
                pause = min(2 * pause, _LONGEST)
            else:  # entries that were set aside have their own times
                pause = self._retry_interval

    def _each(self, store: HostStore, entries: Sequence[Entry]) -> None:
        """Replay these entries; an entry that is refused for its content does not block the others."""
        try:
            self._all(store, entries)
        except StoreUnavailable:
            raise
        except Exception as error:
            if is_host_interrupt(error):
                raise
            if len(entries) > 1:
                for entry in entries:
                    self._each(store, [entry])
                return
            (entry,) = entries
            bare = bare_end(entry) if isinstance(entry, End) else entry
            self._spool.counts.quarantined += 1
            log_event("row_refused", job_id=getattr(entry, "job_id", ""), error=str(error))
            if bare != entry:
                self._each(store, [bare])

    def _all(self, store: HostStore, entries: Sequence[Entry]) -> None:
        source = self._source
        deliveries = [entry for entry in entries if isinstance(entry, Delivery)]
        ends = [entry for entry in entries if isinstance(entry, End)]
        for entry in entries:
            if isinstance(entry, Cancelled | JoinOpened):
                write_cancellation(store, source, self._with_set_aside_tokens(entry), replay=True)
            elif isinstance(entry, Released):
                store.release(
                    source.id,
                    entry.token,
                    entry.worker,
                    number=entry.number,
                    interrupted=entry.interrupted,
                )
            elif isinstance(entry, Unsent):
                store.outbox(source.id, entry.tokens)
            elif isinstance(entry, ClaimRequest):
                store.claim(source.id, entry)
        late = self._stream.late_retries(deliveries) if self._stream is not None else frozenset()
        if late:
            store.refuse(source.id, [one for one in deliveries if one.token in late])
            deliveries = [one for one in deliveries if one.token not in late]
        if deliveries:
            write_late(store, source, deliveries)
        if ends:
            store.end(source.id, ends)
            self._ended(ends)

    def _with_set_aside_tokens(self, entry: Cancelled | JoinOpened) -> Cancelled | JoinOpened:
        """Add the tokens of records that a cancel meant and that are set aside, so written later."""
        if not isinstance(entry, Cancelled) or not entry.waiting:
            return entry
        aside = {one.token for one in self._spool.aside() if isinstance(one, Delivery)}
        meant = aside.intersection(entry.waiting)
        return replace(entry, tokens=(*entry.tokens, *meant)) if meant else entry


def write_late(
    store: HostStore, source: Source, deliveries: Sequence[Delivery], *, newest: bool = False
) -> None:
    """Record deliveries that were pushed before. A refused one gets a tombstone and does not run."""
    recorded = store.record(
        source.id, deliveries, namespace=source.namespace, replay=True, newest=newest
    )
    refused = [delivery for delivery in deliveries if delivery.token in recorded.refused]
    if refused:
        store.refuse(source.id, refused)


def write_cancellation(
    store: HostStore, source: Source, entry: Cancelled | JoinOpened, *, replay: bool = False
) -> Recorded:
    """Write a cancel or a join, now or (``replay``) some time after it was requested."""
    if isinstance(entry, Cancelled):
        _cancel(store, source.id, entry, replay=replay)
        return Recorded()
    if entry.closed:
        store.close_join(source.id, entry.join)
        return Recorded()
    leader_live = store.open_join(
        source.id,
        entry.join,
        size=entry.size,
        state=entry.state,
        namespace=source.namespace,
    )
    return Recorded(leader_live=leader_live)


def _cancel(store: HostStore, source: int, entry: Cancelled, *, replay: bool) -> None:
    meant = None
    if entry.job_ids or entry.queue is not None:
        # Records from now on are a new life of the job, which was not cancelled. A network may
        # delay a statement as long as a spool does. A cancel that is not a replay means all
        # deliveries that are there now.
        meant = store.now() - (entry.age if replay else 0.0)
    store.cancel(
        source,
        tokens=entry.tokens,
        job_ids=entry.job_ids,
        queue=entry.queue,
        meant=meant,
        until=entry.until if replay else None,
        waiting=entry.waiting if replay else (),
    )
