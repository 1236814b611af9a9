"""Which queues have only guarded consumers, and since when.

What an unguarded worker ran, nobody reported: to us it would look lost, and be run again. So a queue
is recovered only for what was recorded since it was *clean*: since no unguarded consumer has been seen
by a leader that was looking all the time. ``trusted_since`` outlives the workers: a queue scaled to
zero is restored too.

What was recorded before is vouched for after a queue has become trusted: what Redis still has then,
nobody has run. What is absent then stays a suspect of the cause ``untrusted``: only a person puts it back.

The rules, where they meet:

- Where no unguarded consumer was ever seen, and the consumers can be counted, a queue is clean from the
  first look on, with or without a guarded worker.
- A time without a leader is a gap. After a gap of more than some seconds a trusted queue is trusted for
  what is recorded from then on, and the older deliveries are vouched for as above.
- A gap does not matter for what Redis itself lost: what is absent after a confirmed loss is restored
  where no unguarded consumer was ever seen, or where the gap was no longer than a change of leaders takes.
- A consumer that one look saw for the first time may be a guarded one that is just starting. The queue
  stays trusted, but nothing of it is restored before the next look.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from jobguard.store.protocols import QueueRow

_QUIET = 30.0
"""Seconds without an unguarded consumer before a queue is clean again."""
_QUIET_AFTER_LOSS = 600.0
"""After Redis lost its registry of workers, an unguarded one could be there unseen: RQ registers a
worker at its birth alone, and its entry would have lived this long."""
_GAP = 5.0
"""Seconds without a leader after which the older deliveries are vouched for again."""


@dataclass(slots=True)
class Trust:
    """What is known of the consumers of one source's queues."""

    source: int
    watching_since: float
    """Seconds since the epoch, by the database's clock: since when this leader has looked."""
    watched_until: float | None = None
    """The same clock: when the leader before looked last; None: there was none."""
    change_of_leaders: float = 18.0
    """Seconds that a change of leaders may take; and for which one leader may not have looked."""
    rows: dict[str, QueueRow] = field(default_factory=dict)
    regained: set[str] = field(default_factory=set)
    """Queues that were trusted before the gap that this leader found."""
    _looked: float | None = None
    _long_gap: bool = False
    _doubted: set[str] = field(default_factory=set)
    _guarded: set[str] = field(default_factory=set)
    _seen_once: dict[str, frozenset[str]] = field(default_factory=dict)
    _lost_at: float = float("-inf")

    def load(self, rows: Iterable[QueueRow]) -> None:
        """Take over what earlier leaders knew."""
        self.rows = {row.queue: row for row in rows}

    def registry_lost(self, now: float) -> None:
        """Redis lost data, and with it the library's registry of workers."""
        self._lost_at = now

    def trusts(self, queue: str, recorded_at: float, *, lost: bool = False) -> bool:
        """Whether what was recorded then in this queue was only ever seen by guarded consumers.

        ``lost``: Redis has lost what it had then, as far as is known.
        """
        row = self.rows.get(queue)
        if row is None or row.trusted_since is None or queue in self._doubted:
            return False
        if recorded_at >= row.trusted_since:
            return True
        return lost and (row.unguarded_at is None or not self._long_gap)

    def backlogs_to_check(self) -> list[str]:
        """Queues that are trusted, but whose older deliveries nobody has looked at yet."""
        return [queue for queue, row in self.rows.items() if row.trusted_since]

    def backlog_checked(self, queue: str) -> QueueRow:
        """Its older deliveries have been looked at: from here on all of it is trusted."""
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
    ) -> list[QueueRow]:
        """Take a look at who consumes what; returns the rows that changed.

        ``consumers``: the library's names of all workers by queue; ``guarded``: those that beat;
        ``counted``: an unguarded consumer cannot have escaped this look.
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
            strangers = consumers.get(queue, frozenset()) - guarded.get(queue, frozenset())
            # A worker is registered a moment before or after its first beat: one look may err.
            certain = strangers & self._seen_once.get(queue, frozenset())
            self._seen_once[queue] = strangers
            (self._doubted.add if strangers else self._doubted.discard)(queue)
            known = before is not None and before.unguarded == tuple(sorted(certain))
            if certain and known and now - (row.unguarded_at or 0.0) < _QUIET / 3:
                pass  # written down a moment ago
            elif certain:
                row = QueueRow(
                    self.source, queue, unguarded=tuple(sorted(certain)), unguarded_at=now
                )
            elif not strangers:
                row = self._clean(row, now)
                sure = queue in self._guarded or (counted and row.unguarded_at is None)
                if row.trusted_since is None and row.clean_since and sure:
                    row = replace(row, trusted_since=row.clean_since)
            self.rows[queue] = row
            if row != before:
                changed.append(row)
        return changed

    def _gap(self, now: float) -> bool:
        """Whether somebody may have consumed unseen since the last look; this is a look."""
        before, self._looked = self._looked, now
        if before is not None:
            # This very leader: a step may take its time, but not as long as another could lead.
            self._long_gap = self._long_gap or now - before > self.change_of_leaders
            return now - before > self.change_of_leaders
        if self.watched_until is None:
            return False
        self._long_gap = now - self.watched_until > self.change_of_leaders
        return now - self.watched_until > _GAP

    def _clean(self, row: QueueRow, now: float) -> QueueRow:
        """Decide since when it may be believed that no stranger is there."""
        if row.clean_since is not None:
            return row
        if row.unguarded_at is None:
            return replace(row, clean_since=self.watching_since)
        quiet = _QUIET if self._lost_at < row.unguarded_at else _QUIET_AFTER_LOSS
        if now - max(row.unguarded_at, self._lost_at) < quiet:
            return row
        return replace(row, clean_since=now, unguarded=())
