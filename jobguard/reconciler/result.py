"""What one look did, and the words in which looks speak of causes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from jobguard.model import Cause, Outcome, Owed

LOSSES = (Cause.INCIDENT, Cause.TOPOLOGY, Cause.EVICTION)
"""Causes that take many jobs at once."""


def reported_absent(owed: Owed) -> bool:
    """Whether we were told of its absence, rather than having seen it.

    Its worker's claim was taken away, or its producer left the push to us. What a look saw has a mark.
    """
    return owed.suspected in (Cause.WORKER, Cause.PUSH) and not owed.suspected_mark


@dataclass(slots=True)
class PassResult:
    """What one look did."""

    inspected: int = 0
    absent: int = 0
    restored: Counter[Cause] = field(default_factory=Counter)
    requeued: int = 0
    released: int = 0
    """Waited in vain for jobs that had ended."""
    closed: Counter[Outcome] = field(default_factory=Counter)
    buried: int = 0
    held: int = 0
    waiting: int = 0
    """Absent, and to be looked at again, or waiting for the limiter."""
    throttled: int = 0
    """Of these: waiting for the limiter."""
    in_grace: int = 0
    """Of these: seen absent, and to be seen once more."""
    untrusted: int = 0
    """Absent from a queue that was not trusted when they were recorded: nothing can be done."""
    bypassed: int = 0
    """Was put back and taken again and again, and never claimed: held; see look.py."""
    failed: int = 0
    """Could not be put back: unreadable, too late, or Redis refused."""
    observed: int = 0
    """Would have been put back, if this were not mode=observe."""

    def __iadd__(self, other: PassResult) -> PassResult:
        self.inspected += other.inspected
        self.absent += other.absent
        self.restored.update(other.restored)
        self.requeued += other.requeued
        self.released += other.released
        self.closed.update(other.closed)
        self.buried += other.buried
        self.held += other.held
        self.waiting += other.waiting
        self.throttled += other.throttled
        self.in_grace += other.in_grace
        self.observed += other.observed
        self.failed += other.failed
        self.untrusted += other.untrusted
        self.bypassed += other.bypassed
        return self

    def counts(self) -> dict[str, int]:
        """As plain numbers, for people."""
        return {
            "looked": self.inspected,
            "absent": self.absent,
            "restored": self.restored.total(),
            "requeued": self.requeued,
            "released": self.released,
            "closed": self.closed.total(),
            "buried": self.buried,
            "held": self.held,
            "waiting": self.waiting,
            "observed": self.observed,
            "failed": self.failed,
            "untrusted": self.untrusted,
            "bypassed": self.bypassed,
        }
