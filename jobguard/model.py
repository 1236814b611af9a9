"""The data types of jobguard: deliveries, claims, ends, observations and rows of the ledger.

This module does no input or output and knows no queue library and no database.

A *job* is the host library's unit of work, known by its ``job_id``. A *delivery* is one push of a job. Its
*token* is made by jobguard, random, and new at every push, so that two deliveries of one job id are never
confused. A *claim* is one start of a delivery by one worker. The claims of a delivery are numbered, so
that a worker already declared dead cannot report for the worker that replaced it.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

if TYPE_CHECKING:
    from jobguard.job_keys import KeyRule


class Outcome(StrEnum):
    """How a delivery ended. The history has one outcome for every ended delivery."""

    COMPLETED = "completed"
    """The function returned."""
    FAILED = "failed"
    """The host library gave the job up."""
    DEAD = "dead"
    """jobguard gave the job up: its crash budget is spent. It is kept for a person."""
    CANCELLED = "cancelled"
    """The job was cancelled, deleted or purged, or its time to live ended."""
    SUPERSEDED = "superseded"
    """Another delivery of the same job replaced it: a retry, a repeat, or a new job with the same id."""


RecoverRule = Literal["dead", "never"]
"""What happens to a job whose effects must not repeat. ``dead``: a run that was lost is not repeated.
``never``: nor is a delivery restored that Redis lost. What is lost is dead, and kept for a person."""


class Presence(StrEnum):
    """Where Redis has a delivery."""

    WAITING = "waiting"
    SCHEDULED = "scheduled"
    """In a delay queue, or deferred until its dependencies have ended."""
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABSENT = "absent"
    """In no place where a worker would find it."""
    OVERWRITTEN = "overwritten"
    """Another delivery of the same job id is in its place."""


class Cause(StrEnum):
    """Why an owed delivery may be absent."""

    INCIDENT = "incident"
    """The pulse showed that Redis lost data."""
    TOPOLOGY = "topology"
    """Redis restarted, failed over, or was reached again after an interruption."""
    EVICTION = "eviction"
    WORKER = "worker"
    """The worker that had claimed it is dead or has left."""
    PUSH = "push"
    """Its push was never confirmed."""
    UNTRUSTED = "untrusted"
    """It was absent before its queue was trusted: an unguarded worker may have run it. Never recovered."""
    UNEXPLAINED = "unexplained"


_ticking = threading.Lock()
_last_tick = 0


def _after_fork_in_child() -> None:
    """Replace the lock, because another thread of the parent may have taken it."""
    global _ticking
    _ticking = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def new_token(after: UUID | None = None) -> UUID:
    """Return a new random token (UUID version 7) that sorts after every earlier one of this process.

    Restores are made in the order of the tokens, which is therefore the order of recording. ``after``: the
    new token also sorts after this one. Another machine, whose clock is ahead, may have made it: a new
    delivery of a job must sort after the delivery that it comes from.
    Layout: 48 bits of milliseconds, then 12 bits of the millisecond's fraction (RFC 9562 §6.2, method 3),
    then 62 random bits.
    """
    global _last_tick
    with _ticking:
        ticks = time.time_ns() * 4096 // 1_000_000  # milliseconds with a 12-bit fraction
        floor = 0 if after is None else (after.int >> 80) << 12 | (after.int >> 64 & 0xFFF)
        ticks = _last_tick = max(ticks, _last_tick + 1, floor + 1)
    random = int.from_bytes(os.urandom(8)) & ((1 << 62) - 1)
    return UUID(int=(ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 2 << 62 | random)


def derived_token(parent: UUID, job_id: str, nth: int = 0) -> UUID:
    """Return the token of a job that a run of ``parent`` sends under this id: the same for every run.

    If a run is killed after it sent a job, the next run sends the job again; the ledger recognises the job
    by its token. ``nth``: how often this run has sent this id before. The token sorts after the parent.
    """
    ticks = ((parent.int >> 80) << 12 | (parent.int >> 64 & 0xFFF)) + 1
    digest = hashlib.sha256(f"{parent.hex}\x00{nth}\x00{job_id}".encode()).digest()
    random = int.from_bytes(digest[:8]) & ((1 << 62) - 1)
    return UUID(int=(ticks >> 12) << 80 | 7 << 76 | (ticks & 0xFFF) << 64 | 2 << 62 | random)


def token_at(epoch_seconds: float) -> UUID:
    """Return the smallest token that can be made at that time: a bound for a range of tokens."""
    return UUID(int=max(0, int(epoch_seconds * 1000)) << 80)


@dataclass(frozen=True, slots=True)
class Parent:
    """The delivery that a new one replaces, in the same transaction that records the new one.

    ``claim`` is the number of the claim that reports the replacement (a worker retries its own job); None
    if the parent is not claimed (a move from a delay queue). ``outcome`` is the outcome of the parent:
    superseded, or completed if the job repeats itself.
    """

    token: UUID
    claim: int | None = None
    outcome: Outcome = Outcome.SUPERSEDED
    worker: UUID | None = None
    """The worker that reports the replacement; None: it is no worker."""
    error: str | None = None
    """The error of the parent's run, if known; redacted."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One push of a job, with all data that is needed to put it into an empty Redis again."""

    token: UUID
    job_id: str
    queue: str
    task: str
    envelope: bytes
    """The exact bytes and routing. The adapter gives it a version, and only the adapter reads it."""
    priority: int = 0
    attempt: int = 1
    due_at: float | None = None
    """Seconds since the epoch; None: at once."""
    expires_at: float | None = None
    """Seconds since the epoch after which the library would drop it without a run; None: never."""
    key: str | None = None
    rule: KeyRule | None = None
    """With a key: what happens if another job holds it."""
    trace: str | None = None
    recover: RecoverRule | None = None
    """None: it is restored whenever it is lost."""
    parent: Parent | None = None
    fresh: bool = False
    """The job id is new, so that no older delivery of it can exist. This saves a query."""
    derived: bool = False
    """Its token is derived from the run that sends it: if it has ended already, it is refused."""
    closes: str | None = None
    """The join that this delivery continues. Of several, the first is recorded; the others are refused."""

    @property
    def is_plain(self) -> bool:
        """Return True if it has no rule, and concerns no other delivery."""
        first = self.fresh and self.parent is None and not self.derived
        return first and self.closes is None and self.rule is None and self.recover is None


