"""The verdict on one owed delivery: presence decides, time only bounds how often we look.

A pure function of what was seen and what is known. Nothing here asks anybody anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jobguard.job import Cause, Outcome, Presence


class Verdict(StrEnum):
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

    NOBODY = "nobody"
    LIVE = "live"
    LET_GO = "let go"  # by a worker that lives, and lists it no longer
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Case:
    """All that the verdict depends on."""

    presence: Presence
    holder: Holder = Holder.NOBODY
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
    judgeable: bool = True
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

    verdict: Verdict
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


def decide(case: Case) -> Decision:
    """Return what follows from one look at one owed delivery."""
    if case.tombstone is not None:
        return Decision(Verdict.CLOSE, "history wins", case.tombstone)
    if case.holder is Holder.LIVE:
        return Decision(Verdict.WAIT, "its worker beats and lists it", clear=True)
    if case.presence in ENDS and not case.judgeable:
        # The worker's own word says more: what it completed, and what that is to a join.
        return Decision(Verdict.WAIT, "a worker has reports that are not written yet", clear=True)
    if case.presence in ENDS:
        return Decision(Verdict.CLOSE, "the library knows its end", ENDS[case.presence])
    if case.presence is Presence.OVERWRITTEN:
        return _overwritten(case)
    if case.listed:
        return Decision(Verdict.WAIT, "a worker that beats lists it", clear=True)
    if case.presence in (Presence.WAITING, Presence.SCHEDULED):
        return Decision(Verdict.WAIT, "it is where it belongs", clear=True)
    if case.holder is Holder.LET_GO and not case.judgeable:
        # A retry that waits for Postgres may stand in its place by now, or its end be on the way.
        return Decision(Verdict.WAIT, "a worker has reports that are not written yet")
    if case.holder in (Holder.LET_GO, Holder.DEAD):
        return _left_behind(case)
    if case.presence is Presence.RUNNING and case.cause is not Cause.WORKER:
        return Decision(Verdict.WAIT, "somebody runs it without a claim", clear=True)
    return _absent(case)


def _overwritten(case: Case) -> Decision:
    if case.replaced_by_a_stranger:
        # Its record waits in a spool, or is lost with one: were that life lost as well, this one is all.
        return Decision(Verdict.WAIT, "another life of its id is not recorded yet")
    if case.seen_for is None or case.seen_for < case.grace:
        return Decision(Verdict.WAIT, "another life of its id was seen once", suspect=True)
    return Decision(Verdict.CLOSE, "another life of its id took its place", Outcome.SUPERSEDED)


def _left_behind(case: Case) -> Decision:
    if not case.trusted:
        return Decision(Verdict.HOLD, "its queue is not trusted", suspect=True)
    charge = _is_charged(case)
    if charge and case.alone and case.crashes + 1 >= case.crash_budget:
        return Decision(Verdict.BURY, "its crash budget is spent", Outcome.DEAD)
    if case.held:
        return Decision(Verdict.HOLD, "its queue is held")
    return Decision(Verdict.REQUEUE, "its worker is dead", charge=charge)


def _is_charged(case: Case) -> bool:
    """Whether the death counts for this job.

    The first death in company is charged to all that the worker held: nobody knows which of them caused
    it. Each of them runs alone from then on, and only a death at which it was alone is charged again.
    """
    return not case.announced and (case.alone or case.crashes == 0)


def _absent(case: Case) -> Decision:
    if case.expired:
        return Decision(Verdict.CLOSE, "its time to live is over", Outcome.CANCELLED)
    if (case.cause is Cause.UNTRUSTED or not case.trusted) and not case.unsent:
        return Decision(Verdict.HOLD, "an unguarded worker may have run it", suspect=True)
    if case.backing_off:
        return Decision(Verdict.WAIT, "it waits after its worker's death")
    if not case.judgeable and case.cause is not Cause.WORKER:
        return Decision(Verdict.WAIT, "a worker has reports that are not written yet", suspect=True)
    if case.seen_for is None and case.grace > 0:
        return Decision(Verdict.WAIT, "absent once", suspect=True)
    if (case.seen_for or 0.0) < case.grace:
        return Decision(Verdict.WAIT, "absent, within the grace")
    if case.held:
        return Decision(Verdict.HOLD, "its queue is held")
    if case.cause is Cause.UNEXPLAINED and case.hold_unexplained:
        return Decision(Verdict.HOLD, "absent without a cause", suspect=True)
    return Decision(Verdict.RESTORE, f"lost: {case.cause.value}")
