"""The interface between jobguard and a queue library: everything that an adapter knows of the core.

An adapter has two halves.

The first half runs in the host's processes. It makes a ``Delivery`` of each message that the library
pushes and gives it to the ``Tracker`` *before* the push. When the library starts a job, it asks the tracker
for a claim, skips the job if the claim is refused, and reports the end. If jobguard fails, the library
behaves as if jobguard were absent.

The second half runs in the reconciler and is a ``Broker``. It finds out where Redis has a page of
deliveries (``presence``) and puts lost deliveries back atomically (``restore``). It imports no user code
and unpickles nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import UUID

from jobguard import hooks
from jobguard.current import CurrentJob, running
from jobguard.errors import ConflictingGuard, WorkersDied
from jobguard.model import (
    Backlog,
    Beside,
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
    Request,
    Restorable,
    Restored,
)

if TYPE_CHECKING:
    import redis


@dataclass(frozen=True, slots=True)
class Source:
    """One guarded broker: the library, the Redis address and db, the key prefix, in a namespace.

    The ``id`` is the same in every process that names the same broker, so that no process has to look it
    up. ``name`` (the setting ``source``) replaces the address where processes reach one Redis by different
    addresses.
    """

    namespace: str
    library: str
    address: str
    """``host:port/db`` or ``unix:path/db``; never a password."""
    prefix: str = ""
    """The prefix of the source's keys. The adapter defines its form."""
    name: str | None = None
    one_body: bool = True
    """True if Redis keeps one body for each job id: a new delivery replaces any other of the same id."""
    serializer: str = field(default="", compare=False)
    """How messages are serialized, as far as the adapter knows; see model.Request."""
    id: int = field(init=False)

    def __post_init__(self) -> None:
        identity = "\x00".join(
            (self.namespace, self.library, self.name or self.address, self.prefix)
        )
        digest = hashlib.sha256(identity.encode()).digest()
        object.__setattr__(self, "id", int.from_bytes(digest[:8], signed=True))

    def __str__(self) -> str:
        return f"{self.library} at {self.name or self.address}"


def second_guard(target: str, there: Source, now: Source) -> ConflictingGuard:
    """Return the error for a target that is guarded already, as another source."""
    names = [
        f"namespace {one.namespace!r}" + (f", source {one.name!r}" if one.name else "")
        for one in (there, now)
    ]
    return ConflictingGuard(
        f"{target} of {there.library} at {there.address} is already guarded with {names[0]}, and a second "
        f"guard with {names[1]} would guard nothing: call guard() once for each target"
    )


