"""Which queues have only guarded consumers, and since when.

What an unguarded worker ran, nobody reported: to us it would look lost, and be run again. So a queue
is recovered only for what was recorded since it was *clean*: since no unguarded consumer has been seen
by a leader that was looking all the time. ``trusted_since`` outlives the workers: a queue scaled to
zero is restored too.

What was recorded before is vouched for after a queue has become trusted: what Redis still has then,
nobody has run. What is absent then stays a suspect of the cause ``untrusted``, which nothing ever recovers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from jobguard.store import QueueRow

_SETTLE = 30.0
"""Seconds without an unguarded consumer before a queue is clean again."""
_SETTLE_AFTER_LOSS = 600.0
"""After Redis lost its registry of workers, an unguarded one could be there unseen: RQ registers a
worker at its birth alone, and its entry would have lived this long."""


@dataclass(slots=True)
class Trust:
    """What is known of the consumers of one source's queues."""

    source: int
    watching_since: float
    """Seconds since the epoch, by the database's clock: since when this leader has looked."""
    rows: dict[str, QueueRow] = field(default_factory=dict)
    _guarded: set[str] = field(default_factory=set)
    _seen_once: dict[str, frozenset[str]] = field(default_factory=dict)
    _lost_at: float = float("-inf")

    def load(self, rows: Iterable[QueueRow]) -> None:
        """Take over what earlier leaders knew."""
        self.rows = {row.queue: row for row in rows}

    def registry_lost(self, now: float) -> None:
        """Redis lost data, and with it the library's registry of workers."""
        self._lost_at = now

    def trusts(self, queue: str, recorded_at: float) -> bool:
        """Whether what was recorded then in this queue was only ever seen by guarded consumers."""
        row = self.rows.get(queue)
        return (
            row is not None and row.trusted_since is not None and recorded_at >= row.trusted_since
        )

    def to_vouch_for(self) -> list[str]:
        """Queues that are trusted, but whose older deliveries nobody has looked at yet."""
        return [queue for queue, row in self.rows.items() if row.trusted_since]

    def vouched(self, queue: str) -> QueueRow:
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
    ) -> list[QueueRow]:
        """Take a look at who consumes what; returns the rows that changed.

        ``consumers``: the library's names of all workers by queue; ``guarded``: those that beat.
        """
        changed = []
        self._guarded = {queue for queue, names in guarded.items() if names}
        for queue in {*queues, *consumers, *guarded, *self.rows}:
            before = self.rows.get(queue)
            row = before or QueueRow(self.source, queue)
            strangers = consumers.get(queue, frozenset()) - guarded.get(queue, frozenset())
            # A worker is registered a moment before or after its first beat: one look may err.
            certain = strangers & self._seen_once.get(queue, frozenset())
            self._seen_once[queue] = strangers
            known = before is not None and before.unguarded == tuple(sorted(certain))
            if certain and known and now - (row.unguarded_at or 0.0) < _SETTLE / 3:
                pass  # written down a moment ago
            elif certain:
                row = QueueRow(
                    self.source, queue, unguarded=tuple(sorted(certain)), unguarded_at=now
                )
            elif not strangers:
                row = self._clean(row, now)
                if row.trusted_since is None and row.clean_since and queue in self._guarded:
                    row = replace(row, trusted_since=row.clean_since)
            self.rows[queue] = row
            if row != before:
                changed.append(row)
        return changed

    def _clean(self, row: QueueRow, now: float) -> QueueRow:
        """Decide since when it may be believed that no stranger is there."""
        if row.clean_since is not None:
            return row
        if row.unguarded_at is None:
            return replace(row, clean_since=self.watching_since)
        settle = _SETTLE if self._lost_at < row.unguarded_at else _SETTLE_AFTER_LOSS
        if now - max(row.unguarded_at, self._lost_at) < settle:
            return row
        return replace(row, clean_since=now, unguarded=())
