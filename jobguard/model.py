"""The words of jobguard as values: deliveries, claims, ends, sightings and what is known of them.

Nothing here does input or output, and nothing here knows a queue library or a database.

A *job* is the host library's unit of work, known by its ``job_id``. A *delivery* is one push of a
job; its *token* is ours, random, and new at every push, so that two lives of one job id can never
be taken for each other. A *claim* is one start of a delivery by one worker; claims of a delivery
are numbered, so that a worker which slept through its own funeral cannot speak for its successor.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID


class Outcome(StrEnum):
    """How a delivery ended. Every ended delivery is remembered, with one of these."""

    COMPLETED = "completed"
    """The function returned."""
    FAILED = "failed"
    """The host library gave the job up."""
    DEAD = "dead"
    """jobguard gave the job up: its crash budget is spent. Kept for a person."""
    CANCELLED = "cancelled"
    """Somebody cancelled, deleted or purged the job, or its time to live ran out."""
    SUPERSEDED = "superseded"
    """Another delivery of the same job took its place: a retry, a repeat, a new life of the id."""


class Presence(StrEnum):
    """Where Redis has a delivery."""

    WAITING = "waiting"
    SCHEDULED = "scheduled"
    """In a delay queue, or deferred until its parents have ended."""
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABSENT = "absent"
    """Nowhere a worker would find it."""
    OVERWRITTEN = "overwritten"
    """Another delivery of the same job id stands in its place."""


class Cause(StrEnum):
    """Why an owed delivery may be absent."""

    INCIDENT = "incident"
    """The pulse showed that Redis lost data."""
    TOPOLOGY = "topology"
    """Redis restarted, failed over, or was reached again after a break."""
    EVICTION = "eviction"
    WORKER = "worker"
    """The worker that had claimed it is dead or has left."""
    PUSH = "push"
    """Its push was never confirmed."""
    UNTRUSTED = "untrusted"
    """Absent before its queue was trusted: an unguarded worker may have run it. Never recovered."""
    UNEXPLAINED = "unexplained"


_ticking = threading.Lock()
_last_tick = 0


def _after_fork_in_child() -> None:
    """Another thread of the parent may have held the lock."""
    global _ticking
    _ticking = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def new_token(after: UUID | None = None) -> UUID:
    """Return a new random token (UUID version 7) that sorts after every earlier one of this process.

    Restores go in the order of tokens, which is thereby the order of recording. ``after``: and after
    this one, which another machine may have made, whose clock is ahead: a life of a job sorts behind
    the one that it comes from.
    Layout: 48 bits of milliseconds, then 12 bits of the millisecond's fraction (RFC 9562 §6.2,
    method 3), then 62 random bits.
    """
    global _last_tick
    with _ticking:
        ticks = time.time_ns() * 4096 // 1_000_000  # milliseconds with a 12-bit fraction
        floor = 0 if after is None else (after.int >> 80) << 12 | (after.int >> 64 & 0xFFF)
        ticks = _last_tick = max(ticks, _last_tick + 1, floor + 1)
    random = int.from_bytes(os.urandom(8)) & ((1 << 62) - 1)
    return UUID(int=(ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 2 << 62 | random)


def derived_token(parent: UUID, job_id: str, nth: int = 0) -> UUID:
    """Return the token of what a run of ``parent`` sends under this id: the same at every run of it.

    A run that was killed after it sent something sends it again when it is started again; by its token
    the ledger knows it. ``nth``: how often this run has sent this id before. Sorts behind the parent.
    """
    ticks = ((parent.int >> 80) << 12 | (parent.int >> 64 & 0xFFF)) + 1
    digest = hashlib.sha256(f"{parent.hex}\x00{nth}\x00{job_id}".encode()).digest()
    random = int.from_bytes(digest[:8]) & ((1 << 62) - 1)
    return UUID(int=(ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 2 << 62 | random)


def token_at(epoch_seconds: float) -> UUID:
    """Return the smallest token that could have been made at that time: a bound for a range of tokens."""
    return UUID(int=max(0, int(epoch_seconds * 1000)) << 80)


@dataclass(frozen=True, slots=True)
class Parent:
    """The delivery that a new one takes the place of, by the same transaction that records the new one.

    ``claim`` is the number of the claim that speaks (a worker retrying its own job); None where nobody
    holds the parent (a delay queue's move). ``outcome`` is what becomes of the parent: superseded, or
    completed where the job repeats itself.
    """

    token: UUID
    claim: int | None = None
    outcome: Outcome = Outcome.SUPERSEDED
    worker: UUID | None = None
    """Who speaks, where it is a worker."""
    error: str | None = None
    """Why its run failed, where that is known; redacted."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One push of a job, with all that is needed to put it into an empty Redis again."""

    token: UUID
    job_id: str
    queue: str
    task: str
    envelope: bytes
    """The exact bytes and routing; versioned by the adapter, opaque to everyone else."""
    priority: int = 0
    attempt: int = 1
    due_at: float | None = None
    """Seconds since the epoch; None: at once."""
    expires_at: float | None = None
    """Seconds since the epoch after which the library would drop it unrun; None: never."""
    key: str | None = None
    trace: str | None = None
    parent: Parent | None = None
    fresh: bool = False
    """The job id was made for this delivery, so that no older delivery of it can exist. Saves a look."""
    derived: bool = False
    """Its token is derived from the run that sends it: if it has ended already, it is refused."""
    closes: str | None = None
    """The join that this goes on from. Of several, only the first is taken; the others are refused."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of a batch of deliveries."""

    refused: frozenset[UUID] = frozenset()
    """Deliveries that must not be pushed: their parent has ended or moved on, or their claim is stale."""
    leader_live: bool = False
    """A leader's lease is live, so that what is not pushed now will be pushed."""
    spooled: bool = False
    """Postgres did not take it; the spool has it."""
    lost: bool = False
    """Neither Postgres nor the spool took it. Counted and logged already."""
    at: float = field(default_factory=time.monotonic, compare=False)
    """When the answer came, by this process' monotonic clock."""

    @property
    def written(self) -> bool:
        """Postgres has it; only then can a leader have pushed it."""
        return not (self.spooled or self.lost)

    def may_be_pushed(self, deadline: float) -> bool:
        """Whether a leader may have pushed it by now, ``deadline`` seconds after it saw it."""
        return self.written and self.leader_live and time.monotonic() - self.at > deadline


class Refusal(StrEnum):
    """Why a start was not granted its claim."""

    ENDED = "ended"
    """A tombstone stands for this delivery. Skip it, and put right what Redis says of it."""
    CLAIMED = "held"
    """Another live worker runs it. Skip it, and touch nothing of the live run."""
    SPENT = "spent"
    """Its crash budget is spent with this start. It is buried; skip it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of one worker to run one delivery, until it reports the end or is seen dead."""

    token: UUID
    number: int
    """1 for the first start of the delivery; 0 for a start while Postgres was away, not yet claimed."""
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """A start that must be skipped."""

    token: UUID
    reason: Refusal
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Neither owed nor ended: recorded by nobody. The worker records it and claims again."""

    token: UUID


@dataclass(frozen=True, slots=True)
class WorkerDeclaredDead:
    """A claim in the name of a worker that was declared dead: it would be taken away at once."""

    token: UUID


ClaimAnswer = Claim | Refused | Unknown | WorkerDeclaredDead
"""What a store answers who asks for a claim."""


@dataclass(frozen=True, slots=True)
class Part:
    """What the end of a job is to a join that the library counts in Redis (a chord, a group's barrier)."""

    join: str
    state: bytes = b""
    """What the library keeps of it for what comes after: opaque to everyone but the adapter."""


@dataclass(frozen=True, slots=True)
class End:
    """A worker's report that a delivery has ended, in the name of a claim."""

    token: UUID
    number: int
    outcome: Outcome
    worker: UUID
    job_id: str = ""
    queue: str = ""
    task: str = ""
    ended_at: float = field(default_factory=time.time)
    error: str | None = None
    """Redacted and cut to 5,000 characters before it comes here."""
    part: Part | None = None


class Ended(StrEnum):
    """What a reported end did."""

    ENDED = "ended"
    LATE = "late"
    """Its claim number was stale, or a tombstone stood there already: nothing changed."""
    UNKNOWN = "unknown"
    """Nobody had recorded the delivery: only its tombstone is written."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A worker says: I am alive, these are the claims I hold, and this is what I have not yet reported."""

    worker: UUID
    counter: int
    claims: Sequence[UUID]
    """Listed before the claim is asked for, and until its end is committed."""
    name: str = ""
    """The library's own name of the worker, as it stands in Redis."""
    host: str = ""
    pid: int = 0
    queues: Sequence[str] = ()
    unflushed_since: float | None = None
    """Seconds since the epoch of the oldest report that Postgres does not have; None: it has all."""
    pulse: tuple[UUID, int] | None = None
    """The pulse (epoch, n) that this worker reads in its Redis."""


@dataclass(frozen=True, slots=True)
class Join:
    """Jobs that one waits for and that the library has forgotten: the ledger knows how they ended."""

    job_ids: Sequence[str] = ()
    """Empty: all have ended where the library can see it, and it has not moved on all the same."""
    failure_will_do: bool = False
    """A job that failed counts as one that completed."""
    doubtful: Sequence[UUID] = ()
    """Deliveries that the library shows as running or failed: the ledger may know that they completed."""


@dataclass(frozen=True, slots=True)
class EndedPart:
    """A member of a join that has ended, with all that is needed to have the library count it again."""

    token: UUID
    job_id: str
    queue: str
    state: bytes
    envelope: bytes
    """Empty: nobody had recorded it."""


@dataclass(frozen=True, slots=True)
class OpenJoin:
    """A join whose continuation nobody has recorded yet."""

    id: str
    size: int
    """How many members it waits for; 0: nobody said so."""
    state: bytes = b""
    """What the adapter gave when it was opened."""
    parts: Sequence[EndedPart] = ()
    """The members that have ended, in the order of their ends."""


@dataclass(frozen=True, slots=True)
class LastOutcome:
    """What the ledger knows of a job id."""

    owed: bool = False
    outcome: Outcome | None = None
    """How it ended last, retries and repeats aside; None: no end is remembered."""


DROPPED_BY_LIVE_WORKER = UUID(int=0).hex
"""In the place of a worker that has taken a delivery: it lives, and has lost it. It puts it back no more,
and if it runs it all the same, it claims it."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a look at Redis showed of one delivery."""

    presence: Presence
    mark: str = ""
    """What exactly was seen. A suspect is only acted on if this has not changed since."""
    other: UUID | None = None
    """With OVERWRITTEN: the token that stands there, if it is one of ours."""
    bodiless: bool = False
    """With ABSENT: the library has nothing of it at all."""
    by_id: bool = False
    """With an end: the library keeps it by job id, and so it may be that of another job of this id."""
    joins: Join | None = None
    """With SCHEDULED: it waits for other jobs, and the library itself knows of none that is to come."""
    taken_by: str = ""
    """A worker has taken it, and would put it back or run it: the name of its session, or its id in hex.
    If that worker is dead or has left, or if it is LET_GO, the delivery is as good as absent."""


@dataclass(frozen=True, slots=True)
class Owed:
    """A row of the ledger as a look needs it: what is owed, by whom it is claimed, what was suspected.

    Ages are measured by the database's clock.
    """

    token: UUID
    job_id: str
    queue: str
    task: str
    age: float
    """Seconds since it was recorded."""
    due_in: float
    """Seconds until it is due; 0 or less: due."""
    expired: bool
    crashes: int
    recoveries: int
    claims: int
    """The highest number of a claim that was voided."""
    backoff: float
    """Seconds until a job recovered from a worker's death may go back."""
    claim_number: int | None = None
    claim_worker: UUID | None = None
    claim_live: bool = False
    """Its worker beats and lists it, or is too young to have listed it."""
    claim_announced: bool = False
    """The worker that holds it said goodbye: no crash."""
    suspected: Cause | None = None
    suspected_for: float = 0.0
    suspected_mark: str = ""
    unsent: bool = False
    """Its producer surely sent nothing to Redis: nobody can have run it."""


@dataclass(frozen=True, slots=True)
class Restorable:
    """An owed delivery with its envelope, ready to be put back."""

    token: UUID
    job_id: str
    queue: str
    envelope: bytes
    due_at: float | None
    expires_at: float | None
    replaces: frozenset[UUID] = frozenset()
    """Older tokens of the same job that may stand in its place and are known to be superseded."""
    takeover: bool = False
    """The worker that ran it is dead: what Redis still says of that run does not count."""
    running: bool = False
    """A live worker runs it: put back what others must see of it, and push nothing."""
    released: bool = False
    """The jobs that it waits for have ended: it waits no longer."""
    taken_by: str = ""
    """The dead worker that Redis still says has taken it: take it from there."""


class Restored(StrEnum):
    """What the atomic restore of one delivery did."""

    RESTORED = "restored"
    PRESENT = "present"
    """It was there after all: nothing was done."""
    CHANGED = "changed"
    """Another life of the job stands there: nothing was done."""
    EXPIRED = "expired"
    """Its time to live is over: the library would have dropped it."""
    UNREADABLE = "unreadable"
    """The envelope is of a version this jobguard does not know: nothing was done."""
    TOO_LATE = "too_late"
    """The deadline in Redis' time had passed: nothing was done."""
    ERROR = "error"
