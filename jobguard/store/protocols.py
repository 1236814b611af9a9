"""What the rest of jobguard asks of a store, by role; Postgres and memory give the same answers.

``HostStore`` is spoken to by the processes of the user's application, ``LeaderStore`` by the one
leader of a namespace, ``Ledger`` by people: commands, stats, tests.
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
    Restorable,
)


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """A worker asks for the claim of a delivery."""

    token: UUID
    nonce: UUID
    """The same nonce again is the same claim: a lost answer can be asked for once more."""
    worker: UUID
    pid: int
    namespace: str
    worker_timeout: float
    """Only used while no leader leads: a holder silent this long by the database's clock is dead."""
    crash_budget: int


@dataclass(frozen=True, slots=True)
class BeatReply:
    """What a worker learns from its beat."""

    dead: bool = False
    """A leader has declared this worker dead: it goes on under a new id."""
    leader_live: bool = False


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A source as the database has it."""

    id: int
    namespace: str
    library: str
    address: str
    prefix: str
    name: str | None
    settings: str
    one_body: bool = True
    """Redis keeps one body of a job id; see jobguard.adapter.Source."""
    pulse_epoch: UUID | None = None
    pulse_n: int | None = None
    run_id: str | None = None
    watched_at: float | None = None
    """When a leader last moved the pulse, in seconds since the epoch."""


class HostStore(Protocol):
    """The store as producers and workers use it.

    Every method may raise StoreUnavailable (or one of its kinds) and, where rows are written, BadRow.
    """

    installation: str | None
    """The name that the database carries; known once a source was registered."""

    def conninfo(self) -> str | None:
        """How another process reaches it, with the password; None: no other process can."""

    def probe(self) -> bool:
        """Whether Postgres accepts us, found out without waiting; False: not known yet, ask again."""

    def register(self, source: SourceRow) -> SourceRow:
        """Make the source known; return what stands there, with the settings of who came first."""

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
        """Commit deliveries as owed. The same token again changes nothing.

        A delivery supersedes its parent and, where Redis keeps one body of an id, every unclaimed
        delivery of its job id. It is refused if the parent has ended or is claimed by somebody else who
        lives, if it is derived and has ended, or if another has closed its join. ``replay``: these may
        be old news, so history is looked at first: what has ended, or has had a younger life of its
        id, is not owed again. ``newest``: the library has these in the place of any other life of
        their ids.
        """

    def withdraw(self, source: int, tokens: Sequence[UUID]) -> None:
        """Forget deliveries that were never pushed, unless they are claimed or ever were."""

    def outbox(self, source: int, tokens: Sequence[UUID]) -> None:
        """Leave the push of owed deliveries to the leader."""

    def claim(self, source: int, request: ClaimRequest) -> ClaimAnswer:
        """Grant the claim unless the delivery has ended, or another live claim stands.

        Nor is one granted to a worker that was declared dead; if it asks again with its nonce, in its
        new name, a claim that it was granted before is its own.

        Taking over a dead claim charges the crash budget, unless its worker had said goodbye.
        """

    def claims(self, source: int, requests: Sequence[ClaimRequest]) -> Mapping[UUID, ClaimAnswer]:
        """The same for several, of one process, in one call; the answers by nonce.

        A process that was declared dead may ask in two names at once.
        """

    def release(self, source: int, token: UUID, worker: UUID, *, number: int) -> None:
        """Take this worker's claim away, so that anyone may start the delivery again; no crash.

        ``number`` 0: whichever it holds.
        """

    def end(self, source: int, ends: Sequence[End]) -> Sequence[Ended]:
        """Move deliveries from owed to history, in the name of their claims; one answer an end."""

    def now(self) -> float:
        """Seconds since the epoch, by the database's clock."""

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
        """Write tombstones; ``queue``: for every unclaimed delivery in it. Returns how many were owed.

        Ids and the queue mean what was recorded until the cancel was ``meant``, by the database's clock
        (None: nothing was), with tokens up to ``until``, and of what waited in a spool at that moment,
        ``waiting``. A token means its delivery whenever that comes, also if nobody knows it yet.
        """

    def open_join(self, source: int, join: str, *, size: int, state: bytes, namespace: str) -> bool:
        """Remember a join, and for how many members its continuation waits. One that is closed begins anew.

        Returns whether a leader's lease is live.
        """

    def close_join(self, source: int, join: str) -> None:
        """Nothing will come of a join."""

    def decline(self, source: int, token: UUID, *, most: int, wait: float, error: str) -> int:
        """A worker cannot begin an unclaimed delivery: it goes back after a while.

        First after ``wait`` seconds, then twice as many each time. After ``most`` times it is dead.
        Returns how many are left.
        """

    def beat(self, source: int, beat: Beat, *, namespace: str) -> BeatReply:
        """Take a worker's beat."""

    def leave(self, worker: UUID) -> None:
        """Take a worker's goodbye."""

    def recoverable(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Which of these a leader will bring back: owed, of a trusted queue of a source it watches.

        Or was watched five minutes ago: who kills a leader does not kill the jobs with it.
        """

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Which of these have ended, and how."""

    def amend(self, source: int, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change the envelope of an owed delivery; False if it is not owed.

        ``change`` gives the new one for the one that stands there, and may be asked again.
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
        """Note a running job's progress; False if no such claim stands."""

    def predecessor(self, source: int, token: UUID) -> UUID | None:
        """The worker whose claim of this owed delivery was taken away last; None: none that is known."""

    def lock(self, source: int, name: str, *, token: UUID, number: int) -> bool:
        """Take a lock in the name of a standing claim, unless that of another claim that lives stands.

        The same claim may take it again. ``number`` 0: whichever number the claim has.
        """

    def unlock(self, source: int, name: str, *, token: UUID) -> None:
        """Let go of a lock, if it is this delivery's."""

    def close(self) -> None:
        """Let go of the connection."""


@dataclass(frozen=True, slots=True)
class Brake:
    """What a person, or jobguard itself, holds back."""

    paused: bool = False
    held: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By ``"<source>/<queue>"``: since when and why."""

    def holds(self, source: int, queue: str) -> bool:
        """Whether nothing of this queue may be put back now."""
        return self.paused or f"{source}/{queue}" in self.held or f"{source}/*" in self.held


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A guarded worker as the database has it."""

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
    left: bool
    dead: bool
    claims: int
    """How many claims stand in its name."""
    lists: Sequence[UUID] = ()
    """The deliveries that its last beat listed, claimed or not."""


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
    """What the leader knows of who consumes a queue. Times are seconds since the epoch."""

    source: int
    queue: str
    trusted_since: float | None = None
    clean_since: float | None = None
    unguarded: Sequence[str] = ()
    unguarded_at: float | None = None


@dataclass(frozen=True, slots=True)
class Void:
    """A dead worker's claim that is taken away, so that its delivery can be put back."""

    token: UUID
    number: int
    charge: bool
    """Charge the crash budget: the worker did not say goodbye."""
    backoff: float
    """Seconds until it may go back."""


@dataclass(frozen=True, slots=True)
class Closing:
    """An owed delivery that the leader closes, from observation or because its budget is spent."""

    token: UUID
    outcome: Outcome
    error: str | None = None
    part: Part | None = None


class LeaderStore(Protocol):
    """The store as the one leader of a namespace uses it.

    Every write names the term; with an older term it raises NotLeading and changes nothing.
    """

    def elect(self, *, lease: float) -> int | None:
        """Take the lease if nobody holds it; the new term, or None."""

    def renew(self, term: int, *, lease: float) -> Brake:
        """Prolong this very term and read the brake."""

    def brake(self, term: int) -> Brake:
        """Read the brake. Raises NotLeading."""

    def resign(self, term: int) -> None:
        """Let go of the lease, so that another can lead at once."""

    def now(self) -> float:
        """Seconds since the epoch, by the database's clock."""

    def identity(self) -> Mapping[str, str | None]:
        """The installation: id, name, and what it was and is (system_identifier, database_oid)."""

    def accept_move(self) -> None:
        """Accept that this database is where it now is (after a move or an upgrade)."""

    def sources(self) -> Sequence[SourceRow]:
        """The sources of the namespace."""

    def acknowledge(
        self, term: int, source: int, epoch: UUID, n: int, *, run_id: str | None
    ) -> None:
        """Store the pulse that Redis has, before the next tick."""

    def open_incident(
        self, term: int, source: int, cause: Cause, detail: str, epoch: UUID | None
    ) -> int:
        """Write down a loss, before the pulse is made anew. Returns its id."""

    def incidents(self, source: int) -> Sequence[Incident]:
        """The open ones, oldest first."""

    def progress(
        self, term: int, incident: int, *, missing: int, restored: int, close: bool
    ) -> None:
        """Add to an incident's counts, and close it after a full pass."""

    def workers(self, source: int) -> Sequence[WorkerRow]:
        """The workers that have not been forgotten, with how many claims each holds."""

    def declare_dead(self, term: int, workers: Sequence[UUID]) -> None:
        """From now on these workers' claims are nobody's."""

    def forget(self, term: int, workers: Sequence[UUID]) -> None:
        """Drop rows of workers that are gone for a quarter of an hour and hold nothing."""

    def page(self, source: int, *, after: UUID | None, limit: int) -> Sequence[Owed]:
        """Owed deliveries in the order of their tokens."""

    def watched(
        self, source: int, *, limit: int, after: UUID | None = None, urgent: bool = False
    ) -> Sequence[Owed]:
        """Those under suspicion, in the outbox, or claimed by the dead: looked at every time.

        ``urgent``: only those whose absence we were told of, and need not see twice.
        """

    def count(self, source: int) -> Mapping[str, int]:
        """How many deliveries are owed, by queue."""

    def suspect(self, term: int, source: int, seen: Sequence[tuple[UUID, Cause, str]]) -> None:
        """Note that these were seen absent; the time of the first look with the same mark is kept."""

    def clear(self, term: int, source: int, tokens: Sequence[UUID]) -> None:
        """These are where they belong: neither suspect nor to be pushed."""

    def envelopes(
        self, source: int, tokens: Sequence[UUID], *, most_bytes: int | None = None
    ) -> Sequence[Restorable]:
        """What is needed to put these back, in the given order; the ended are left out.

        ``most_bytes``: only so many of the first that their envelopes are not larger, but one at least.
        """

    def tombstones(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        """Which of these have ended, and how."""

    def known(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Which of these the ledger has heard of: owed or ended."""

    def overtaken(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Which of these have had a later life of their job id begin since."""

    def sharing_job_id(self, source: int, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Of which of these an end that the library keeps by job id may be another delivery's."""

    def last_outcomes(self, source: int, job_ids: Sequence[str]) -> Mapping[str, LastOutcome]:
        """What is known of each of these job ids."""

    def open_joins(self, source: int, *, after: str, limit: int) -> Sequence[OpenJoin]:
        """Joins that have not been closed, in the order of their ids."""

    def complete_joins(self, source: int, *, quiet: float, limit: int) -> Sequence[OpenJoin]:
        """Those of them whose members have all ended, the last one at least so many seconds ago."""

    def restored(self, term: int, source: int, tokens: Sequence[UUID]) -> None:
        """These were put back: count it, and suspect them no longer."""

    def restores(self, source: int, tokens: Sequence[UUID]) -> Mapping[UUID, int]:
        """How often each of these owed deliveries was put back, without those that it superseded."""

    def void(self, term: int, source: int, voids: Sequence[Void]) -> Sequence[UUID]:
        """Take these claims away if they still stand with that number; suspects with cause worker."""

    def close_owed(self, term: int, source: int, closings: Sequence[Closing]) -> Sequence[UUID]:
        """End these in the leader's name. Returns the tokens of those that were owed."""

    def queues(self, source: int) -> Sequence[QueueRow]:
        """What is known of each queue's consumers."""

    def trust(self, term: int, rows: Sequence[QueueRow]) -> None:
        """Write what is known of these queues."""

    def hold(self, term: int, source: int, queue: str, reason: str) -> None:
        """Hold a queue until a person resumes it."""

    def rotate(self, *, retention: float) -> int:
        """Make the coming partitions of history and drop the old. Returns how many were dropped.

        History is shared by all namespaces: what another one wants to remember stays.
        """

    def vacuum(self) -> Sequence[str]:
        """Vacuum the small tables that need it. Returns which."""

    def close(self) -> None:
        """Let go of the connections."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many jobs are in which state. Terminal states count what history still remembers."""

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
        """All of them."""
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
    """The store as people read and steer it."""

    def stats(
        self, namespace: str, *, source: int | None = None
    ) -> Mapping[tuple[str, str], Counts]:
        """Counts by (what names the source, queue); ``source``: of the one of this id alone.

        A name is the source's name or address, with its library and prefix where several share that.
        """

    def job(self, namespace: str, job_id: str) -> Sequence[Mapping[str, Any]]:
        """Every delivery of this id that is owed or remembered, newest first."""

    def dead(
        self, namespace: str, *, outcomes: Sequence[Outcome], queue: str | None, limit: int
    ) -> Sequence[Mapping[str, Any]]:
        """Jobs that were given up, newest first."""

    def requeue(self, namespace: str, token: UUID) -> UUID:
        """Mint a new delivery of a failed, dead or owed one and leave its push to the leader.

        An owed one is superseded by it: a copy of it that is still in Redis is skipped. Raises
        JobguardError if there is no such delivery, its envelope is gone, or its worker runs it.
        """

    def absent(self, namespace: str, *, queue: str | None) -> Sequence[Mapping[str, Any]]:
        """Owed deliveries that a leader saw absent from Redis, whatever keeps them from going back."""

    def pause(self, namespace: str, *, queue: str | None) -> None:
        """Put nothing back, in the namespace or in one queue, until resumed."""

    def resume(self, namespace: str, *, queue: str | None, moved: bool) -> None:
        """Go on; ``moved``: and accept that this database is where it now is."""

    def overview(self, namespace: str) -> Mapping[str, Any]:
        """Leader, brake, sources, workers, open incidents and queues, for `stats` and `doctor`."""