class Tracker(Protocol):
    """The core as an adapter sees it. A method raises only the errors that its docstring names."""

    source: Source
    client: Callable[[], redis.Redis] | None
    """Makes a client of jobguard for the source's Redis; None: there is none."""

    def guards(self, queue: str) -> bool:
        """Return True if this queue of the source is guarded."""

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Commit these deliveries before they are pushed; ``outbox``: the leader will push them.

        Raises StoreUnavailable if Postgres did not take them and ``when_postgres_down="raise"``.
        """

    def record_beside(self, deliveries: Sequence[Delivery]) -> Beside | None:
        """Send the record of deliveries that are pushed meanwhile; None: record them first.

        This is possible for a single delivery that nothing can refuse, if its sender never receives an
        error because of Postgres. A worker that takes the job before its record records it.
        """

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Delete the records of first deliveries that were certainly not pushed and will not be pushed."""

    def defer(
        self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]
    ) -> Callable[[], None] | None:
        """Add these to the current batch, to be recorded and pushed at its end; None: there is no batch.

        ``push`` is called at the end of the batch, in order, with the result of the record. It must then
        do the same as a push outside of a batch, and must not push refused deliveries. Its errors reach
        the code that ends the batch. The caller must call the returned function: it ends the batch if
        the batch has become long, and otherwise does nothing.
        """

    def batch(
        self,
        *,
        patience: float | None = None,
        first_at_once: bool = False,
        unheard: bool = False,
        apart: bool = False,
    ) -> AbstractContextManager[None]:
        """Record all messages that this thread sends inside in one statement, and push them at the end.

        ``patience``: a message that comes this many seconds after the last one goes out at once, with all
        waiting messages; for a library that sends messages from a generator that may be slow.
        ``first_at_once``: the batch has already waited for the first message. ``unheard``: the library
        ignores an error of a push, so that the leader pushes the messages that come after the error.
        ``apart``: this batch is not part of the batch around it.
        """

    def open_join(self, join: str, size: int, state: bytes = b"") -> Recorded:
        """Record a join of ``size`` jobs, before the first of these jobs is pushed.

        The result says whether the join is in the ledger, and whether a leader is live that can use it.
        The ends of the jobs name the join in ``Part``; the continuation names it in ``Delivery.closes``.
        """

    def close_join(self, join: str) -> None:
        """Close a join that needs no continuation: the library gave it up, or has already continued it."""

    def forget_spooled(self, tokens: Sequence[UUID]) -> bool:
        """Remove the records of these from the spool; return True if none of them is in any store."""

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Leave these recorded deliveries to the leader: their push failed, or its result is unknown."""

    @property
    def push_deadline(self) -> float:
        """Seconds after the record in which the producer may push. Later, the leader may have pushed."""

    def drain_spool(self) -> None:
        """Write the waiting reports in bounded time: this process is about to end without exit handlers."""

    def broker_in_doubt(self) -> bool:
        """Return True if Redis did not answer a moment ago. Asks on jobguard's client, in bounded time."""

    def broker_error(self) -> Exception | None:
        """Return the error of a Redis that does not answer, or None. Asks as ``broker_in_doubt`` does."""

    def broker_answered(self) -> None:
        """Note that Redis has just taken a push of the host, so that it need not be asked."""

    def broker_failed(self) -> None:
        """Report that Redis failed for the host: Redis is in doubt until it answers jobguard."""

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """Return True if a recorded job may be accepted although Redis is away (``when_redis_down``)."""

    def cancel(
        self,
        *,
        tokens: Sequence[UUID] = (),
        job_ids: Sequence[str] = (),
        queue: str | None = None,
    ) -> None:
        """Write tombstones for these before Redis deletes them; ``queue``: for all jobs that wait in it."""

    def amend(self, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change the envelope of an owed delivery, after Redis has the change; False: it was not changed.

        ``change`` returns the new envelope for the present one. If Postgres is away, the change is not
        spooled.
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
        """Record the progress of a running job; return False if it was not recorded."""

    def predecessor(self, token: UUID) -> UUID | None:
        """Return the worker whose claim of this delivery was voided last; None: no such worker is known."""

    def lock(self, name: str, claim: Claim) -> bool:
        """Take a lock for this claim; False: another live claim holds it, or Postgres cannot be asked."""

    def unlock(self, name: str, claim: Claim) -> None:
        """Release a lock of this claim."""

    def begin_effect(
        self, name: str, job_id: str | None, claim: Claim, *, again: bool
    ) -> tuple[str, str | None]:
        """Begin an effect of a run; see jobguard.once. Raises StoreUnavailable."""

    def finish_effect(self, name: str, claim: Claim, result: str | None) -> None:
        """Store that an effect is done. Raises StoreUnavailable."""

    def forget_effect(self, name: str, claim: Claim) -> None:
        """Delete an effect that is not done. Raises StoreUnavailable."""

    def effect_values(self, name: str, job_id: str | None, claim: Claim) -> dict[str, str]:
        """Return the parameters of an effect for the application's connection."""

    def seal_result(self, result: str | None) -> str | None:
        """Return the result of an effect as it is stored."""

    def unseal_result(self, stored: str | None) -> str | None:
        """Return the result of an effect as it was given."""

    def installation_id(self) -> str:
        """Return the identity of the ledger. Raises StoreUnavailable."""

    def recovers(self, tokens: Sequence[UUID], *, began: bool = True) -> frozenset[UUID] | None:
        """Return those that the leader restores if their run was killed or was lost with its worker.

        None: Postgres is away, and only Postgres knows. A caller that can wait asks again.

        For the others, the library's own decision is final. It is final for all if no reconciler has led
        for minutes or if ``recover_killed`` is off. ``began=False``: no run of these began, so that they
        did not fail.
        """

    def tombstones(self, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome] | None:
        """Return the outcomes of those that have ended according to the ledger; None: Postgres is away."""

    @property
    def mends_library(self) -> bool:
        """Return True if faults of the library that end a worker or run a job twice may be repaired."""

    def open_session(
        self,
        *,
        name: str,
        queues: Sequence[str],
        lists: Callable[[], Iterable[UUID]] | None = None,
        apart: bool = False,
        serves: bool = False,
    ) -> Session:
        """Start to beat as a worker. A worker process has one session; a second call returns the same one.

        ``lists``: returns the deliveries that the worker's children may be running. The beat thread calls
        it at every beat.
        ``apart``: jobs run in this same process, so that a job can prevent a thread of jobguard from
        beating. In that case, a beat process beats.
        ``serves``: jobs run in children that are forked from now on. The children reach Postgres through
        this process and have no connection of their own.
        """

    def inherit_session(
        self, worker: UUID, pid: int, *, name: str, queues: Sequence[str]
    ) -> Session:
        """Return the session of the worker that spawned this process. A forked child has it already."""


class Session(Protocol):
    """One boot of a guarded worker process, as its adapter sees it. No method raises."""

    @property
    def id(self) -> UUID:
        """The id of this worker in Postgres. It changes after the worker was declared dead."""

    @property
    def queues(self) -> Sequence[str]:
        """The queues that it reports, of all workers of this process."""

    def start(
        self,
        token: UUID,
        describe: Callable[[], Delivery],
        *,
        idle: Callable[[], AbstractContextManager[None]] = nullcontext,
        patience: float | None = None,
    ) -> Claim | Refused:
        """Ask for the claim to run a delivery. ``describe`` builds the record of an unrecorded delivery.

        A job that is charged with a worker's death runs alone in its process, so that a start may have
        to wait. It waits inside ``idle()``: there the library's own time limit must not run. Where that
        limit cannot be stopped, ``patience`` is the longest single wait, in seconds.
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
        """Report the end of a claimed delivery; batched, in order. ``part``: its part in a join."""

    def decline(
        self,
        token: UUID,
        *,
        job_id: str,
        error: str,
        describe: Callable[[], Delivery] | None = None,
    ) -> bool:
        """Give back a delivery that this worker cannot begin and another worker may begin.

        It goes back at most 5 times, with a longer delay each time. After that it is dead. For messages
        that the library has taken and dropped without a run, such as an unknown task. ``describe``: see
        start. Return False, and do nothing, if no leader would put it back: see Tracker.recovers.
        """

    def give_back(self, claim: Claim, *, job_id: str, error: str) -> None:
        """Give back a claimed delivery whose run could not begin, for a reason that is not the job's.

        This counts as no crash. It goes back any number of times, each time after a longer delay, up to 5
        minutes.
        """

    def mark_superseded(self, claim: Claim) -> None:
        """Drop this claim without a report: a new delivery replaced its delivery by ``Delivery.parent``."""

    def release(self, claim: Claim, *, interrupted: bool = False) -> None:
        """Release the claim: the library pushes this same delivery again, for any worker to start.

        This counts as no crash. It is committed at once, because it comes before the push.
        ``interrupted``: its run began, and neither the library nor the user decided to repeat it. A run
        that must not be repeated keeps its claim: the next start is refused, and the delivery is dead.
        """

    def abandon(self, claim: Claim) -> None:
        """Give up the claim of a killed run, as a dead worker's claim. The leader voids it."""

    def consumes(self, queues: Sequence[str]) -> None:
        """Set the queues that the worker takes jobs from. Its beats report them from the next beat on.

        A queue is recovered only if a guarded worker has reported that it takes jobs from the queue.
        """

    def take_over_beats(self, claim: Claim, gone: Callable[[], bool]) -> None:
        """In a child that runs this claim for its worker, beat for the worker if the worker dies.

        ``gone`` waits until the worker has died or has left the child; it returns False if that cannot be
        known.
        """

    def flush(self) -> None:
        """Commit every end that was reported so far, or put it into the spool."""

    def close(self, *, running: bool = False) -> None:
        """Flush, and report that the worker leaves: deliveries that are still claimed go back at once.

        Workers in threads of one process may share a session: each closes it, and the last one leaves.
        ``running``: a job still runs in a child that outlives this process. Stop the beats and report
        nothing.
        """


class Broker(Protocol):
    """A source as the reconciler sees it. Methods may raise redis.RedisError; the caller tries later."""

    def pause_with(self, work: Callable[[], None]) -> None:
        """Call this between two pieces of a long read, each some milliseconds long.

        The caller watches the pulse and the beats meanwhile. ``work`` may raise, and ends the read so.
        """

    def presence(self, page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        """Return where Redis has each delivery. The mark of an ABSENT one describes the state of Redis."""

    def restore(
        self, deliveries: Sequence[Restorable], *, deadline: float
    ) -> Mapping[UUID, Restored]:
        """Restore these in order, each one atomically, unless the clock of Redis is past ``deadline``."""

    def abandon(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Delete the library's records of the runs of these: their workers are dead.

        They may have to wait before they go back. The library's own recovery must not give them up
        meanwhile. Nothing is changed once the clock of Redis is past ``deadline``.
        """

    def bury(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Mark these as finally failed in the library: their crash budget is spent.

        Nothing is changed once the clock of Redis is past ``deadline``.
        """

    def report(
        self, dead: Sequence[Restorable], *, deadline: float, all_of_them: bool = False
    ) -> None:
        """Push these dead deliveries once more, so that a worker reports the failure through the library.

        Only those are pushed for which the library would run a handler, unless ``all_of_them``: a worker
        calls a function of the application for each. The worker's claim is refused as ended, and the worker
        does not call the function of the job. It calls ``report_dead``.
        """

    def hide(self, page: Sequence[Owed]) -> None:
        """Undo a restore with ``running`` of these deliveries: they have ended meanwhile."""

    def discard(self, page: Sequence[Owed], *, erase: bool = False) -> None:
        """Delete these from the places where they wait: a person cancelled them, and they have tombstones.

        Those that a worker has taken stay, and those in a very long list: workers skip them. ``erase``:
        delete everything that Redis has of them, with their results as far as they are in this Redis.
        """

    def rejoin(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Restore the library's own counters of these joins where they are missing.

        Called before any member of the joins is restored. ``finish``: all members have ended and no
        continuation was sent. The last member is pushed again: the worker's claim is refused as ended, and
        the worker counts the member instead of running it.
        """

    def parts(self, ended: Sequence[Restorable]) -> Mapping[UUID, Part]:
        """Return the parts in joins of those that the library shows as completed and no worker reported."""

    def consumers(self) -> Mapping[str, frozenset[str]]:
        """Return the library's own names of the workers that Redis knows, by queue."""

    def backlog(
        self, queues: Collection[str], *, after: str = "", limit: int, mark: bool
    ) -> Backlog:
        """Return a page of the deliveries that wait in these queues, at once or for their time.

        A job whose push was not guarded has no token. ``mark`` writes a new token into its data in
        Redis, atomically and only if the job still waits there without one; otherwise such jobs are
        only counted. ``after``: where the page before said that the next one begins. Jobs that move
        during the walk may be returned twice. ``limit``: about the number of jobs on a page.
        """

    def render(self, request: Request, token: UUID) -> Delivery:
        """Return the delivery of a job that SQL or a schedule asked for, as the library would send it.

        Asks neither Redis nor the application. Raises CannotRender with the reason and the next step.
        """


class Adapter(Protocol):
    """A queue library as guard() sees it. Found by the entry point ``jobguard.adapters``."""

    library: str

    def sources(
        self, target: object, *, namespace: str, name: str | None
    ) -> Guarded | DeferredTarget | None:
        """Return the source and queues of this target; None: it is not a target of this library.

        Raises UnsupportedTarget with the reason and the next step.
        """

    def install(self, tracker: Tracker, target: object) -> None:
        """Hook the library, so that this target uses this tracker. All hooks are installed or none.

        Called for every target of a source. A second call for the same target changes nothing.
        """

    def uninstall(self, tracker: Tracker, deferred: object = None) -> bool:
        """Undo install for all targets of this tracker that ``sources`` could read at once.

        ``deferred``: undo it for this target alone, for which ``sources`` returned a DeferredTarget. Return
        True if no target uses this tracker now.
        """

    def task_of(self, task: object) -> tuple[str, str | None]:
        """Return the name of a task object, and the queue that it names; None: it names no queue.

        Raises TypeError if the object is no task of this library.
        """

    def send(
        self,
        target: object,
        task: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        delay: float | None,
        queue: str | None,
    ) -> tuple[str, Any]:
        """Send a task by the library's own call; return the job's id and what the library returned.

        Raises UnsupportedTarget for a task that the library does not know.
        """

    def broker(self, source: Source, client: redis.Redis) -> Broker:
        """Return the broker of a source for the reconciler; ``client`` is jobguard's own, returns bytes."""


@dataclass(frozen=True, slots=True)
class Guarded:
    """The source and the queues that one call of guard() covers."""

    source: Source
    queues: frozenset[str] | None
    """None: every queue of the source."""
    client: Callable[[], redis.Redis] | None
    """Makes jobguard's own client for the target's Redis, with short timeouts; None: a test double."""
    inert: str | None = None
    """The reason not to guard anything here (a test double, an eager mode); None: guard it."""


class Advice(NamedTuple):
    """A setting of the application that loses or doubles jobs, or makes its producer wait."""

    detail: str
    consequence: str
    fix: str
    """The line to change."""


@dataclass(frozen=True, slots=True)
class DeferredTarget:
    """A target of this library whose application is not configured yet, or is in eager mode.

    Reading it would configure the application. That would be too early, because the user's next line may
    change the configuration. A later line may also end the eager mode.
    """

    when: Callable[[Callable[[], None]], None]
    """Takes a callback and calls it once, before the first push, the first job or another first use.
    By then ``sources`` can answer. The callback raises nothing."""
    resolve: Callable[[], str | None]
    """Configures the application now, because the user calls the guard. Then ``sources`` can answer.
    Returns the reason why nothing is guarded yet, if the application is in eager mode."""
    inert: str | None = None
    """The same reason, if it is known at once."""


@contextmanager
def running_job(
    tracker: Tracker, claim: Claim, job_id: str, *, attempt: int, limit: float | None = None
) -> Iterator[None]:
    """Make ``jobguard.current()`` return this job inside, and call the functions of its events.

    Nothing is sent before the job reports. ``limit``: the seconds after which the library stops the run.
    An exception that leaves the block is the error of the job.
    """
    source = tracker.source.id

    def report(done: float | None, attrs: dict[str, Any]) -> bool:
        recorded = tracker.heartbeat(
            job_id,
            token=claim.token,
            number=claim.number or None,
            progress=done,
            attrs=attrs or None,
        )
        hooks.reported(source, job, done, attrs)
        return recorded

    claimed = _Claimed(tracker, claim)
    job = CurrentJob(
        job_id,
        attempt,
        report,
        recovered=claim.number > 1,
        crashes=claim.crashes,
        deadline=time.time() + limit if limit and limit > 0 else None,
        _claim=claimed,
        _effects=claimed,
    )
    with running(job):
        if job.recovered or job.crashes:
            hooks.fire(source, "recovered", job)
        hooks.fire(source, "start", job)
        try:
            yield
        except GeneratorExit:  # the run was dropped without an end
            raise
        except BaseException as error:
            hooks.fire(source, "error", job, error=error)
            raise
        hooks.fire(source, "finish", job)


def report_dead(tracker: Tracker, job_id: str, *, attempt: int) -> None:
    """Call the functions of the event "dead", in the worker that reports the dead job to the library."""
    hooks.fire(tracker.source.id, "dead", CurrentJob(job_id, attempt), error=WorkersDied())


def hears_dead(tracker: Tracker) -> bool:
    """Return True if this process calls a function for each dead job of this source."""
    return hooks.heard(tracker.source.id, "dead")


@dataclass(frozen=True, slots=True)
class _Claimed:
    """The claim of a running job; see Claimed and EffectLedger in jobguard.current."""

    tracker: Tracker
    claim: Claim

    def predecessor(self) -> UUID | None:
        """Return the worker whose claim was voided last, from the ledger."""
        return self.tracker.predecessor(self.claim.token)

    def lock(self, name: str) -> bool:
        """Take a lock in the ledger."""
        return self.tracker.lock(name, self.claim)

    def unlock(self, name: str) -> None:
        """Release a lock in the ledger."""
        self.tracker.unlock(name, self.claim)

    def begin_effect(self, name: str, job_id: str | None, *, again: bool) -> tuple[str, str | None]:
        """Begin an effect in the ledger."""
        return self.tracker.begin_effect(name, job_id, self.claim, again=again)

    def finish_effect(self, name: str, result: str | None) -> None:
        """Store in the ledger that the effect is done."""
        self.tracker.finish_effect(name, self.claim, result)

    def forget_effect(self, name: str) -> None:
        """Delete the effect in the ledger."""
        self.tracker.forget_effect(name, self.claim)

    def seal_result(self, result: str | None) -> str | None:
        """Return the result of an effect as it is stored."""
        return self.tracker.seal_result(result)

    def unseal_result(self, stored: str | None) -> str | None:
        """Return the result of an effect as it was given."""
        return self.tracker.unseal_result(stored)

    def installation_id(self) -> str:
        """Return the identity of the ledger."""
        return self.tracker.installation_id()

    def effect_values(self, name: str, job_id: str | None) -> dict[str, str]:
        """Return the parameters of the effect for the application's connection."""
        return self.tracker.effect_values(name, job_id, self.claim)


def refuse_ended_member(tracker: Tracker, token: UUID) -> Refused | None:
    """Refuse a member of a join that the leader pushed again, so that the library counts it unrun.

    None: it has not ended. If Postgres cannot be asked, the mark of the leader is enough: the member counts
    as completed.
    """
    ended = tracker.tombstones([token])
    if ended is None:
        return Refused(token, Refusal.ENDED, Outcome.COMPLETED)
    return Refused(token, Refusal.ENDED, ended[token]) if token in ended else None
