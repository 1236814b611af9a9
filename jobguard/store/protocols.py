"""Protocols of the store, one for each role. PostgreSQL and the memory store give the same answers.

The processes of the user's application use ``HostStore``, the one leader of a namespace uses
``LeaderStore``, and people use ``Ledger`` (commands, stats, tests).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

from jobguard.model import (
    Beat,
    Cause,
    ClaimAnswer,
    Delivery,
    End,
    Ended,
    LastOutcome,
    OpenJoin,
    Outcome,
    Owed,
    Part,
    Recorded,
    RecoverRule,
    Request,
    Restorable,
)


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A worker's request for the claim of a delivery."""

    token: UUID
    nonce: UUID
    """The same nonce gives the same claim, so that a worker can ask again after a lost answer."""
    worker: UUID
    pid: int
    namespace: str
    worker_timeout: float
    """Used only without a leader: a worker without a beat for so long, by the database's clock, is
    dead.
    """
    crash_budget: int
    recover: RecoverRule | None = None
    """The rule of the task, as this worker knows it."""


@dataclass(frozen=True, slots=True)
class BeatReply:
    """The answer to a worker's beat."""

    dead: bool = False
    """A leader has declared this worker dead: it continues under a new id."""
    leader_live: bool = False


Pulse = tuple[UUID | None, int | None]
"""Epoch and count of a pulse."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A source as it is stored in the database."""

    id: int
    namespace: str
    library: str
    address: str
    prefix: str
    name: str | None
    settings: str
    one_body: bool = True
    """Redis keeps one body per job id; see jobguard.adapter.Source."""
    pulse_epoch: UUID | None = None
    pulse_n: int | None = None
    run_id: str | None = None
    watched_at: float | None = None
    """When a leader last advanced the pulse, in seconds since the epoch."""
    serializer: str = ""
    """How messages are serialized, as far as the registering process knows."""


