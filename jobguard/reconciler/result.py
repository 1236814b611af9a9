"""The result of one inspection, and the causes that the inspections distinguish."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from uuid import UUID

from jobguard.model import Cause, Outcome, Owed

LOSSES = (Cause.INCIDENT, Cause.TOPOLOGY, Cause.EVICTION)
"""Causes that affect many jobs at once."""


def reported_absent(owed: Owed) -> bool:
    """Return True if its absence was reported to the ledger, and not seen by an inspection.

    It was reported if the claim of its worker was voided, or if its producer left the push to the
    leader. A suspect that an inspection saw has a mark.
    """
    return owed.suspected in (Cause.WORKER, Cause.PUSH) and not owed.suspected_mark


@dataclass(frozen=True, slots=True)
class Lost:
    """A delivery that is to be restored."""

    owed: Owed
    cause: Cause
    replaces: UUID | None = None
    """The delivery in its place that it may replace."""
    takeover: bool = False
    """Restore it even if the library still shows it as running."""
    taken_by: str = ""
    """The worker that took it according to Redis, if that worker is dead or has left."""


@dataclass(slots=True)
class PassResult:
    """The counts of one inspection."""

    inspected: int = 0
    absent: int = 0
    restored: Counter[Cause] = field(default_factory=Counter)
    requeued: int = 0
    released: int = 0
    """Jobs that waited for dependencies that had ended."""
    closed: Counter[Outcome] = field(default_factory=Counter)
    buried: int = 0
    held: int = 0
    waiting: int = 0
    """Absent and to be inspected again, or waiting for the limiter."""
    throttled: int = 0
    """Of these: waiting for the limiter."""
    in_grace: int = 0
    """Of these: seen absent, and to be seen once more."""
    untrusted: int = 0
    """Absent from a queue that was not trusted when they were recorded: they cannot be restored."""
    bypassed: int = 0
    """Restored and taken again several times, and never claimed: not restored any more; see
    bypass.py."""
    failed: int = 0
    """Could not be restored: unreadable, too late, or refused by Redis."""
    observed: int = 0
    """Would have been restored in mode="guard"."""

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
        """Return plain numbers, for people."""
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