@dataclass(frozen=True, slots=True)
class Request:
    """A job that SQL or a schedule asked for, before the leader has rendered its message."""

    id: int
    source: int
    job_id: str
    queue: str
    task: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    requested_at: float
    """Seconds since the epoch, by the clock of the database."""
    due_at: float | None = None
    """Seconds since the epoch; None: at once."""
    priority: int = 0
    key: str | None = None
    max_attempts: int | None = None
    """How often the library may run the job in all; None: the library's own default."""
    serializer: str = ""
    """How the processes of its source serialize messages; empty: not known."""
    unreadable: str = ""
    """Why Python cannot read its arguments, for example a number of 5,000 digits; empty: it can."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The result of recording a batch of deliveries."""

    refused: frozenset[UUID] = frozenset()
    """Deliveries that must not be pushed: their parent ended or was replaced, or their claim is stale."""
    leader_live: bool = False
    """A leader's lease is live: a delivery that is not pushed now will be pushed by the leader."""
    spooled: bool = False
    """Postgres did not take the batch; the spool has it."""
    lost: bool = False
    """Neither Postgres nor the spool took the batch. This is already counted and logged."""
    committed: bool = False
    """A transaction of the application has recorded them: they are never withdrawn, and their sender is
    no longer there to receive an error."""
    at: float = field(default_factory=time.monotonic, compare=False)
    """When the answer came, by the monotonic clock of this process."""

    @property
    def written(self) -> bool:
        """True if Postgres has the batch. Only then can a leader have pushed it."""
        return not (self.spooled or self.lost)

    def may_be_pushed(self, deadline: float) -> bool:
        """Return True if more than ``deadline`` seconds have passed, so that a leader may have pushed."""
        return self.written and self.leader_live and time.monotonic() - self.at > deadline


