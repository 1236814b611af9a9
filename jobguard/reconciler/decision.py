"""The decision on one owed delivery.

The presence in Redis decides. Time only bounds how often a delivery is inspected. ``decide`` is a
pure function of what was seen and what is known; nothing here reads a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jobguard.model import Cause, Outcome, Presence, RecoverRule


class Action(StrEnum):
    """What the reconciler does about an inspected delivery."""

    WAIT = "wait"
    """Do nothing now, and inspect it again."""
    RESTORE = "restore"
    """Push it again, because it is lost."""
    REQUEUE = "requeue"
    """Void the claim of a dead worker, so that the delivery can be restored."""
    CLOSE = "close"
    """Record the end that Redis or the history knows."""
    BURY = "bury"
    """Mark it as dead: its crash budget is spent, or its rule forbids its recovery."""
    HOLD = "hold"
    """Do not restore it: a person, the automatic hold, or a queue that is not yet trusted forbids
    it."""


class Holder(StrEnum):
    """The state of the worker that has claimed it."""

    NONE = "none"
    LIVE = "live"
    DROPPED = "dropped"  # The worker is alive and does not list it any more.
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Situation:
    """All facts that the decision depends on."""

    presence: Presence
    holder: Holder = Holder.NONE
    replaced_by_unrecorded: bool = False
    """With OVERWRITTEN: the other delivery was pushed by a guarded process, but is not yet in the
    ledger."""
    tombstone: Outcome | None = None
    """The end that the history has of it."""
    in_flight: bool = False
    """A live worker lists it, with or without a claim."""
    cause: Cause = Cause.UNEXPLAINED
    """Why it may be absent."""
    seen_for: float | None = None
    """Seconds since it was first seen in this state, unchanged; None: this is the first inspection."""
    grace: float = 10.0
    """Seconds between the two inspections."""
    reports_complete: bool = True
    """Every live worker has flushed its reports to Postgres."""
    trusted: bool = True
    """No unguarded worker can have run it."""
    held: bool = False
    """The reconciler is paused, or its queue is held."""
    hold_unexplained: bool = False
    unsent: bool = False
    """Its producer surely sent nothing to Redis: no unguarded worker can have run it."""
    expired: bool = False
    backing_off: bool = False
    """It was requeued after a worker's death, and its waiting time is not over."""
    announced: bool = False
    """The dead worker had signed off before: its end is no crash."""
    alone: bool = True
    """The dead worker had no other claim, or none of a job that is charged as often: this job caused
    the death."""
    crashes: int = 0
    crash_budget: int = 3
    recover: RecoverRule | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """An action, with the details that are needed to apply it."""

    action: Action
    reason: str
    outcome: Outcome | None = None
    """With CLOSE and BURY."""
    suspect: bool = False
    """With WAIT and HOLD: remember that it was seen absent."""
    clear: bool = False
    """With WAIT: Redis or a worker has it, so that an earlier suspicion is deleted."""
    charge: bool = False
    """With REQUEUE: charge the crash budget."""


ENDS = {
    Presence.FINISHED: Outcome.COMPLETED,
    Presence.FAILED: Outcome.FAILED,
    Presence.CANCELLED: Outcome.CANCELLED,
}


