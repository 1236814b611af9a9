"""The seam between jobguard and a queue library: all that an adapter knows of the core.

An adapter has two halves.

In the host's processes it is a guest. It turns what the library pushes into a ``Delivery`` and hands
it to the ``Tracker`` *before* the push; it asks the tracker for a claim when the library starts a job,
skips the job if the claim is refused, and reports the end. Whatever happens on our side, the library
behaves as if we were absent.

In the reconciler it is a ``Broker``: it looks into Redis, where a page of deliveries is
(``presence``), and puts back what is lost (``restore``), atomically. It imports no user code, and
unpickles nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from jobguard.current import CurrentJob, running
from jobguard.host_safety import safe_tracker
from jobguard.model import (
    Claim,
    Delivery,
    Observation,
    OpenJoin,
    Outcome,
    Owed,
    Part,
    Recorded,
    Refusal,
    Refused,
    Restorable,
    Restored,
)

if TYPE_CHECKING:
    import redis


@dataclass(frozen=True, slots=True)
class Source:
    """One guarded broker: the library, the Redis address and db, the key prefix, in a namespace.

    Its ``id`` is the same in every process that names the same broker, so that nobody has to look
    it up. ``name`` (the setting ``source``) replaces the address where processes reach one Redis by
    different addresses.
    """

    namespace: str
    library: str
    address: str
    """``host:port/db`` or ``unix:path/db``; never a password."""
    prefix: str = ""
    """Where its keys lie, in the adapter's own words."""
    name: str | None = None
    one_body: bool = True
    """Redis keeps one body of a job id, so that a new delivery takes the place of any other of that id."""
    id: int = field(init=False)

    def __post_init__(self) -> None:
        identity = "\x00".join(
            (self.namespace, self.library, self.name or self.address, self.prefix)
        )
        digest = hashlib.sha256(identity.encode()).digest()
        object.__setattr__(self, "id", int.from_bytes(digest[:8], signed=True))

    def __str__(self) -> str:
        return f"{self.library} at {self.name or self.address}"


