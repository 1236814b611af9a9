"""Keep watch over the consumers of each source in Redis, also while this process does not lead.

A time in which nobody led is a time for which nobody can say that no unguarded worker ran a job. An
outage of Postgres is such a time for the ledger, but Redis answered, and this process saw its
consumers: if it leads next, it need not distrust the jobs of that time.

The proof needs Redis alone. Workers that started meanwhile are not in the ledger yet, and show by
their connections that they are guarded (Consumers.proved). Where connections cannot be counted,
there is no proof. While this process leads, its monitors report what they see (``saw``), so that the
watch of a process that loses the lease has no hole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import redis

from jobguard.errors import JobguardError
from jobguard.log import log_event
from jobguard.reconciler.trust import GAP

if TYPE_CHECKING:
    from jobguard.adapter import Broker
    from jobguard.store.protocols import SourceRow

_EVERY = 2.0
"""Seconds between two inspections."""
_REST = 20
"""An inspection takes about one part in so many of the time, if it takes long."""


@dataclass(slots=True)
class _Watch:
    row: SourceRow
    broker: Broker
    began: float | None = None
    """Since when no unguarded consumer was seen, without a pause."""
    seen_at: float = 0.0
    seen_once: frozenset[str] = field(default_factory=frozenset)


class Vigil:
    """The watches of one process over all of its sources; ``longest``: the longest pause of a watch."""

    def __init__(
        self,
        broker: Callable[[SourceRow], Broker | None],
        *,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = broker
        self._longest = longest
        self._clock = clock
        self._watches: dict[int, _Watch] = {}
        self._due = 0.0

    def watch(self, rows: Iterable[SourceRow]) -> None:
        """Watch these sources from now on, beside the others."""
        for row in rows:
            if row.id not in self._watches and (broker := self._broker(row)) is not None:
                self._watches[row.id] = _Watch(row, broker)

    def saw(self, row: SourceRow, consumers: Mapping[str, frozenset[str]]) -> None:
        """Record what a monitor of this process saw in an inspection of its own."""
        self.watch([row])
        if watch := self._watches.get(row.id):
            self._record(watch, self._clock(), consumers)

    def look(self, *, leads: bool = False) -> None:
        """Inspect the consumers of each source, if it is time. Raises nothing.

        ``leads``: the monitors of this process inspect them, unless an outage of Postgres or a long step
        keeps them from it.
        """
        now = self._clock()
        if now < self._due:
            return
        late = self._longest / 2 if leads else 0.0
        for watch in list(self._watches.values()):
            if now - watch.seen_at >= late:
                self._inspect(watch)
        # With thousands of queues this takes long; a pause of ``longest`` would end each watch.
        pause = min(self._longest / 4, _REST * (self._clock() - now))
        self._due = now + max(_EVERY, pause)

    def _inspect(self, watch: _Watch) -> None:
        now = self._clock()
        try:
            consumers = watch.broker.consumers()
        except (redis.RedisError, JobguardError, OSError, ValueError):
            return  # A long silence ends the watch by itself.
        except Exception as error:  # a value that cannot be read must not delay the next election
            part = f"vigil of {watch.row.address}"
            log_event("step_failed", part=part, error=str(error)[:500], exc_info=True)
            return
        self._record(watch, now, consumers)

    def _record(self, watch: _Watch, now: float, consumers: Mapping[str, frozenset[str]]) -> None:
        unguarded = _unguarded(consumers)
        if watch.began is None or now - watch.seen_at > self._longest:
            watch.began = now
        # A worker registers a moment before or after its connection has its name: one inspection
        # may err.
        passing: frozenset[str] = getattr(consumers, "passing", frozenset())
        if unguarded is None or (unguarded & watch.seen_once) - passing:
            watch.began = None
        watch.seen_at, watch.seen_once = now, unguarded or frozenset()

    def watched_for(self) -> float:
        """Return the seconds for which no source had an unguarded consumer; 0 if no source is watched."""
        now = self._clock()
        began = [watch.began for watch in list(self._watches.values())]
        return min((0.0 if at is None else now - at for at in began), default=0.0)

    def vouches(self, source: int, gap: float) -> bool:
        """Return True if no unguarded consumer took jobs in a gap of this many seconds that ends now.

        The watch must have begun before the gap, or no longer after it than two inspections are apart.
        """
        watch = self._watches.get(source)
        if watch is None or watch.began is None or watch.seen_once:
            return False
        now = self._clock()
        return now - watch.seen_at <= self._longest and now - watch.began >= gap - GAP


def _unguarded(consumers: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    """Return the consumers that do not prove that they are guarded; None: they cannot be counted."""
    if getattr(consumers, "uncounted", ""):
        return None
    names = frozenset().union(*consumers.values(), consumers.get("", frozenset()))
    return names - getattr(consumers, "proved", frozenset())
