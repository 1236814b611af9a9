"""Decide which queues have only guarded consumers, and since when.

An unguarded worker reports nothing: a job that it ran looks lost, and would be run again. Therefore
a queue is only restored for deliveries that were recorded since it was *clean*: since then, a
leader that inspected the consumers all the time has seen no unguarded one. ``trusted_since``
outlives the workers: a queue scaled to zero is restored as well.

After a queue has become trusted, its older deliveries are checked: no worker has run a delivery
that Redis still has. A delivery that is absent then stays a suspect with the cause ``untrusted``,
and only a person restores it.

The detailed rules:

- If no unguarded consumer was ever seen, and the consumers can be counted, a queue is clean from
  the first inspection, with or without a guarded worker.
- A time without a leader is a gap, unless it is as short as the time between two inspections: an
  unguarded worker may have started, run jobs and stopped. After a gap a trusted queue is trusted for
  deliveries that are recorded from then on, and the older deliveries are checked as above.
- A gap does not matter for data that Redis itself lost: a delivery that is absent after a confirmed
  loss is restored if no unguarded consumer was ever seen, or if the gap was no longer than a change
  of leaders.
- A consumer that was seen in only one inspection may be a guarded one that is just starting. The
  queue stays trusted, but none of its deliveries is restored before the next inspection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from jobguard.store.protocols import QueueRow

_QUIET = 30.0
"""Seconds without an unguarded consumer before a queue is clean again."""
_QUIET_AFTER_LOSS = 600.0
"""Seconds after Redis lost its registry of workers, in which an unguarded worker could be unseen:
RQ registers a worker only at its start, and the entry would have lived this long."""
GAP = 3.0
"""Seconds without an inspection after which a new leader checks the older deliveries again: a leader
inspects the consumers every two seconds, and begins within one after an orderly change."""


@dataclass(slots=True)
class Trust:
    """The knowledge about the consumers of one source's queues."""

    source: int
    watching_since: float
    """Seconds since the epoch, by the database clock, since this leader has inspected the
    consumers."""
    watched_until: float | None = None
    """The last inspection of the leader before, on the same clock; None: there was no leader
    before."""
    change_of_leaders: float = 18.0
    """Seconds that a change of leaders may take, and that a leader may take between two
    inspections."""
    vouches: Callable[[float], bool] = lambda _gap: False
    """Whether no unguarded consumer was there in a gap of so many seconds that ends now; see vigil.py."""
    rows: dict[str, QueueRow] = field(default_factory=dict)
    regained: set[str] = field(default_factory=set)
    """Queues that were trusted before the gap that this leader found."""
    _observed_at: float | None = None
    _long_gap: bool = False
    _unsure: set[str] = field(default_factory=set)
    _guarded: set[str] = field(default_factory=set)
    _seen_once: dict[str, frozenset[str]] = field(default_factory=dict)
    _lost_at: float = float("-inf")

    def load(self, rows: Iterable[QueueRow]) -> None:
        """Take over the rows of earlier leaders."""
        self.rows = {row.queue: row for row in rows}

    def registry_lost(self, now: float) -> None:
        """Record that Redis lost data, and with it the library's registry of workers."""
        self._lost_at = now

    def trusts(self, queue: str, recorded_at: float, *, lost: bool = False) -> bool:
        """Return True if only guarded consumers were seen since a delivery of this queue was recorded.

        ``lost``: Redis is known to have lost its data since then.
        """
        row = self.rows.get(queue)
        if row is None or row.trusted_since is None or queue in self._unsure:
            return False
        if recorded_at >= row.trusted_since:
            return True
        return lost and (row.unguarded_at is None or not self._long_gap)

    def is_unsure(self, queue: str) -> bool:
        """Return True if a queue is trusted, and the next inspection of its consumers must confirm it."""
        row = self.rows.get(queue)
        return row is not None and row.trusted_since is not None and queue in self._unsure

    def backlogs_to_check(self) -> list[str]:
        """Return queues that are trusted, but whose older deliveries have not been checked."""
        return [queue for queue, row in self.rows.items() if row.trusted_since]

    def backlog_checked(self, queue: str) -> QueueRow:
        """Record that its older deliveries have been checked: from here on all of it is trusted."""
        row = replace(self.rows[queue], trusted_since=0.0)
        self.rows[queue] = row
        return row

    def observe(
        self,
        now: float,
        consumers: Mapping[str, frozenset[str]],
        guarded: Mapping[str, frozenset[str]],
        queues: Iterable[str],
        *,
        counted: bool = True,
        proved: frozenset[str] = frozenset(),
        expected: frozenset[str] = frozenset(),
        elsewhere: Mapping[str, frozenset[str]] = MappingProxyType({}),
    ) -> list[QueueRow]:
        """Compare the consumers of each queue with the guarded workers; return the rows that changed.

        ``consumers``: the names that the library gives all workers, by queue. ``guarded``: those
        that beat. ``counted``: every unguarded consumer is surely among the consumers. ``proved``: names
        that are guarded in any queue. ``expected``: names that may appear among these in a moment, or
        that may belong to no consumer.
        ``elsewhere``: consumers, by queue, that take the jobs of this source from another Redis.
        """
        changed = []
        gap = self._gap(now)
        self._guarded = {queue for queue, names in guarded.items() if names}
        for queue in {*queues, *consumers, *guarded, *self.rows}:
            before = self.rows.get(queue)
            row = before or QueueRow(self.source, queue)
            if gap and row.clean_since is not None:
                if row.trusted_since is not None:
                    row = replace(row, trusted_since=now)
                    self.regained.add(queue)
                row = replace(row, clean_since=now)
            unguarded = consumers.get(queue, frozenset()) - guarded.get(queue, frozenset()) - proved
            unguarded |= elsewhere.get(queue, frozenset())
            # A worker is registered a moment before or after its first beat: one inspection may
            # err.
            certain = (unguarded & self._seen_once.get(queue, frozenset())) - expected
            self._seen_once[queue] = unguarded
            (self._unsure.add if unguarded else self._unsure.discard)(queue)
            known = before is not None and before.unguarded == tuple(sorted(certain))
            if certain and known and now - (row.unguarded_at or 0.0) < _QUIET / 3:
                pass  # It was recorded a moment ago.
            elif certain:
                row = QueueRow(
                    self.source, queue, unguarded=tuple(sorted(certain)), unguarded_at=now
                )
            elif not unguarded:
                row = self._clean(row, now)
                sure = queue in self._guarded or (counted and row.unguarded_at is None)
                if row.trusted_since is None and row.clean_since and sure:
                    row = replace(row, trusted_since=row.clean_since)
            self.rows[queue] = row
            if row != before:
                changed.append(row)
        return changed

    def _gap(self, now: float) -> bool:
        """Record an inspection; return True if an unseen worker may have consumed since the last one."""
        before, self._observed_at = self._observed_at, now
        if before is not None:
            # The same leader: a step may be slow, but not so slow that another process could lead.
            # During an outage of Postgres no process can lead, and this one watches the consumers.
            long = now - before > self.change_of_leaders and not self.vouches(now - before)
            self._long_gap = self._long_gap or long
            return long
        if self.watched_until is None:
            return False
        self._long_gap = now - self.watched_until > self.change_of_leaders
        return now - self.watched_until > GAP

    def _clean(self, row: QueueRow, now: float) -> QueueRow:
        """Set the time from which the queue surely has no unguarded consumer."""
        if row.clean_since is not None:
            return row
        if row.unguarded_at is None:
            return replace(row, clean_since=self.watching_since)
        quiet = _QUIET if self._lost_at < row.unguarded_at else _QUIET_AFTER_LOSS
        if now - max(row.unguarded_at, self._lost_at) < quiet:
            return row
        return replace(row, clean_since=now, unguarded=())
