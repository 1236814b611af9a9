"""What waits in a spool, told to a store: oldest first, by one thread at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jobguard.errors import BadRow, StoreUnavailable, is_host_interrupt
from jobguard.job import Delivery, End, Recorded
from jobguard.log import say
from jobguard.session import bare_end
from jobguard.spool import Cancelled, Entry, JoinOpened, Spool

if TYPE_CHECKING:
    from jobguard.adapter import Source
    from jobguard.circuit import Circuit
    from jobguard.store import HostStore

BATCH = 250
"""Entries of the spool that one call carries along: a host that comes by waits for no more."""


class Replay:
    """The way back from one process's spool. ``ended`` is called with the ends that a store has taken."""

    def __init__(
        self,
        source: Source,
        spool: Spool,
        circuit: Circuit,
        ready: Callable[[], HostStore],
        *,
        retry_interval: float,
        ended: Callable[[Sequence[End]], None],
    ) -> None:
        self._source = source
        self._spool = spool
        self._circuit = circuit
        self._ready = ready
        self._retry_interval = retry_interval
        self._ended = ended
        self._replaying = threading.Lock()
        self._draining = threading.Lock()

    def some(self, limit: int) -> int:
        """Give Postgres so many entries at most; returns how many it took."""
        if not self._replaying.acquire(blocking=False):
            return 0
        done = 0
        try:
            while done < limit and (entries := self._spool.peek(limit - done)):
                with self._circuit.calling():
                    self._each(self._ready(), entries)
                self._spool.drop(entries)
                done += len(entries)
        except StoreUnavailable:
            pass
        except Exception as error:
            if is_host_interrupt(error):
                raise
            say("guest_failed", where="replay", error=str(error), exc_info=True)
        finally:
            self._replaying.release()
        if done:
            say("spool_replayed", count=done, left=len(self._spool))
        return done

    def settle(self, patience: float) -> None:
        """Write all that waits, in so many seconds."""
        until = time.monotonic() + patience
        self._circuit.hurry()
        while len(self._spool):
            replayed = self.some(BATCH)
            if time.monotonic() >= until:
                break
            if not replayed:
                self._circuit.look()
                time.sleep(0.01)

    def drain(self) -> None:
        """See to it that all is written, in a thread of its own, should nobody come by."""
        if self._draining.acquire(blocking=False):
            threading.Thread(target=self._drain, name="jobguard-drain", daemon=True).start()

    def _drain(self) -> None:
        try:
            while len(self._spool):
                time.sleep(self._retry_interval / 4)
                if self._circuit.look():
                    self.some(BATCH)
        except Exception as error:
            say("guest_failed", where="drain", error=str(error), exc_info=True)
        finally:
            self._draining.release()

    def _each(self, store: HostStore, entries: Sequence[Entry]) -> None:
        """Replay these; one that is refused for what is in it does not keep the others waiting."""
        try:
            self._all(store, entries)
        except BadRow as error:
            if len(entries) > 1:
                for entry in entries:
                    self._each(store, [entry])
                return
            (entry,) = entries
            bare = bare_end(entry) if isinstance(entry, End) else entry
            self._spool.counts.quarantined += 1
            say("row_refused", job_id=getattr(entry, "job_id", ""), error=str(error))
            if bare != entry:
                self._each(store, [bare])

    def _all(self, store: HostStore, entries: Sequence[Entry]) -> None:
        source = self._source
        deliveries = [entry for entry in entries if isinstance(entry, Delivery)]
        ends = [entry for entry in entries if isinstance(entry, End)]
        for entry in entries:
            if isinstance(entry, Cancelled | JoinOpened):
                write_intent(store, source, entry, replay=True)
        if deliveries:
            store.record(source.id, deliveries, namespace=source.namespace, replay=True)
        if ends:
            store.end(source.id, ends)
            self._ended(ends)


def write_intent(
    store: HostStore, source: Source, entry: Cancelled | JoinOpened, *, replay: bool = False
) -> Recorded:
    """Write what a host meant, now or (``replay``) some time ago."""
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
        # What is recorded from now on is a new life, which nobody cancelled; and a network may keep
        # what we say as long as a spool. Told at once it means all that is there now.
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
