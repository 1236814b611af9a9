"""Vouching for what was recorded before anybody watched a queue.

What Redis still has, nobody has run. What is absent, an unguarded worker may have run: it becomes a
suspect of the cause ``untrusted``, which only a person puts back. Not so what Redis has lost, as far as is
known, and what a leader saw absent before the gap in which nobody watched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from jobguard.adapter import Broker
from jobguard.log import log_event
from jobguard.model import Cause, Owed, Presence
from jobguard.reconciler.pulse import PulseKeeper
from jobguard.reconciler.result import reported_absent
from jobguard.reconciler.trust import Trust
from jobguard.store.protocols import LeaderStore


@dataclass(slots=True)
class _Walk:
    queue: str
    epoch: UUID | None
    unpushed: set[UUID]
    after: UUID | None = None
    absent: list[tuple[UUID, Cause, str]] = field(default_factory=list)


class BacklogTrust:
    """Walks over the older deliveries of newly trusted queues, a page a step."""

    def __init__(
        self,
        broker: Broker,
        store: LeaderStore,
        source: int,
        trust: Trust,
        pulse: PulseKeeper,
        *,
        page: int,
        lost: Callable[[str, float], bool],
    ) -> None:
        """``lost``: whether a delivery of this queue and age may be trusted to have been lost."""
        self._lost = lost
        self._broker = broker
        self._store = store
        self._source = source
        self._trust = trust
        self._pulse = pulse
        self._page = page
        self._walk: _Walk | None = None

    def step(self, term: int, *, in_incident: bool) -> None:
        """Look at one page; nothing of a walk counts if Redis has lost anything meanwhile."""
        if self._walk is None:
            queues = self._trust.backlogs_to_check()
            if not queues:
                return
            self._walk = _Walk(queues[0], self._pulse.epoch, self._unpushed())
        walk = self._walk
        if in_incident or walk.epoch != self._pulse.epoch:
            self._walk = None
            return
        if not self._inspect_page(walk):
            return
        self._walk = None
        if self._pulse.stands():  # else it was flushed under our eyes: again, when that is over
            self._conclude(term, walk)

    def _inspect_page(self, walk: _Walk) -> bool:
        """Look at the next page; True if it was the last."""
        page = self._store.page(self._source, after=walk.after, limit=self._page)
        watched_for = self._store.now() - (self._trust.rows[walk.queue].clean_since or 0.0)
        old = [
            owed
            for owed in page
            if owed.queue == walk.queue
            and owed.age > watched_for
            and owed.claim_number is None
            and owed.token not in walk.unpushed
            and not self._was_absent(owed, watched_for)
            and not self._lost(owed.queue, owed.age)
        ]
        seen = self._broker.presence(old) if old else {}
        walk.absent += [
            (owed.token, Cause.UNTRUSTED, seen[owed.token].mark)
            for owed in old
            if seen[owed.token].presence is Presence.ABSENT
        ]
        if len(page) < self._page:
            return True
        walk.after = page[-1].token
        return False

    def _was_absent(self, owed: Owed, watched_for: float) -> bool:
        """Whether a leader saw it absent while the queue was trusted, before the present gap."""
        return (
            owed.queue in self._trust.regained
            and owed.suspected not in (None, Cause.UNTRUSTED)
            and owed.suspected_for > watched_for
        )

    def _conclude(self, term: int, walk: _Walk) -> None:
        self._store.suspect(term, self._source, walk.absent)
        self._store.trust(term, [self._trust.backlog_checked(walk.queue)])
        log_event("queue_trusted", queue=walk.queue)
        if walk.absent:
            log_event("jobs_untrusted", queue=walk.queue, count=len(walk.absent))

    def _unpushed(self) -> set[UUID]:
        """What producers left to us: nobody can have run it yet."""
        found: set[UUID] = set()
        after: UUID | None = None
        while page := self._store.watched(self._source, after=after, limit=self._page, urgent=True):
            after = page[-1].token
            found.update(owed.token for owed in page if reported_absent(owed))
        return found
