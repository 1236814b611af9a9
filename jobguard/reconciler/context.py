"""The state of a source that one inspection uses, as plain data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jobguard.model import Cause, Owed
from jobguard.reconciler.result import reported_absent
from jobguard.settings import Settings
from jobguard.store.protocols import Brake

YOUNG = 60.0
"""Seconds after its recording in which the push of a delivery may be the cause of its absence."""


@dataclass(frozen=True, slots=True)
class InspectionContext:
    """The state of a source at the moment of an inspection. Ages are seconds before that moment."""

    at: float
    """The moment, in seconds since the epoch, by the database clock."""
    reports_complete: bool
    """Every live worker has flushed its reports to Postgres."""
    brake: Brake
    incident_age: float | None
    """The age of the open incident, if there is one."""
    losses: Collection[float]
    """The ages of all known losses: Redis has nothing that was recorded before, unless it is restored."""
    verified_cause: Cause | None
    """The cause for which all owed deliveries are being verified, if there is one."""
    deaths: Mapping[str, float]
    """For each queue: the age of the last death or departure of one of its consumers."""

    def is_lost(self, age: float) -> bool:
        """Return True if Redis is known to have lost its data after a record of this age was made."""
        return any(age > loss for loss in self.losses)

    def cause_of(self, owed: Owed, settings: Settings) -> Cause:
        """Return why this delivery is absent, if it is absent."""
        if owed.suspected is not None and (
            reported_absent(owed) or owed.suspected is Cause.UNTRUSTED
        ):
            return owed.suspected
        cause = self._present_cause(owed, settings)
        if cause is Cause.UNEXPLAINED and owed.suspected is not None:
            return owed.suspected  # The cause that was known at the first inspection.
        return cause

    def _present_cause(self, owed: Owed, settings: Settings) -> Cause:
        if self.incident_age is not None and owed.age > self.incident_age:
            return Cause.INCIDENT
        if self.is_lost(owed.age):
            return Cause.TOPOLOGY
        if self.verified_cause is not None:
            return self.verified_cause
        death = self.deaths.get(owed.queue)
        # By then the delivery was inspected and found absent.
        recent = 3 * settings.sweep_interval
        if death is not None and death < min(owed.age, recent):
            return Cause.WORKER  # A worker took it from the queue, and died before it claimed it.
        if owed.age < YOUNG + settings.grace:
            return Cause.PUSH
        return Cause.UNEXPLAINED