@dataclass(frozen=True, slots=True)
class Beside:
    """A record that is under way while its delivery is pushed."""

    expected: Recorded
    """The likely result."""
    result: Callable[[], Recorded]
    """Waits for the commit. Must be called once, after the push, also if the push failed."""


class Refusal(StrEnum):
    """Why the claim of a start was refused."""

    ENDED = "ended"
    """The delivery has a tombstone. Skip it, and correct its state in Redis."""
    CLAIMED = "held"
    """Another live worker runs it. Skip it, and change nothing of the live run."""
    SPENT = "spent"
    """Its crash budget is spent with this start, or its rule forbids another run. It is buried; skip it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of one worker to run one delivery, until the worker reports the end or is declared dead."""

    token: UUID
    number: int
    """1 for the first start of the delivery; 0 for a start without a claim while Postgres was away."""
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """A start that must be skipped."""

    token: UUID
    reason: Refusal
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """The answer for a delivery that is not recorded. The worker records it and claims it again."""

    token: UUID


@dataclass(frozen=True, slots=True)
class WorkerDeclaredDead:
    """The answer for a worker that was declared dead: its claim would be voided at once."""

    token: UUID


ClaimAnswer = Claim | Refused | Unknown | WorkerDeclaredDead
"""The answer of a store to a request for a claim."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of an ended job in a join that the library counts in Redis (a chord, a group's barrier)."""

    join: str
    state: bytes = b""
    """The data that the library keeps of the job for the continuation. Only the adapter reads it."""


@dataclass(frozen=True, slots=True)
class End:
    """A worker's report that a delivery has ended, for one claim."""

    token: UUID
    number: int
    outcome: Outcome
    worker: UUID
    job_id: str = ""
    queue: str = ""
    task: str = ""
    ended_at: float = field(default_factory=time.time)
    error: str | None = None
    """The error, already redacted and cut to 5,000 characters."""
    part: Part | None = None


class Ended(StrEnum):
    """The effect of a reported end."""

    ENDED = "ended"
    LATE = "late"
    """Its claim number was stale, or the delivery had a tombstone already: nothing changed."""
    UNKNOWN = "unknown"
    """The delivery was not recorded: only its tombstone is written."""


@dataclass(frozen=True, slots=True)
class Beat:
    """The message of a worker that it is alive, with its claims and the age of its unwritten reports."""

    worker: UUID
    counter: int
    claims: Sequence[UUID]
    """Deliveries in flight: from before the claim is asked for until the end is committed."""
    name: str = ""
    """The library's own name of the worker, as in Redis."""
    host: str = ""
    pid: int = 0
    queues: Sequence[str] = ()
    unflushed_since: float | None = None
    """Seconds since the epoch of the oldest report that Postgres does not have; None: it has all."""
    pulse: tuple[UUID, int] | None = None
    """The pulse (epoch, n) that this worker reads in its Redis."""


@dataclass(frozen=True, slots=True)
class Join:
    """Dependencies of a job that the library has deleted: the ledger knows how they ended."""

    job_ids: Sequence[str] = ()
    """Empty: the library shows that all dependencies have ended, but it has not released the job."""
    failure_will_do: bool = False
    """A failed dependency counts as a completed one."""
    doubtful: Sequence[UUID] = ()
    """Deliveries that the library shows as running or failed: in the ledger they may be completed."""


@dataclass(frozen=True, slots=True)
class EndedPart:
    """An ended member of a join, with all data that the library needs to count it again."""

    token: UUID
    job_id: str
    queue: str
    state: bytes
    envelope: bytes
    """Empty: the member was not recorded."""


@dataclass(frozen=True, slots=True)
class OpenJoin:
    """A join whose continuation is not recorded yet."""

    id: str
    size: int
    """The number of members it waits for; 0: not known."""
    state: bytes = b""
    """The data that the adapter gave when it opened the join."""
    parts: Sequence[EndedPart] = ()
    """The members that have ended, in the order of their ends."""


