"""Check the deliveries that were recorded before a leader watched their queue.

No worker has run a delivery that Redis still has. An unguarded worker may have run a delivery that
is absent: it becomes a suspect with the cause ``untrusted``, and only a person restores it. Two
kinds of absent deliveries are exempt: those that Redis is known to have lost, and those that a
leader saw absent before the gap in which no leader watched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from uuid import UUID

from jobguard.adapter import Broker
from jobguard.log import log_event
from jobguard.model import Cause, Owed, Presence
from jobguard.reconciler.pulse import PulseKeeper
from jobguard.reconciler.result import reported_absent
from jobguard.reconciler.trust import Trust
from jobguard.scripts import chunks
from jobguard.store.protocols import LeaderStore


@dataclass(slots=True)
class _Walk:
    clean_since: Mapping[str, float | None]
    """The queues that this walk checks, and since when each had no unguarded consumer."""
    epoch: UUID | None
    unpushed: set[UUID]
    after: UUID | None = None
    absent: list[tuple[UUID, Cause, str]] = field(default_factory=list)
    absent_of: Counter[str] = field(default_factory=Counter)


class BacklogTrust:
    """Checks the older deliveries of newly trusted queues, one page in each step.

    One walk serves all queues that are waiting when it begins.
    """

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
        """Make the check; ``lost``: whether Redis surely lost a delivery of this queue and age."""
        self._lost = lost
        self._broker = broker
        self._store = store
        self._source = source
        self._trust = trust
        self._pulse = pulse
        self._page = page
        self._walk: _Walk | None = None

    def step(self, term: int, *, in_incident: bool) -> None:
        """Check one page. A walk is discarded if Redis lost data while it ran."""
        if self._walk is None:
            queues = self._trust.backlogs_to_check()
            if not queues:
                return
            clean = {queue: self._trust.rows[queue].clean_since for queue in queues}
            self._walk = _Walk(clean, self._pulse.epoch, self._unpushed())
        walk = self._walk
        if in_incident or walk.epoch != self._pulse.epoch:
            self._walk = None
            return
        if not self._inspect_page(walk):
            return
        self._walk = None
        # If the pulse is gone, Redis was flushed during the walk: start again after that loss.
        if self._pulse.stands():
            self._conclude(term, walk)

    def _inspect_page(self, walk: _Walk) -> bool:
        """Check the next page; return True if it was the last one."""
        page = self._store.page(self._source, after=walk.after, limit=self._page)
        now = self._store.now()
        watched_for = {queue: now - (clean or 0.0) for queue, clean in walk.clean_since.items()}
        old = [
            owed
            for owed in page
            if owed.queue in watched_for
            and owed.age > watched_for[owed.queue]
            and owed.claim_number is None
            and owed.token not in walk.unpushed
            and not self._was_absent(owed, watched_for[owed.queue])
            and not self._lost(owed.queue, owed.age)
        ]
        seen = self._broker.presence(old) if old else {}
        for owed in old:
            if seen[owed.token].presence is Presence.ABSENT:
                walk.absent.append((owed.token, Cause.UNTRUSTED, seen[owed.token].mark))
                walk.absent_of[owed.queue] += 1
        if len(page) < self._page:
            return True
        walk.after = page[-1].token
        return False

    def _was_absent(self, owed: Owed, watched_for: float) -> bool:
        """Return True if a leader saw it absent while the queue was trusted, before the present gap."""
        return (
            owed.queue in self._trust.regained
            and owed.suspected not in (None, Cause.UNTRUSTED)
            and owed.suspected_for > watched_for
        )

    def _conclude(self, term: int, walk: _Walk) -> None:
        for some in chunks(walk.absent, self._page):
            self._store.suspect(term, self._source, some)
        # If an unguarded consumer was seen meanwhile, the next walk checks that queue again.
        queues = [
            queue
            for queue in self._trust.backlogs_to_check()
            if queue in walk.clean_since
            and walk.clean_since[queue] == self._trust.rows[queue].clean_since
        ]
        self._store.trust(term, [self._trust.backlog_checked(queue) for queue in queues])
        for queue in queues:
            log_event("queue_trusted", queue=queue)
            if walk.absent_of[queue]:
                log_event("jobs_untrusted", queue=queue, count=walk.absent_of[queue])

    def _unpushed(self) -> set[UUID]:
        """Return the deliveries whose push was left to the leader: no worker can have run them yet."""
        found: set[UUID] = set()
        after: UUID | None = None
        while page := self._store.watched(self._source, after=after, limit=self._page, urgent=True):
            after = page[-1].token
            found.update(owed.token for owed in page if reported_absent(owed))
        return found