def decide(situation: Situation) -> Decision:
    """Return the decision about one owed delivery after one inspection."""
    if situation.tombstone is not None:
        return Decision(Action.CLOSE, "the history has its end", situation.tombstone)
    if situation.holder is Holder.LIVE:
        return Decision(Action.WAIT, "its worker is alive and lists it", clear=True)
    if situation.presence in ENDS and not situation.reports_complete:
        # The report of the worker says more: the result of the job, and its part in a join.
        return Decision(Action.WAIT, "a worker has reports that are not written yet", clear=True)
    if situation.presence in ENDS:
        return Decision(Action.CLOSE, "the library knows its end", ENDS[situation.presence])
    if situation.presence is Presence.OVERWRITTEN:
        return _overwritten(situation)
    if situation.in_flight:
        return Decision(Action.WAIT, "a live worker lists it", clear=True)
    if situation.presence in (Presence.WAITING, Presence.SCHEDULED):
        return Decision(Action.WAIT, "Redis has it in its place", clear=True)
    if situation.holder is Holder.DROPPED and not situation.reports_complete:
        # Its end, or a retry that replaced it, may still be in a spool until Postgres is back.
        return Decision(Action.WAIT, "a worker has reports that are not written yet")
    if situation.holder in (Holder.DROPPED, Holder.DEAD):
        return _left_behind(situation)
    if situation.presence is Presence.RUNNING and situation.cause is not Cause.WORKER:
        return Decision(Action.WAIT, "a worker runs it without a claim", clear=True)
    return _absent(situation)


def _overwritten(situation: Situation) -> Decision:
    if situation.replaced_by_unrecorded:
        # The record of the other delivery waits in a spool, or is lost together with one. If that
        # delivery is lost as well, this delivery is the only one left.
        return Decision(Action.WAIT, "another delivery of its id is not recorded yet")
    if situation.seen_for is None or situation.seen_for < situation.grace:
        return Decision(Action.WAIT, "another delivery of its id was seen once", suspect=True)
    return Decision(Action.CLOSE, "another delivery of its id replaced it", Outcome.SUPERSEDED)


def _left_behind(situation: Situation) -> Decision:
    if not situation.trusted:
        return Decision(Action.HOLD, "its queue is not trusted", suspect=True)
    if situation.recover is not None:
        return Decision(
            Action.BURY,
            f"its run was lost with its worker, and recover={situation.recover!r} forbids another run",
            Outcome.DEAD,
        )
    charge = _is_charged(situation)
    if charge and situation.alone and situation.crashes + 1 >= situation.crash_budget:
        return Decision(Action.BURY, "its crash budget is spent", Outcome.DEAD)
    if situation.held:
        return Decision(Action.HOLD, "its queue is held")
    return Decision(Action.REQUEUE, "its worker is dead", charge=charge)


def _is_charged(situation: Situation) -> bool:
    """Return True if the death is charged to this job.

    If the worker had several claims, its first death is charged to all of these jobs, because it is
    unknown which of them caused it. From then on each of them runs alone, and a death is charged
    again only to the job that was charged more often than all others of its worker.
    """
    return not situation.announced and (situation.alone or situation.crashes == 0)


def _absent(situation: Situation) -> Decision:
    if situation.expired:
        return Decision(Action.CLOSE, "its time to live has ended", Outcome.CANCELLED)
    if (situation.cause is Cause.UNTRUSTED or not situation.trusted) and not situation.unsent:
        return Decision(Action.HOLD, "an unguarded worker may have run it", suspect=True)
    if situation.backing_off:
        return Decision(Action.WAIT, "it waits after its worker's death")
    if not situation.reports_complete and situation.cause is not Cause.WORKER:
        return Decision(Action.WAIT, "a worker has reports that are not written yet", suspect=True)
    if situation.seen_for is None and situation.grace > 0:
        return Decision(Action.WAIT, "absent once", suspect=True)
    if (situation.seen_for or 0.0) < situation.grace:
        return Decision(Action.WAIT, "absent, within the grace")
    if situation.held:
        return Decision(Action.HOLD, "its queue is held")
    if situation.cause is Cause.UNEXPLAINED and situation.hold_unexplained:
        return Decision(Action.HOLD, "absent without a cause", suspect=True)
    was_pushed = not situation.unsent and situation.cause is not Cause.PUSH
    if situation.recover == "never" and was_pushed:
        why = f"lost before its run ({situation.cause.value}), and recover='never' forbids its recovery"
        return Decision(Action.BURY, why, Outcome.DEAD)
    return Decision(Action.RESTORE, f"lost: {situation.cause.value}")