class Tracker(Protocol):
    """What an adapter tells the core, and asks of it. No method raises, but where its docstring says so."""

    source: Source

    def guards(self, queue: str) -> bool:
        """Whether this queue of the source is guarded."""

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Commit these deliveries before they are pushed; ``outbox``: and leave the push to the leader.

        Raises StoreUnavailable if Postgres did not take them and ``when_postgres_down="raise"``.
        """

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Take back first deliveries that were surely not pushed and never will be."""

    def defer(
        self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]
    ) -> Callable[[], None] | None:
        """Within a batch: record these with all the others at its end, and push then; None: no batch.

        ``push`` is called in order with what became of these. It must do then what a push of its own
        does, and not push what was refused; its errors reach whoever ends the batch. Call what is
        returned: it does nothing, or ends the batch, which has become long.
        """

    def batch(
        self,
        *,
        patience: float | None = None,
        first_at_once: bool = False,
        unheard: bool = False,
        apart: bool = False,
    ) -> AbstractContextManager[None]:
        """Record all that is sent inside in one statement, and push it at the end. Of this thread.

        ``patience``: what comes so many seconds after the last goes out at once, with all that waits; for
        what the library sends as it comes, from a generator that may be slow. ``first_at_once``: it has
        waited for the first of them already. ``unheard``: the library swallows an error of a push, so
        that the leader pushes what comes after it. ``apart``: it is no part of the batch that it is in.
        """

    def open_join(self, join: str, size: int, state: bytes = b"") -> Recorded:
        """Remember that a continuation waits for so many jobs, before the first of them is pushed.

        Returns whether it is in the ledger, and whether a leader is there to go by it.

        Their ends name the join by ``Part``, the continuation by ``Delivery.closes``.
        """

    def close_join(self, join: str) -> None:
        """Nothing will come of this join: the library gave it up, or what it counts has moved on."""

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """The push of these recorded deliveries failed or is in doubt: the leader shall see to it."""

    @property
    def push_deadline(self) -> float:
        """Seconds after its record in which a producer may push; later the leader may have done it."""

    def drain_spool(self) -> None:
        """Write what waits, in bounded time: this process is about to end without ceremony."""

    def broker_in_doubt(self) -> bool:
        """Whether Redis did not answer a moment ago. Asked on a client of ours, in bounded time."""

    def broker_failed(self) -> None:
        """Redis just failed the host: it is in doubt until it answers us."""

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """Whether a recorded job may be accepted although Redis is away (``when_redis_down``)."""

    def cancel(
        self,
        *,
        tokens: Sequence[UUID] = (),
        job_ids: Sequence[str] = (),
        queue: str | None = None,
    ) -> None:
        """Write the tombstones of these, before Redis forgets them; ``queue``: of all that waits in it."""

    def amend(self, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change what an owed delivery is put back as, after Redis has the change; False: it is not kept.

        ``change`` gives the new envelope for the present one. Nothing stands in for Postgres here.
        """

    def heartbeat(
        self,
        job_id: str,
        *,
        token: UUID | None = None,
        number: int | None = None,
        progress: float | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Note a running job's progress; False if nobody heard it."""

    def predecessor(self, token: UUID) -> UUID | None:
        """The worker whose claim of this delivery was taken away last; None: none that is known."""

    def lock(self, name: str, claim: Claim) -> bool:
        """Take a lock in the name of this claim; False: another live claim holds it, or nobody knows."""

    def unlock(self, name: str, claim: Claim) -> None:
        """Let go of a lock of this claim."""

    def recovers(self, tokens: Sequence[UUID], *, began: bool = True) -> frozenset[UUID] | None:
        """Which of these the leader brings back if their run was killed, or lost with its worker.

        None: Postgres, which alone knows, is away; who can wait asks again.

        Of the others, and of all if nobody has led for minutes or ``recover_killed`` is off, the library's
        own verdict stands. ``began=False``: no run of them ever began, which is never their failure.
        """

    def tombstones(self, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome] | None:
        """How these have ended, of those that the ledger knows to have ended; None while it is away."""

    @property
    def mends_library(self) -> bool:
        """Whether faults of the library that end a worker or run a job twice may be mended."""

    def open_session(
        self,
        *,
        name: str,
        queues: Sequence[str],
        lists: Callable[[], Iterable[UUID]] | None = None,
        apart: bool = False,
        serves: bool = False,
    ) -> Session:
        """Begin to beat as a worker. One session a worker process; the same again is returned.

        ``lists``: deliveries that its children may be running, asked at every beat from its thread.
        ``apart``: jobs run in this very process, so that one of them can keep a thread of ours from
        beating: have another process beat then.
        ``serves``: jobs run in children that are forked from now on. They reach Postgres through this
        process, and hold no connection of their own.
        """

    def inherit_session(
        self, worker: UUID, pid: int, *, name: str, queues: Sequence[str]
    ) -> Session:
        """Return the session of the worker that spawned this process: a forked child has it anyway."""


class Session(Protocol):
    """One boot of a guarded worker process, as its adapter sees it. No method raises."""

    @property
    def id(self) -> UUID:
        """By which name Postgres knows this worker now; another one once it was declared dead."""

    def start(
        self,
        token: UUID,
        describe: Callable[[], Delivery],
        *,
        idle: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Claim | Refused:
        """Ask for the claim to run a delivery. ``describe`` builds its record if nobody recorded it.

        A job that is charged with a worker's death runs alone in its process, so that a start may have
        to wait. It waits inside ``idle()``: there the library's own time limit must not pass.
        """

    def end(
        self,
        claim: Claim,
        outcome: Outcome,
        *,
        job_id: str,
        queue: str,
        task: str,
        error: str | None = None,
        part: Part | None = None,
    ) -> None:
        """Report the end of a claimed delivery; batched, in order. ``part``: of a join."""

    def decline(self, token: UUID, *, job_id: str, error: str) -> None:
        """This worker cannot begin it, another may: it goes back, later each time, 5 times at most.

        After that it is dead. For what the library has taken and dropped unrun, such as an unknown task.
        """

    def mark_superseded(self, claim: Claim) -> None:
        """A new delivery has taken this one's place by ``Delivery.parent``: nothing is left to report."""

    def release(self, claim: Claim) -> None:
        """The library puts this very delivery back, for anyone to start: nobody holds it, no crash.

        Committed at once, for it comes before the push.
        """

    def abandon(self, claim: Claim) -> None:
        """The run was killed: give the claim up as a dead worker's, for the leader to take away."""

    def consumes(self, queues: Sequence[str]) -> None:
        """The worker takes from these queues now: its beats say so from the next one on.

        A queue is recovered only if a guarded worker has said that it takes from it.
        """

    def take_over_beats(self, claim: Claim, gone: Callable[[], bool]) -> None:
        """In a child that runs this claim for its worker: should the worker die, beat in its stead.

        ``gone`` waits until it has died, or has turned away; False: that cannot be known.
        """

    def flush(self) -> None:
        """Commit every end reported so far, or put it into the spool."""

    def close(self, *, running: bool = False) -> None:
        """Flush and say goodbye: what is still claimed goes back at once.

        ``running``: a job still runs, in a child that outlives us; fall silent without a goodbye.
        """


class Broker(Protocol):
    """A source as the reconciler sees it. Methods may raise redis.RedisError; the caller backs off."""

    def presence(self, page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        """Where Redis has each of these deliveries. A Sighting of ABSENT says in its mark what was seen."""

    def restore(
        self, deliveries: Sequence[Restorable], *, deadline: float
    ) -> Mapping[UUID, Restored]:
        """Put these back, in this order, each atomically, unless Redis' own clock is past ``deadline``."""

    def abandon(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Take the runs of these out of the library's books: their workers are dead.

        Nothing is changed once Redis' own clock is past ``deadline``.

        They may have to wait before they go back, and the library's own recovery must not have given
        them up by then.
        """

    def bury(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Show these in the library as failed for good: their crash budget is spent.

        Nothing is changed once Redis' own clock is past ``deadline``.
        """

    def report(self, dead: Sequence[Restorable], *, deadline: float) -> None:
        """Give these, which are dead, to a worker once more, so that it tells the library's failure path.

        Only those of which somebody would hear by that. The worker is refused the claim, as ended, and does
        not call the function.
        """

    def hide(self, page: Sequence[Owed]) -> None:
        """Take back what a restore with ``running`` put back of these: they have ended meanwhile."""

    def rejoin(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Put back what the library counts of these joins, where it is missing.

        Comes before any of their members is put back. ``finish``: all their members have ended and
        nothing has come of it; have the last one told to the library again, by pushing its envelope:
        its worker is refused the claim, as ended, and counts it instead of running it.
        """

    def parts(self, ended: Sequence[Restorable]) -> Mapping[UUID, Part]:
        """What these are to joins, of those that the library shows as completed and nobody reported."""

    def consumers(self) -> Mapping[str, frozenset[str]]:
        """The library's own names of the workers that Redis knows, by queue."""


class Adapter(Protocol):
    """A queue library, as the composition root sees it. Found by the entry point ``jobguard.adapters``."""

    library: str

    def sources(
        self, target: object, *, namespace: str, name: str | None
    ) -> Guarded | DeferredTarget | None:
        """What guarding this target means; None: not a target of this library.

        Raises UnsupportedTarget with the reason and the next step.
        """

    def install(self, tracker: Tracker, target: object) -> None:
        """Hook the library, so that this target speaks to this tracker; all or nothing.

        Called for every target of a source; the same again changes nothing.
        """

    def uninstall(self, tracker: Tracker) -> None:
        """The mirror image of install, for all the targets of this tracker."""

    def broker(self, source: Source, client: redis.Redis) -> Broker:
        """The reconciler's view of a source. ``client`` is the core's own, and returns bytes."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """What one call of guard() covers."""

    source: Source
    queues: frozenset[str] | None
    """None: every queue of the source."""
    client: Callable[[], redis.Redis] | None
    """Makes a client of our own for the target's Redis, with short timeouts; None: a test double."""
    inert: str | None = None
    """Why nothing is to be guarded here, if so: a test double, an eager mode."""


@dataclass(frozen=True, slots=True)
class DeferredTarget:
    """A target of this library of which nothing can be known before its application is configured.

    To look would configure it: too early, for the user's next line may change what it says.
    """

    when: Callable[[Callable[[], None]], None]
    """Calls this back once, before the first push, the first job, or whatever else needs us first.
    By then ``sources`` knows its answer. The callback raises nothing."""
    resolve: Callable[[], None]
    """Somebody asks the guard itself: configure the application now, so that ``sources`` knows."""


def running_job(
    tracker: Tracker, claim: Claim, job_id: str, *, attempt: int
) -> AbstractContextManager[None]:
    """Let ``jobguard.current()`` answer with this job inside; nothing is sent before it says something."""

    def report(done: float | None, attrs: dict[str, Any]) -> bool:
        return tracker.heartbeat(
            job_id,
            token=claim.token,
            number=claim.number or None,
            progress=done,
            attrs=attrs or None,
        )

    return running(
        CurrentJob(
            job_id,
            attempt,
            report,
            recovered=claim.number > 1,
            crashes=claim.crashes,
            _claim=_Claimed(tracker, claim),
        )
    )


@dataclass(frozen=True, slots=True)
class _Claimed:
    """What a running job asks about its claim; see jobguard.current.Claimed."""

    tracker: Tracker
    claim: Claim

    def predecessor(self) -> UUID | None:
        """Ask the ledger."""
        return self.tracker.predecessor(self.claim.token)

    def lock(self, name: str) -> bool:
        """Ask the ledger."""
        return self.tracker.lock(name, self.claim)

    def unlock(self, name: str) -> None:
        """Tell the ledger."""
        self.tracker.unlock(name, self.claim)


def refuse_ended_member(tracker: Tracker, token: UUID) -> Refused | None:
    """Refuse a member of a join that a leader tells the library again: it is to be counted, not run.

    None: it has not ended. Where Postgres cannot be asked, the leader's word is enough.
    """
    ended = tracker.tombstones([token])
    if ended is None:
        return Refused(token, Refusal.ENDED, Outcome.COMPLETED)
    return Refused(token, Refusal.ENDED, ended[token]) if token in ended else None


_trackers: dict[int, Tracker] = {}
_ever: list[int] = []
"""The first source that was guarded in this process, if any was."""
_resolve: list[Callable[[object], Tracker | None]] = []


def register(tracker: Tracker) -> None:
    """Make a tracker known to the adapters of this process; what it raises, they will not see."""
    _trackers[tracker.source.id] = safe_tracker(tracker)
    _ever[:] = _ever or [tracker.source.id]


def ever_guarded() -> bool:
    """Whether anything was guarded in this process so far."""
    return bool(_ever)


def registered_tracker(tracker: Tracker) -> Tracker:
    """Return a registered tracker as adapters are given it."""
    return _trackers[tracker.source.id]


def unregister(tracker: Tracker) -> None:
    """Forget a tracker."""
    _trackers.pop(tracker.source.id, None)


def trackers() -> Iterable[Tracker]:
    """The trackers of this process."""
    return tuple(_trackers.values())


def on_unguarded_worker(resolve: Callable[[object], Tracker | None]) -> None:
    """Set how a worker whose process never called guard() gets its tracker: from the environment."""
    _resolve[:] = [resolve]


def tracker_for_worker(target: object) -> Tracker | None:
    """The tracker of a worker's connection, made from the environment if there is none yet."""
    made = _resolve[0](target) if _resolve else None
    return _trackers.get(made.source.id) if made is not None else None
