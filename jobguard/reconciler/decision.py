"""The verdict on one owed delivery: presence decides, time only bounds how often we look.

A pure function of what was seen and what is known. Nothing here asks anybody anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jobguard.model import Cause, Outcome, Presence


class Action(StrEnum):
    """What follows from a look."""

    WAIT = "wait"
    """Nothing now; look again."""
    RESTORE = "restore"
    """It is lost: put it back."""
    REQUEUE = "requeue"
    """Its worker is dead: take the claim away, so that it can be put back."""
    CLOSE = "close"
    """It has ended, as Redis or history knows: remember that."""
    BURY = "bury"
    """Its crash budget is spent: dead."""
    HOLD = "hold"
    """It would go back, but a person, the brake, or a queue not yet trusted holds it."""


class Holder(StrEnum):
    """Who has claimed it."""

    NONE = "nobody"
    LIVE = "live"
    DROPPED = "let go"  # by a worker that lives, and lists it no longer
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the verdict depends on."""

    presence: Presence
    holder: Holder = Holder.NONE
    replaced_by_a_stranger: bool = False
    """With OVERWRITTEN: by a delivery of ours of which the ledger has not heard yet."""
    tombstone: Outcome | None = None
    """History has an end of it."""
    listed: bool = False
    """A worker that beats lists it, claimed or not."""
    cause: Cause = Cause.UNEXPLAINED
    """Why it may be absent."""
    seen_for: float | None = None
    """Seconds since it was first seen like this, unchanged; None: this is the first look."""
    grace: float = 10.0
    """Seconds between the two looks."""
    reports_complete: bool = True
    """Postgres knows everything it can know: no worker has reports it could not write."""
    trusted: bool = True
    """No unguarded worker can have run it."""
    held: bool = False
    """A pause, or the brake on its queue."""
    hold_unexplained: bool = False
    unsent: bool = False
    """Its producer surely sent nothing to Redis: no unguarded worker can have run it."""
    expired: bool = False
    backing_off: bool = False
    """It comes from a worker's death, and its wait is not over."""
    announced: bool = False
    """The dead holder had said goodbye: no crash."""
    alone: bool = True
    """The dead holder held nothing else: this job caused the death."""
    crashes: int = 0
    crash_budget: int = 3


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict, with what it needs to be carried out."""

    action: Action
    reason: str
    outcome: Outcome | None = None
    """With CLOSE and BURY."""
    suspect: bool = False
    """With WAIT and HOLD: remember that it was seen absent."""
    clear: bool = False
    """With WAIT: it is where it belongs; whatever was suspected is forgotten."""
    charge: bool = False
    """With REQUEUE: charge the crash budget."""


ENDS = {
    Presence.FINISHED: Outcome.COMPLETED,
    Presence.FAILED: Outcome.FAILED,
    Presence.CANCELLED: Outcome.CANCELLED,
}


def decide(situation: Situation) -> Decision:
    """Return what follows from one look at one owed delivery."""
    if situation.tombstone is not None:
        return Decision(Action.CLOSE, "history wins", situation.tombstone)
    if situation.holder is Holder.LIVE:
        return Decision(Action.WAIT, "its worker beats and lists it", clear=True)
    if situation.presence in ENDS and not situation.reports_complete:
        # The worker's own word says more: what it completed, and what that is to a join.
        return Decision(Action.WAIT, "a worker has reports that are not written yet", clear=True)
    if situation.presence in ENDS:
        return Decision(Action.CLOSE, "the library knows its end", ENDS[situation.presence])
    if situation.presence is Presence.OVERWRITTEN:
        return _overwritten(situation)
    if situation.listed:
        return Decision(Action.WAIT, "a worker that beats lists it", clear=True)
    if situation.presence in (Presence.WAITING, Presence.SCHEDULED):
        return Decision(Action.WAIT, "it is where it belongs", clear=True)
    if situation.holder is Holder.DROPPED and not situation.reports_complete:
        # A retry that waits for Postgres may stand in its place by now, or its end be on the way.
        return Decision(Action.WAIT, "a worker has reports that are not written yet")
    if situation.holder in (Holder.DROPPED, Holder.DEAD):
        return _left_behind(situation)
    if situation.presence is Presence.RUNNING and situation.cause is not Cause.WORKER:
        return Decision(Action.WAIT, "somebody runs it without a claim", clear=True)
    return _absent(situation)


def _overwritten(situation: Situation) -> Decision:
    if situation.replaced_by_a_stranger:
        # Its record waits in a spool, or is lost with one: were that life lost as well, this one is all.
        return Decision(Action.WAIT, "another life of its id is not recorded yet")
    if situation.seen_for is None or situation.seen_for < situation.grace:
        return Decision(Action.WAIT, "another life of its id was seen once", suspect=True)
    return Decision(Action.CLOSE, "another life of its id took its place", Outcome.SUPERSEDED)


def _left_behind(situation: Situation) -> Decision:
    if not situation.trusted:
        return Decision(Action.HOLD, "its queue is not trusted", suspect=True)
    charge = _is_charged(situation)
    if charge and situation.alone and situation.crashes + 1 >= situation.crash_budget:
        return Decision(Action.BURY, "its crash budget is spent", Outcome.DEAD)
    if situation.held:
        return Decision(Action.HOLD, "its queue is held")
    return Decision(Action.REQUEUE, "its worker is dead", charge=charge)


def _is_charged(situation: Situation) -> bool:
    """Whether the death counts for this job.

    The first death in company is charged to all that the worker held: nobody knows which of them caused
    it. Each of them runs alone from then on, and only a death at which it was alone is charged again.
    """
    return not situation.announced and (situation.alone or situation.crashes == 0)


def _absent(situation: Situation) -> Decision:
    if situation.expired:
        return Decision(Action.CLOSE, "its time to live is over", Outcome.CANCELLED)
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
    return Decision(Action.RESTORE, f"lost: {situation.cause.value}")