class HostStore(Protocol):
    """The store as producers and workers use it.

    Every method may raise StoreUnavailable or a subclass and, where it writes rows, BadRow.
    """

    installation: str | None
    """The installation name in the database; known after a source was registered."""

    def conninfo(self) -> str | None:
        """Return the conninfo with the password for another process; None if none can connect."""

    def probe(self) -> bool:
        """Return True if PostgreSQL accepts a connection, without waiting; False if not known yet."""

    def register(self, source: SourceRow) -> SourceRow:
        """Register the source; return its stored row.

        The settings in it are those of the first process that registered the source.
        """

    def record(
        self,
        source: int,
        deliveries: Sequence[Delivery],
        *,
        namespace: str,
        outbox: bool = False,
        replay: bool = False,
        newest: bool = False,
        relaxed: bool = False,
    ) -> Recorded:
        """Commit deliveries as owed. Recording the same token again changes nothing.

        A delivery supersedes its parent and, if Redis keeps one body per job id, every unclaimed
        delivery of its job id. It is refused if the parent has ended or is claimed by another live
        worker, if the delivery is derived and has ended, or if another delivery has closed its join.
        ``replay`` means that the deliveries may be old, so history is checked first: a delivery is not
        owed again if it has ended or if a younger delivery of its job id existed. And the retry of a run
        without a claim counts also while another worker has the claim. ``newest`` means that for the
        library these deliveries replace all other deliveries of their job ids.
        """

    def record_keyed(
        self, source: int, delivery: Delivery, *, namespace: str, deadline: float
    ) -> tuple[str, str | None, bool]:
        """Commit a delivery if its key allows it; return the verdict, the holder's id, and if one leads.

        The verdict is "free" or "replaced" (it is owed now), "held" (another job of the key is owed),
        "throttled", or "ended" (its run has sent it before). A delivery that replaced another one is not
        withdrawn; the leader pushes it after ``deadline`` seconds if Redis does not have it.
        """

    def installation_id(self) -> str:
        """Return the identity of this ledger."""

    def take_committed(
        self, source: int, tokens: Sequence[UUID], *, deadline: float
    ) -> frozenset[UUID]:
        """Take the push of deliveries that this process recorded in a transaction of the application.

        Return those that are committed and that no leader pushes. They supersede all other unclaimed
        deliveries of their job ids, if Redis keeps one body per job id. The leader pushes them if they are
        still not in Redis after ``deadline`` seconds.
        """

    def record_beside(
        self, source: int, delivery: Delivery, *, namespace: str, relaxed: bool = False
    ) -> Callable[[], Recorded]:
        """Send the record of a plain delivery; the returned function waits until it is committed.

        The delivery may be pushed meanwhile, so it may have ended before the record comes. Then it is
        not owed.
        """

    def withdraw(self, source: int, tokens: Sequence[UUID]) -> None:
        """Delete deliveries that were never pushed.

        Those that are or were claimed, or were recorded in a transaction of the application, stay.
        """

    def refuse(self, source: int, deliveries: Sequence[Delivery]) -> None:
        """Write tombstones for deliveries that were pushed before their records were refused.

        Their outcome is that of a cancelled parent, else superseded. Deliveries that are owed or have
        ended stay as they are.
        """

    def outbox(self, source: int, tokens: Sequence[UUID]) -> None:
        """Leave the push of owed deliveries to the leader."""

    def claim(self, source: int, request: ClaimRequest) -> ClaimAnswer:
        """Grant the claim unless the delivery has ended or another live claim exists.

        A worker that was declared dead gets no claim. If it asks again under its new id with the same
        nonce, it gets the claim that was granted before.

        Taking over the claim of a dead worker charges the crash budget, unless that worker had reported
        its regular exit.
        """

    def claims(self, source: int, requests: Sequence[ClaimRequest]) -> Mapping[UUID, ClaimAnswer]:
        """Answer several claim requests of one process in one call; return the answers by nonce.

        A process that was declared dead may use two worker ids in one call.
        """

    def release(
        self, source: int, token: UUID, worker: UUID, *, number: int, interrupted: bool = False
    ) -> None:
        """Remove this worker's claim, so that any worker may start the delivery again.

        This counts as no crash. ``number`` 0 means any claim number of this worker. ``interrupted``: the
        run began; its claim stays if its rule forbids another run.
        """

    def end(self, source: int, ends: Sequence[End]) -> Sequence[Ended]:
        """Move deliveries from owed to history on behalf of their claims; return one answer per end."""

    def now(self) -> float:
        """Return the seconds since the epoch, by the database's clock."""

    def cancel(
        self,
        source: int,
        *,
        tokens: Sequence[UUID] = (),
        job_ids: Sequence[str] = (),
        queue: str | None = None,
        meant: float | None = None,
        until: UUID | None = None,
        waiting: Sequence[UUID] = (),
    ) -> int:
        """Write tombstones and return how many deliveries were owed.

        ``queue`` selects every unclaimed delivery in that queue. Job ids and the queue apply to
        deliveries that were recorded before the time ``meant``, by the database's clock (None: to
        none), to deliveries with tokens up to ``until``, and to ``waiting``: the deliveries that waited
        in a spool at that moment. A token applies to its delivery at any time, even before the delivery
        is known.
        """

    def open_join(self, source: int, join: str, *, size: int, state: bytes, namespace: str) -> bool:
        """Store a join and the number of members that its continuation waits for.

        A closed join is opened again. Return True if a leader's lease is live.
        """

    def close_join(self, source: int, join: str) -> None:
        """Close a join that will have no continuation."""

    def decline(self, source: int, token: UUID, *, most: int, wait: float, error: str) -> int:
        """Put an unclaimed delivery back after a delay, because a worker cannot begin it.

        The first delay is ``wait`` seconds, and each further one is twice as long, up to 5 minutes. After
        ``most`` times the delivery is dead. Return how many times are left.
        """

    def beat(self, source: int, beat: Beat, *, namespace: str) -> BeatReply:
        """Store a worker's beat."""

    def leave(self, worker: UUID) -> None:
        """Store that a worker has exited regularly."""

    def report_death(self, worker: UUID) -> None:
        """Store that a worker's process is gone, unless it has exited regularly: its claims are void."""

    def recoverable(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those deliveries that a leader will restore.

        These are owed deliveries of a trusted queue in a watched source. A source that was watched
        within the last five minutes counts too, so that the death of a leader does not make jobs count
        as lost.
        """

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Return the outcome of each delivery that has ended."""

    def amend(self, source: int, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change the envelope of an owed delivery; return False if it is not owed.

        ``change`` takes the stored envelope and returns the new one. It may be called more than once.
        """

    def heartbeat(
        self,
        source: int,
        *,
        job_id: str,
        token: UUID | None = None,
        number: int | None = None,
        progress: float | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Store a running job's progress; return False if no such claim exists."""

    def predecessor(self, source: int, token: UUID) -> UUID | None:
        """Return the worker that last lost its claim of this owed delivery, or None if none is known."""

    def lock(self, source: int, name: str, *, token: UUID, number: int) -> bool:
        """Take a lock on behalf of an existing claim, unless the claim of another live worker has it.

        The same claim may take the lock again. ``number`` 0 means any number of the claim.
        """

    def unlock(self, source: int, name: str, *, token: UUID) -> None:
        """Release a lock if it belongs to this delivery."""

    def begin_effect(
        self, source: int, name: str, *, job_id: str | None, token: UUID, number: int, again: bool
    ) -> tuple[str, str | None]:
        """Begin an effect on behalf of a claim; return the verdict, and the result of a done one.

        The verdict is "first", "done", "busy" (the claim of another live worker does it), "left" (a claim
        that has ended left it behind, and ``again`` is false) or "unclaimed" (this claim does not exist).
        ``job_id``: it is an effect of this job, which ends with the completion of the job.
        """

    def finish_effect(
        self, source: int, name: str, *, token: UUID, number: int, result: str | None
    ) -> None:
        """Store that an effect of this claim is done."""

    def forget_effect(self, source: int, name: str, *, token: UUID, number: int) -> None:
        """Delete an effect of this claim that is not done."""

    def close(self) -> None:
        """Close the connection."""


@dataclass(frozen=True, slots=True)
class Brake:
    """The queues whose recoveries a person, or jobguard itself, has stopped."""

    paused: bool = False
    held: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The time and the reason of each hold, by ``"<source>/<queue>"``."""

    def holds(self, source: int, queue: str) -> bool:
        """Return True if no delivery of this queue may be restored now."""
        return self.paused or f"{source}/{queue}" in self.held or f"{source}/*" in self.held


@dataclass(frozen=True, slots=True)
class Signs:
    """What a leader reads often, in one statement: the brake, and whether there is anything to do."""

    brake: Brake = field(default_factory=Brake)
    owed: bool = True
    """True if a delivery is owed, or a join is open, in any namespace of the database."""
    requested: bool = True
    """True if a request waits, or a schedule has a slot to fire."""
    sources: int = 0
    """The number of sources of the namespace."""
    asked_at: float = float("inf")
    """When they were asked for, by the clock of this process."""


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A guarded worker as it is stored in the database."""

    id: UUID
    name: str
    host: str
    pid: int
    queues: Sequence[str]
    beat: int
    started_at: float
    """Seconds since the epoch, by the database's clock."""
    unflushed_since: float | None
    pulse: tuple[UUID, int] | None
    left_age: float | None
    """Seconds since it left in an orderly way, if it did."""
    dead: bool
    claims: int
    """Number of claims of this worker, counted up to 2."""

    @property
    def left(self) -> bool:
        """True if it left in an orderly way."""
        return self.left_age is not None


@dataclass(frozen=True, slots=True)
class Incident:
    """A loss, and what was done about it."""

    id: int
    source: int
    cause: Cause
    detail: str
    age: float
    """Seconds since it was opened."""
    missing: int = 0
    restored: int = 0


@dataclass(frozen=True, slots=True)
class QueueRow:
    """The leader's knowledge about the consumers of a queue. Times are seconds since the epoch."""

    source: int
    queue: str
    trusted_since: float | None = None
    clean_since: float | None = None
    unguarded: Sequence[str] = ()
    unguarded_at: float | None = None


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """A schedule that is due, or not planned yet. Times are seconds since the epoch."""

    name: str
    cron: str | None
    every: float | None
    rule: str | None
    """As JSON: SQL takes any."""
    timezone: str
    created_at: float
    starts_at: float | None
    ends_at: float | None
    jitter: float
    catch_up: str
    version: UUID
    """New with each change of the schedule."""
    next_at: float | None
    """The next slot; None: not planned yet."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the leader does about a due schedule: the slots to fire now, and the next one."""

    slots: Sequence[float] = ()
    next_at: float | None = None
    """None: no further slot will come."""
    fire_at: float | None = None
    """When the next slot is fired: with its jitter."""
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Void:
    """A dead worker's claim that is removed, so that its delivery can be restored."""

    token: UUID
    number: int
    charge: bool
    """Charge the crash budget, because the worker did not report a regular exit."""
    backoff: float
    """Seconds until the delivery may be restored."""


@dataclass(frozen=True, slots=True)
class Closing:
    """An owed delivery that the leader closes, by observation or because its crash budget is spent."""

    token: UUID
    outcome: Outcome
    error: str | None = None
    part: Part | None = None


class LeaderStore(Protocol):
    """The store as the one leader of a namespace uses it.

    Every write names the term; with an older term it raises NotLeading and changes nothing.
    """

    def elect(self, *, lease: float, patience: float = 0.0) -> int | None:
        """Take the lease if it has been free for ``patience`` seconds; return the new term, or None."""

    def renew(self, term: int, *, lease: float) -> Brake:
        """Extend the lease of this term and return the brake."""

    def signs(self, term: int) -> Signs:
        """Return the brake, and whether there is anything to do. Raise NotLeading if the term is over."""

    def resign(self, term: int) -> None:
        """Give up the lease, so that another reconciler can lead at once."""

    def now(self) -> float:
        """Return the seconds since the epoch, by the database's clock."""

    def identity(self) -> Mapping[str, str | None]:
        """Return id and name of the installation, and its stored and current place.

        The place is system_identifier and database_oid.
        """

    def sources(self) -> Sequence[SourceRow]:
        """Return the sources of the namespace."""

    def acknowledge(
        self, term: int, source: int, known: Pulse, pulse: Pulse, *, run_id: str | None
    ) -> bool:
        """Store the pulse of Redis, before the next tick.

        Return False, and store nothing, if Postgres has another pulse than the known one, which it had
        before: a person accepted a move, or Postgres was set back to an earlier state.
        """

    def open_incident(
        self, term: int, source: int, cause: Cause, detail: str, epoch: UUID | None
    ) -> int:
        """Store a loss before the pulse is created again. Return the id of the incident."""

    def incidents(self, source: int) -> Sequence[Incident]:
        """Return the open incidents, oldest first."""

    def progress(
        self, term: int, incident: int, *, missing: int, restored: int, close: bool
    ) -> None:
        """Add to an incident's counts; close it after a full pass."""

    def workers(self, source: int) -> Sequence[WorkerRow]:
        """Return the workers that have not been forgotten."""

    def charges(self, source: int, workers: Sequence[UUID]) -> Mapping[UUID, Sequence[int]]:
        """Return how often the claimed jobs of each worker are charged: the two highest numbers."""

    def listed(self, source: int, tokens: Sequence[UUID]) -> tuple[frozenset[UUID], bool]:
        """Return those that the last beat of a worker lists which has neither left nor died.

        A worker also lists deliveries that it has not claimed yet. The second result: such a worker has
        reports that are not written yet.
        """

    def declare_dead(self, term: int, workers: Sequence[UUID]) -> Mapping[UUID, int]:
        """Declare these workers dead: their claims are void from now on. Return how many each has.

        A worker that was dead before is not in the result.
        """

    def forget(self, term: int, workers: Sequence[UUID]) -> None:
        """Delete rows of workers that have been gone for 15 minutes and have no claims."""

    def page(self, source: int, *, after: UUID | None, limit: int) -> Sequence[Owed]:
        """Return owed deliveries in the order of their tokens."""

    def see_committed(self, term: int, source: int, *, wait: float) -> int:
        """See deliveries that were recorded in transactions of the application and are committed.

        The leader pushes them after ``wait`` seconds, unless their processes take them before. They
        supersede others as in ``take_committed``. Return how many were seen.
        """

    def watched(
        self, source: int, *, limit: int, after: UUID | None = None, urgent: bool = False
    ) -> Sequence[Owed]:
        """Return the deliveries that every inspection includes.

        These are the suspects, the outbox, and the claims of workers that have left or died. ``urgent``
        selects only those that were reported absent and need no second inspection.
        """

    def unheld(
        self, source: int, *, after: UUID | None, workers: int, limit: int
    ) -> tuple[Sequence[Owed], UUID | None]:
        """Return claims whose workers dropped them or never registered, though they did not leave or die.

        The claims of the next ``workers`` workers after the worker ``after`` are checked. The second
        result is the last of these workers; None: these were the last ones.
        """

    def tally(
        self, source: int, *, after: UUID | None, limit: int
    ) -> tuple[Mapping[str, int], UUID | None]:
        """Count the next ``limit`` owed deliveries after this token, by queue.

        The second result is the last token of these; None: these were the last ones.
        """

    def suspect(self, term: int, source: int, seen: Sequence[tuple[UUID, Cause, str]]) -> None:
        """Store that these were seen absent; keep the time of the first inspection with the same mark."""

    def clear(self, term: int, source: int, tokens: Sequence[UUID]) -> None:
        """Store that these are in their place: they are neither suspects nor in the outbox."""

    def envelopes(
        self, source: int, tokens: Sequence[UUID], *, most_bytes: int | None = None
    ) -> Sequence[Restorable]:
        """Return the data to restore these, in the given order, without those that have ended.

        ``most_bytes`` limits the result to the first deliveries whose envelopes together are not
        larger; the result has at least one. Those whose envelope this process cannot unseal are marked.
        """

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Return the outcome of each delivery that has ended."""

    def rules(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, RecoverRule]:
        """Return the rules for the recovery of those owed deliveries that have one."""

    def known(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those deliveries that the ledger knows, owed or ended."""

    def overtaken(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those deliveries after which a later delivery of the same job id began."""

    def sharing_job_id(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Return those whose end, as the library keeps it by job id, may belong to another delivery."""

    def last_outcomes(self, source: int, job_ids: Sequence[str]) -> Mapping[str, LastOutcome]:
        """Return what is known about each of these job ids."""

    def open_joins(self, source: int, *, after: str, limit: int) -> Sequence[OpenJoin]:
        """Return joins that have not been closed, in the order of their ids."""

    def complete_joins(self, source: int, *, quiet: float, limit: int) -> Sequence[OpenJoin]:
        """Return open joins whose members have all ended, the last one at least ``quiet`` seconds ago."""

    def restored(
        self,
        term: int,
        source: int,
        tokens: Sequence[UUID],
        *,
        causes: Mapping[UUID, Cause] | None = None,
    ) -> None:
        """Store that these were restored, and why: count it, and delete their suspicion."""

    def restores(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, int]:
        """Return how often each of these owed deliveries was restored, without those it superseded.

        A restore is not counted if after it a worker of the queue died that had claims.
        """

    def void(self, term: int, source: int, voids: Sequence[Void]) -> Sequence[UUID]:
        """Remove these claims if they still have that number, and make suspects with the cause worker."""

    def close_owed(self, term: int, source: int, closings: Sequence[Closing]) -> Sequence[UUID]:
        """End these on behalf of the leader. Return the tokens of those that were owed."""

    def queues(self, source: int) -> Sequence[QueueRow]:
        """Return what is known about the consumers of each queue."""

    def trust(self, term: int, rows: Sequence[QueueRow]) -> None:
        """Store what is known about the consumers of these queues."""

    def hold(self, term: int, source: int, queue: str, reason: str) -> None:
        """Hold a queue until a person resumes it."""

    def requests(self, sources: Sequence[int], *, limit: int, most_bytes: int) -> Sequence[Request]:
        """Return waiting requests of these sources in their order; at least one, if there is one."""

    def accept(self, term: int, source: int, rendered: Sequence[tuple[int, Delivery]]) -> int:
        """Take these requests and record their deliveries, with outbox rows; return how many there were.

        A request that was cancelled or taken meanwhile is left out. One whose key another job holds is
        cancelled.
        """

    def hold_request(self, term: int, request: int, error: str) -> None:
        """Keep a request that cannot be rendered, with the reason."""

    def due_schedules(self, *, limit: int) -> Sequence[ScheduleRow]:
        """Return schedules that have a slot to fire, or that are not planned yet."""

    def fire(self, term: int, schedule: ScheduleRow, plan: Plan) -> int:
        """Fire the slots of a plan as requests, and plan the next slot; return how many were fired.

        Nothing happens if the schedule has changed or was planned again since the row was read, and a
        slot is never fired twice.
        """

    def fail_schedule(self, term: int, schedule: ScheduleRow, error: str) -> None:
        """Store why a schedule cannot be planned: it rests until a person changes or resumes it."""

    def forget_slots(self) -> None:
        """Delete the rows of slots that were fired more than 7 days ago."""

    def rotate(self, *, retention: float, keep_envelopes: bool = False) -> int:
        """Create the coming partitions of history and drop the old ones. Return how many were dropped.

        ``keep_envelopes``: from now on, history keeps the envelopes of completed deliveries too.

        All namespaces share history: rows that another namespace wants to keep stay.
        """

    def count_up(self, term: int, *, seconds: float) -> None:
        """Count what is owed, and the ends of each minute of the last seconds, for people who look."""

    def vacuum(self) -> Sequence[str]:
        """Vacuum the small tables that need it. Return their names."""

    def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of jobs in each state. Terminal states count deliveries that are still in history."""

    pending: int = 0
    scheduled: int = 0
    processing: int = 0
    stuck: int = 0
    completed: int = 0
    failed: int = 0
    dead: int = 0
    cancelled: int = 0

    @property
    def total(self) -> int:
        """Return the sum over all states."""
        return (
            self.pending
            + self.scheduled
            + self.processing
            + self.completed
            + self.failed
            + self.dead
            + self.cancelled
        )


class Ledger(Protocol):
    """The store as people read and control it."""

    def stats(
        self, namespace: str, *, source: int | None = None
    ) -> Mapping[tuple[str, str], Counts]:
        """Return counts by (label of the source, queue).

        ``source`` limits them to the source with this id. The label is the source's name or address,
        with its library and prefix where several sources share that.
        """

    def job(self, namespace: str, job_id: str) -> Sequence[Mapping[str, Any]]:
        """Return every delivery of this job id that is owed or in history, newest first."""

    def dead(
        self, namespace: str, *, outcomes: Sequence[Outcome], queue: str | None, limit: int
    ) -> Sequence[Mapping[str, Any]]:
        """Return jobs that were given up, newest first."""

    def requeue(self, namespace: str, token: UUID) -> UUID:
        """Create a new delivery of a failed, dead or owed one and leave its push to the leader.

        The new delivery supersedes an owed one: a copy of the old one that is still in Redis is
        skipped. Raise JobguardError if there is no such delivery, if its envelope is gone, or if its
        worker is running it.
        """

    def add_schedule(self, namespace: str, definition: Mapping[str, Any]) -> bool:
        """Add a schedule, or change the one of its name; return whether anything changed.

        ``definition`` has the arguments of the SQL function jobguard.add_schedule, with durations in
        seconds. Raises ConfigurationError.
        """

    def schedules(self, namespace: str) -> Sequence[Mapping[str, Any]]:
        """Return the schedules of the namespace by name."""

    def change_schedule(self, namespace: str, name: str, change: str) -> str | None:
        """Remove, pause, resume or run a schedule: the word for it. Return the job id of a run.

        Raises ConfigurationError if there is no such schedule.
        """

    def end_of(self, source: int, job_id: str) -> Outcome | None:
        """Return the last outcome of a job; None: it is owed, requested or unknown."""

    def absent(self, namespace: str, *, queue: str | None) -> Sequence[Mapping[str, Any]]:
        """Return owed deliveries that a leader saw absent from Redis and that are not restored yet."""

    def pause(self, namespace: str, *, queue: str | None) -> None:
        """Stop all restores, in the namespace or in one queue, until they are resumed."""

    def resume(self, namespace: str, *, queue: str | None, moved: bool) -> None:
        """Allow restores again; ``moved`` also accepts the current place of this database."""

    def overview(self, namespace: str) -> Mapping[str, Any]:
        """Return leader, brake, sources, workers, open incidents and queues, for `stats` and `doctor`."""
