"""The state of a source that one inspection uses, as plain data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

from jobguard.model import Cause, Owed
from jobguard.reconciler.result import reported_absent
from jobguard.settings import Settings
from jobguard.store.protocols import Brake

YOUNG = 60.0
"""Seconds after its recording in which the push of a delivery may be the cause of its absence."""


_MOST_CONFIRMED = 50_000


class ConfirmedPushes:
    """The young deliveries that an inspection saw in Redis: an absent one of these is no lost push.

    At most 50,000, the newest ones. The others count as young deliveries of which nothing is known.
    """

    def __init__(self, settings: Settings) -> None:
        self._longest = YOUNG + settings.grace
        self._recorded: OrderedDict[UUID, float] = OrderedDict()

    def __contains__(self, token: UUID) -> bool:
        return token in self._recorded

    def add(self, deliveries: Iterable[Owed], at: float) -> None:
        """Add what was seen at this moment, and forget what is not young any more."""
        for owed in deliveries:
            if owed.age < self._longest and owed.token not in self._recorded:
                self._recorded[owed.token] = at - owed.age
        while self._recorded and (
            len(self._recorded) > _MOST_CONFIRMED
            or at - next(iter(self._recorded.values())) >= self._longest
        ):
            self._recorded.popitem(last=False)


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

    def cause_of(self, owed: Owed, settings: Settings, *, pushed: bool) -> Cause:
        """Return why this delivery is absent, if it is absent. ``pushed``: it was surely in Redis."""
        if owed.suspected is not None and (
            reported_absent(owed) or owed.suspected is Cause.UNTRUSTED
        ):
            return owed.suspected
        cause = self._present_cause(owed, settings, pushed=pushed)
        if cause is Cause.UNEXPLAINED and owed.suspected is not None:
            return owed.suspected  # The cause that was known at the first inspection.
        return cause

    def _present_cause(self, owed: Owed, settings: Settings, *, pushed: bool) -> Cause:
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
        if owed.age < YOUNG + settings.grace and not pushed:
            return Cause.PUSH
        return Cause.UNEXPLAINED