@dataclass(frozen=True, slots=True)
class LastOutcome:
    """The state of a job id in the ledger."""

    owed: bool = False
    outcome: Outcome | None = None
    """Its last outcome, without retries and repeats; None: the history has no end of it."""


DROPPED_BY_LIVE_WORKER = UUID(int=0).hex
"""Used instead of the worker's name in ``taken_by``: the worker lives, but it dropped the delivery. The
worker does not put the delivery back. If the worker runs the delivery after all, it asks for a claim."""


RAN_BEFORE_RECORD = 1.0
"""Seconds by which a delivery may end before its record: a single job is pushed beside its record."""


@dataclass(frozen=True, slots=True)
class Observation:
    """The result of an inspection of one delivery in Redis."""

    presence: Presence
    mark: str = ""
    """A fingerprint of the observed state. A suspect is only restored if this has not changed since."""
    other: UUID | None = None
    """With OVERWRITTEN: the token of the other delivery, if jobguard made it."""
    bodiless: bool = False
    """With ABSENT: the library has no data of the delivery."""
    pushed: bool = False
    """With ABSENT: the library has data of the delivery that it writes together with the push."""
    by_id: bool = False
    """With an end: the library keeps ends by job id, so that this may be the end of another delivery."""
    joins: Join | None = None
    """With SCHEDULED: it waits for other jobs, and the library knows of no such job that will still end."""
    taken_by: str = ""
    """The worker that has taken it and would put it back or run it: the name of its session, or its id in
    hex. If that worker is dead or has left, or with DROPPED_BY_LIVE_WORKER, the delivery counts as
    absent."""


@dataclass(frozen=True, slots=True)
class Owed:
    """An owed delivery as an inspection needs it: a row of the ledger, with its claim and its suspicion.

    Ages are measured by the clock of the database.
    """

    token: UUID
    job_id: str
    queue: str
    task: str
    age: float
    """Seconds since it was recorded."""
    due_in: float
    """Seconds until it is due; 0 or less: it is due."""
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
    """The worker's beats list the delivery, or the claim is too young to be in a beat."""
    claim_announced: bool = False
    """The worker that claimed it has reported that it leaves: no crash."""
    suspected: Cause | None = None
    suspected_for: float = 0.0
    suspected_mark: str = ""
    unsent: bool = False
    """Its producer certainly sent nothing to Redis: no worker can have run it."""


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
    """Older tokens of the same job that may be in its place and are known to be superseded."""
    takeover: bool = False
    """The worker that ran it is dead: ignore the data of that run in Redis."""
    running: bool = False
    """A live worker runs it: restore the data that other jobs must see, and push nothing."""
    released: bool = False
    """Its dependencies have ended: it does not wait any longer."""
    taken_by: str = ""
    """The dead worker that has taken it according to Redis: take it back from there."""
    sealed: bool = False
    """The envelope is empty: it is sealed in the ledger, and this process has no key for it."""
    trace: str | None = None
    """The context of the span that sent it; see Delivery."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """A page of the deliveries that wait in Redis, whether or not the ledger knows them."""

    deliveries: Sequence[Delivery] = ()
    """Deliveries whose token is in Redis, with everything that their records need."""
    unmarked: int = 0
    """The number of jobs on this page that have no token; with ``mark``, none is left."""
    unreadable: int = 0
    """The number of jobs on this page of which no record can be made."""
    after: str | None = None
    """Where the next page begins; None: this was the last page."""


class Restored(StrEnum):
    """The result of the atomic restore of one delivery."""

    RESTORED = "restored"
    PRESENT = "present"
    """The delivery was present: nothing was done."""
    CHANGED = "changed"
    """Another delivery of the job is in its place: nothing was done."""
    EXPIRED = "expired"
    """Its time to live is over: the library would have dropped it."""
    UNREADABLE = "unreadable"
    """The envelope has a version that this jobguard does not know: nothing was done."""
    TOO_LATE = "too_late"
    """The deadline in Redis' time had passed: nothing was done."""
    ERROR = "error"
