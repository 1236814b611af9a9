"""One boot of a guarded worker process: it beats, it claims, and it reports ends in batches.

A delivery is in flight from before its claim is requested until its end is committed. So a beat
never leaves out a delivery that this worker may run, nor one that ran and is not reported yet.

There are two threads: one beats (see beats.py), one commits ends. If jobs run in threads beside
them, a C call can block both, so a beat process beats when they cannot (see beat_process.py). A
work-horse that was forked from the worker has neither thread, and writes each report at once. But
it watches its worker: if the worker dies, the work-horse runs on and takes over the beats, so that
its job is not started a second time beside it.
"""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import UUID

from jobguard import failpoint, os_threads
from jobguard.errors import (
    BadRow,
    BreakerOpen,
    JobguardError,
    StoreUnavailable,
    is_host_interrupt,
)
from jobguard.fork import OwnerProcess
from jobguard.host.alone import Alone, AloneAmongChildren, AloneInChild
from jobguard.host.beats import BeatSender
from jobguard.host.in_flight import InFlight
from jobguard.host.spool import Released
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import (
    Claim,
    Delivery,
    End,
    Ended,
    Outcome,
    Part,
    RecoverRule,
    Refusal,
    Refused,
    Unknown,
    WorkerDeclaredDead,
    new_token,
)
from jobguard.redact import redact
from jobguard.store.protocols import ClaimRequest, HostStore

if TYPE_CHECKING:
    from jobguard.host.tracker_api import TrackerApi

_FRESH = 1.0
"""Seconds for which a beat leaves out waiting ends, because their batch is about to be committed."""
_STEP = 0.025
"""Seconds between two attempts of a start to get its claim."""
_MOST_DECLINES = 5
"""How often a job that no worker can begin goes back, before it is dead."""
_ALWAYS = 32_767
"""The same for a job that a worker cannot begin for a reason that is not the job's."""
_DECLINE_WAIT = 5.0
"""Seconds before it goes back the first time; the time doubles each time after."""


def bare_end(end: End) -> End:
    """Return the end without all fields that could be refused: the end itself must be recorded."""
    return replace(end, job_id="", queue="", task="", error=None)


class WorkerSession:
    """The session of one worker process; see jobguard.adapter.Session."""

    def __init__(
        self,
        tracker: TrackerApi,
        beat_store: HostStore,
        *,
        name: str,
        queues: Sequence[str],
        inherited: tuple[UUID, int] | None = None,
        lists: Callable[[], Iterable[UUID]] | None = None,
        apart: bool = False,
        serves: bool = False,
    ) -> None:
        self.closed = False
        self._counting = os_threads.lock()
        self._users = 1
        """Workers of this process that use it: they run in threads."""
        self._tracker = tracker
        self._settings = tracker.settings
        self._in_flight = InFlight(inherited[1] if inherited else os.getpid())
        self._beats = BeatSender(
            tracker,
            beat_store,
            self._in_flight,
            name=name,
            queues=queues,
            inherited=inherited,
            lists=lists,
            unflushed=self._unflushed,
        )
        if apart:
            self._beats.start_beat_process()
        self._serves = serves
        self._alone = self._new_alone()
        self._lock = os_threads.lock()
        self._owner = OwnerProcess()
        self._pending: deque[End] = deque()
        self._flushing = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._flusher: threading.Thread | None = None

    @property
    def id(self) -> UUID:
        """Return the id of this worker; see Session."""
        return self._beats.id

    @property
    def is_mine(self) -> bool:
        """Return True if this process opened the session; a forked child only inherited it."""
        return self._beats.is_mine

    def _mine(self) -> None:
        self._owner.take_over(self._renew)

    def _renew(self) -> None:
        """Reset the state in a forked child: create new locks, and drop the parent's reports."""
        self._in_flight.after_fork()
        self._serves = False
        self._alone = self._new_alone()
        self._lock = os_threads.lock()
        self._flushing = threading.Lock()
        self._pending = deque()

    def _new_alone(self) -> Alone:
        parent = self._tracker.parent
        if parent is not None:
            return AloneInChild(self._in_flight.children, parent)
        return AloneAmongChildren(self._in_flight.children) if self._serves else Alone()

    def step_of_child(self, step: str, token: UUID, **options: bool) -> bool:
        """Make one step of Alone for a child of this worker."""
        done: bool = getattr(self._alone, step)(token, **options)
        if done:
            self.flush()  # to a leader, a claim without an end looks like a job beside this one
        return done

    def open(self) -> None:
        """Beat once, so that claims have a known worker, and continue to beat."""
        self._beats.introduce()
        log_event(
            "worker_started", worker=self.id, name=self._beats.name, queues=self._beats.queues
        )
        self._beats.start(self._after_beat)
        self._flusher = threading.Thread(target=self._flush_loop, name="jobguard-ends", daemon=True)
        self._flusher.start()

    # -- starts ------------------------------------------------------------------------------------

    def start(
        self,
        token: UUID,
        describe: Callable[[], Delivery],
        *,
        idle: Callable[[], AbstractContextManager[None]] = nullcontext,
        patience: float | None = None,
    ) -> Claim | Refused:
        """Ask for the claim to run a delivery; see Session."""
        self._mine()
        self._in_flight.add(token)  # before the claim is requested
        answer: Claim | Refused | None = None
        try:
            if not self._alone.enters(token):
                with idle():
                    self._alone.enter(token, patience)
            answer = self._started(token, describe)
            if isinstance(answer, Claim) and answer.crashes:
                answer = self._start_alone(answer, describe, idle, patience)
            self._in_flight.report()  # it may run although no claim was requested
        except BaseException:
            self._in_flight.remove((token,))
            raise
        finally:
            if not isinstance(answer, Claim):
                self._alone.leave(token)
        return answer

    def report_starts(self) -> None:
        """Report all starts to the beat process, because their claims are about to be requested."""
        self._in_flight.report()

    def _start_alone(
        self,
        claim: Claim,
        describe: Callable[[], Delivery],
        idle: Callable[[], AbstractContextManager[None]],
        patience: float | None,
    ) -> Claim | Refused:
        """Start a job that is charged with a worker's death when no other job runs here.

        Ends of other jobs are committed first: to a leader, a claim without an end looks like a job
        beside it.
        """
        if not self._alone.take(claim.token):
            failure = self._try_release(claim)
            if failure is not None:  # it may have the release already, or gets it later
                return self._start_unclaimed(claim.token, new_token(), describe, failure)
            self._beats.beat_now()  # it has no claim now, and must be on the beat's list
            log_event("start_waits", token=claim.token)
            with idle():
                self._alone.wait(claim.token, patience)
            self.flush()
            return self._started(claim.token, describe)
        self.flush()
        return claim

    def _started(self, token: UUID, describe: Callable[[], Delivery]) -> Claim | Refused:
        nonce = new_token()
        rule = self._rule(describe)
        answer: Claim | Refused | WorkerDeclaredDead = Claim(token, 0)
        try:
            with contain_errors("claim", let_pass=StoreUnavailable):
                answer = self._claim_patiently(token, nonce, describe, rule)
        except StoreUnavailable as error:
            if rule is None or self._settings.mode == "observe":
                return self._start_unclaimed(token, nonce, describe, error)
        unclaimed = isinstance(answer, WorkerDeclaredDead) or answer == Claim(token, 0)
        if rule is not None and unclaimed and self._settings.mode == "guard":
            # Fail closed: only the ledger knows whether an earlier run began.
            self._in_flight.skip(token)
            log_event("start_not_allowed", recover=rule)
            return Refused(token, Refusal.CLAIMED)
        if isinstance(answer, Claim):
            return answer
        if isinstance(answer, WorkerDeclaredDead):
            # A child cannot know its worker's new id; the worker lists the child's delivery.
            log_event("start_unclaimed", error="the worker of this child was declared dead")
            return Claim(token, 0)
        if self._settings.mode == "observe":
            log_event("start_unfenced", reason=answer.reason.value)
            return Claim(token, 0)
        self._in_flight.skip(token)  # the adapter logs the skip
        if self.is_mine and not self._beats.leader_live:  # a child does not hear the beats
            log_event("nobody_leads")
        return answer

    def _start_unclaimed(
        self, token: UUID, nonce: UUID, describe: Callable[[], Delivery], error: Exception
    ) -> Claim | Refused:
        """Fail open: the job runs, and is claimed as soon as Postgres answers again.

        If its end is in the stream, another worker ran it while Postgres was away, and died before
        the library's acknowledgement; or somebody cancelled it.
        """
        with contain_errors("start"):
            ended = self._tracker.notes_of(describe()).outcome
            if ended is not None and self._settings.mode == "guard":
                self._in_flight.skip(token)
                log_event("start_skipped", reason=Refusal.ENDED.value, outcome=ended.value)
                return Refused(token, Refusal.ENDED, ended)
        with contain_errors("start"):
            self._tracker.start_unclaimed(self._request(token, nonce, self._beats.id))
        log_event("start_unclaimed", error=str(error))
        self._in_flight.without_claim(token, nonce)
        self._beats.beat_now()
        return Claim(token, 0)

    def _rule(self, describe: Callable[[], Delivery]) -> RecoverRule | None:
        if self._settings.recover:
            with contain_errors("describe"):
                return self._settings.recover_rule(describe().task)
        return None

    def _request(
        self, token: UUID, nonce: UUID, worker: UUID, rule: RecoverRule | None = None
    ) -> ClaimRequest:
        return ClaimRequest(
            token=token,
            nonce=nonce,
            worker=worker,
            pid=os.getpid(),
            namespace=self._tracker.source.namespace,
            worker_timeout=self._settings.worker_timeout,
            crash_budget=self._settings.crash_budget,
            recover=rule,
        )

    def _claim_patiently(
        self,
        token: UUID,
        nonce: UUID,
        describe: Callable[[], Delivery],
        rule: RecoverRule | None,
    ) -> Claim | Refused | WorkerDeclaredDead:
        """Claim, and claim again if Postgres was only slow: without claims, copies of one job could run.

        Waits as long as one record may take, counted from the time at which the circuit opened. For
        a worker that Postgres does not know yet, the time counts from when the circuit closed or
        when the worker took its id, whichever is later. So an outage costs one such wait.
        """
        until: float | None = None
        while True:
            try:
                return self._claim(token, nonce, describe, rule)
            except StoreUnavailable:
                circuit = self._tracker.circuit
                if until is None:
                    away = circuit.open_for()
                    if not self._beats.known and circuit.closed:
                        away = min(time.monotonic() - self._beats.named_at, circuit.closed_for())
                    until = time.monotonic() + self._settings.record_timeout - away
                while (
                    not (circuit.check() and self._beats.introduced()) and time.monotonic() < until
                ):
                    time.sleep(_STEP)
                if time.monotonic() >= until:
                    raise

    def _claim(
        self,
        token: UUID,
        nonce: UUID,
        describe: Callable[[], Delivery] | None,
        rule: RecoverRule | None = None,
    ) -> Claim | Refused | WorkerDeclaredDead:
        worker = self._beats.introduced()
        if worker is None:
            self._tracker.circuit.check()  # the outage in which the worker started may just be over
            raise StoreUnavailable("Postgres does not know this worker yet")
        if describe is not None and self._tracker.reports_may_wait:
            if not self._tracker.circuit.check():
                raise BreakerOpen  # The caller asks for the notes of a start without a claim.
            ended = self._tracker.notes_of(describe()).outcome
            if ended is not None:
                return Refused(token, Refusal.ENDED, ended)
        request = self._request(token, nonce, worker, rule)
        answer = self._tracker.claim(request)
        if isinstance(answer, Unknown):
            if describe is None:
                raise BadRow("this delivery has no record")
            delivery = describe()
            notes = self._tracker.notes_of(delivery)
            if notes.outcome is not None:
                return Refused(token, Refusal.ENDED, notes.outcome)
            # Its producer is unguarded, or its record waits in a spool. If it replaces a delivery
            # that ended otherwise (it was cancelled), it gets a tombstone.
            self._tracker.record_late(replace(delivery, parent=delivery.parent or notes.parent))
            answer = self._tracker.claim(request)
        if isinstance(answer, Unknown):
            raise StoreUnavailable(
                "the delivery is neither owed nor ended, although it was just recorded"
            )
        if isinstance(answer, WorkerDeclaredDead) and self.is_mine:
            self._beats.register_again(worker)
            raise StoreUnavailable("this worker was declared dead")
        return answer

    def _after_beat(self) -> None:
        # A claim takes locks that greenlets wait for, so it must not be made in a thread of the
        # system.
        if not os_threads.is_patched():
            self._late_claims()

    def _late_claims(self) -> None:
        for token, nonce in self._in_flight.unclaimed():
            try:
                answer = self._claim(token, nonce, None)
            except StoreUnavailable:
                return
            except JobguardError:
                # Its record still waits in a producer's spool: the list in the beat protects the
                # run.
                continue
            self._in_flight.claim_resolved(token)
            if isinstance(answer, Refused):
                log_event("claim_lost", reason=answer.reason.value)

    # -- ends --------------------------------------------------------------------------------------

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
        """Report the end of a claimed delivery; see Session."""
        self._mine()
        end = End(
            token=claim.token,
            number=claim.number,
            outcome=outcome,
            worker=self.id,
            job_id=job_id,
            queue=queue,
            task=task,
            error=None if error is None else redact(error),
            part=part,
        )
        self._in_flight.claim_resolved(claim.token)
        self._alone.leave(claim.token)
        if outcome is Outcome.SUPERSEDED:
            # The record of its successor waits in the spool, and would be refused after this end. Another
            # thread may be writing the spool, so that a flush could come before the record.
            self._spool([end])
            self._wake.set()
            return
        with self._lock:
            self._pending.append(end)
            many = len(self._pending) >= self._settings.ends_batch
        if not self.is_mine or self._settings.ends == "durable" or many:
            self.flush()
        else:
            self._wake.set()

    def take(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Take over the ends that a child of this worker reports; they stay in flight until committed."""
        for end in ends:
            self._in_flight.add(end.token)
        with self._lock:
            self._pending.extend(ends)
            many = len(self._pending) >= self._settings.ends_batch
        if self._settings.ends == "durable" or many or self.closed:
            self.flush()
        else:
            self._wake.set()
        return [Ended.ENDED] * len(ends)

    def mark_superseded(self, claim: Claim) -> None:
        """Forget this delivery, which needs no report any more; see Session."""
        self._mine()
        self._in_flight.remove((claim.token,))
        self._alone.leave(claim.token)

    def release(self, claim: Claim, *, interrupted: bool = False) -> None:
        """Release the claim, so that any worker can start the delivery again; see Session."""
        self._mine()
        # If this fails, other starts are refused until a leader has seen that no worker lists the
        # delivery.
        self._try_release(claim, interrupted=interrupted)
        self._in_flight.remove((claim.token,))
        self._alone.leave(claim.token)

    def _try_release(self, claim: Claim, *, interrupted: bool = False) -> Exception | None:
        """Release a claim; return the error if Postgres may not have the release."""
        try:
            self._tracker.release(Released(claim.token, self.id, claim.number, interrupted))
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            log_event("not_written", what="release", error=str(failure))
            return failure
        return None

    def abandon(self, claim: Claim) -> None:
        """Give up the claim as if this worker had died; see Session."""
        self._mine()
        self._in_flight.remove((claim.token,))
        self._alone.leave(claim.token)
        self._beats.beat_now()  # a claim that no worker lists counts as abandoned

    def give_back(self, claim: Claim, *, job_id: str, error: str) -> None:
        """Send a job whose run could not begin back for a later attempt, without a crash; see Session."""
        self.release(claim)
        if self._decline(claim.token, most=_ALWAYS, error=error) is not None:
            log_event("run_not_begun", job_id=job_id, error=error)

    def decline(
        self,
        token: UUID,
        *,
        job_id: str,
        error: str,
        describe: Callable[[], Delivery] | None = None,
    ) -> bool:
        """Send the job back for a later attempt, a few times at most; see Session."""
        self._mine()
        if not self._is_put_back(token, describe):
            return False
        left = self._decline(token, most=_MOST_DECLINES, error=error)
        if left is not None:
            log_event("job_declined", job_id=job_id, tries_left=left, error=error)
        return True

    def _decline(self, token: UUID, *, most: int, error: str) -> int | None:
        """Put off a delivery; return how often it may be put off again, or None if it was not written."""
        source = self._tracker.source.id
        try:
            left: int = self._tracker.call(
                lambda store: store.decline(
                    source, token, most=most, wait=_DECLINE_WAIT, error=redact(error)
                )
            )
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            # Nothing is lost: the delivery is owed, and the sweep finds it absent.
            log_event("not_written", what="decline", error=str(failure))
            return None
        return left

    def _is_put_back(self, token: UUID, describe: Callable[[], Delivery] | None) -> bool:
        """Return True if a leader would restore this delivery, which has not begun.

        Its record may still be under way beside its push, or its producer may not be guarded.
        """
        found = self._tracker.recovers([token], began=False)
        if found is not None and token not in found and describe is not None:
            with contain_errors("record a declined job"):
                self._tracker.record_late(describe())
                found = self._tracker.recovers([token], began=False)
        return token in (found or ())

    def ended(self, ends: Sequence[End]) -> None:
        """Remove these deliveries from the in-flight list: their ends are in Postgres."""
        self._in_flight.remove([end.token for end in ends])

    def flush(self) -> None:
        """Commit every end reported so far, or put it into the spool; see Session."""
        self._mine()
        with self._flushing:
            # Ends that are reported meanwhile wait for the next flush: committed at once, they
            # would be many small batches, and each keeps claims from the connection.
            left = len(self._pending)
            while batch := self._take(left):
                left -= len(batch)
                self._commit(batch)

    def _take(self, most: int) -> list[End]:
        with self._lock:
            count = min(len(self._pending), self._settings.ends_batch, most)
            return [self._pending.popleft() for _ in range(count)]

    def _commit(self, batch: Sequence[End]) -> None:
        try:
            self._tracker.end(batch)
            failpoint.hit("after_end_committed")
        except BadRow as error:
            self._commit_alone(batch, error)
            return
        except Exception as error:
            if not isinstance(error, StoreUnavailable):
                log_event("guest_failed", where="end", error=str(error))
            if self._spool(batch):
                self._beats.beat_now()
            return
        self.ended(batch)

    def _spool(self, batch: Sequence[End]) -> bool:
        """Put these into the spool, in flight until they are replayed; return False if it is full."""
        if self._tracker.spool.put(batch):
            return True
        self._tracker.log_full_spool(len(batch))
        self.ended(batch)
        return False

    def _commit_alone(self, batch: Sequence[End], error: BadRow) -> None:
        if len(batch) > 1:
            for end in batch:
                self._commit([end])
            return
        self._tracker.spool.counts.quarantined += 1
        log_event("row_refused", job_id=batch[0].job_id, error=str(error))
        bare = bare_end(batch[0])
        if bare != batch[0]:
            # Otherwise the delivery stays in flight: a leader must not take its claim for a dead
            # one.
            self._commit([bare])

    def _flush_loop(self) -> None:
        while not self._stop.is_set():
            pause = self._settings.beat_interval
            if self._tracker.spool.pending:  # a store that was away may take it by now
                pause = min(pause, self._settings.retry_interval)
            self._wake.wait(pause)
            self._wake.clear()
            self._stop.wait(self._settings.ends_interval)
            with contain_errors("ends"):
                self.flush()
                if self._tracker.spool.pending:
                    self._tracker.replay()
                if os_threads.is_patched() and self._beats.known:
                    self._late_claims()

    # -- beats -------------------------------------------------------------------------------------

    def _unflushed(self) -> float | None:
        """Return since when reports of this worker or its children wait; None if none wait."""
        with self._lock:
            oldest = self._pending[0].ended_at if self._pending else None
        if oldest is not None and time.time() - oldest < _FRESH:
            oldest = None
        waiting = (oldest, self._tracker.spool.oldest(), self._in_flight.children.oldest())
        return min((at for at in waiting if at is not None), default=None)

    def waits(self, since: float | None) -> None:
        """Note, in a child, since when it has reports that Postgres does not have; None if it has none."""
        self._in_flight.children.note(since)

    def share(self, other: WorkerSession) -> None:
        """Share, in a child, the memory of the worker's session: the worker reads reports there."""
        self._in_flight.children = other._in_flight.children
        self._alone = self._new_alone()

    @property
    def queues(self) -> Sequence[str]:
        """Return the queues that it reports."""
        return self._beats.queues

    def consumes(self, queues: Sequence[str]) -> None:
        """Report from the next beat on that the worker takes jobs from these queues; see Session."""
        self._beats.consumes(queues)

    def take_over_beats(self, claim: Claim, gone: Callable[[], bool]) -> None:
        """Take over the beats if the worker dies before this child; see Session."""
        # Every job of RQ passes here, in a process that was just forked. So nothing is renewed that most
        # jobs do not need, and Thread.start(), which waits until the thread runs, is not used.
        _thread.start_new_thread(self._beat_for_parent, (claim, gone))

    def _beat_for_parent(self, claim: Claim, gone: Callable[[], bool]) -> None:
        if not gone():
            return
        self._mine()
        self._beats.take_over_beats(claim.token)
        self._tracker.replay()
        while True:
            with contain_errors("beats"):
                self._beats.beat()
            time.sleep(self._settings.beat_interval)

    def join(self) -> bool:
        """Add a worker of this process to those that use the session; return False if it is closed."""
        with self._counting:
            self._users += not self.closed
            return not self.closed

    def close(self, *, running: bool = False) -> None:
        """Flush, and deregister with the last worker of this process that uses it; see Session."""
        if self._leaves(last=False):
            self._close(running)
        elif self.is_mine and not self.closed:
            self.flush()

    def close_for_all(self) -> None:
        """Flush and deregister, even if workers still use the session."""
        if self._leaves(last=True):
            self._close(running=False)

    def _leaves(self, *, last: bool) -> bool:
        """Remove one user. Return True if the session must close now; then no worker can join it."""
        if not self.is_mine:  # In a forked child another thread may hold the lock for ever.
            return False
        with self._counting:
            self._users -= 1
            if self.closed or (self._users > 0 and not last):
                return False
            self.closed = True
            return True

    def _close(self, running: bool) -> None:
        self._beats.stop()
        self._stop.set()
        self._wake.set()
        if self._flusher is not None:
            self._flusher.join(timeout=self._settings.record_timeout)
        if self._beats.ended is not None:
            self._beats.ended.wait(self._settings.record_timeout)
        self.flush()
        self._tracker.drain_spool(last=True)
        if running or self._tracker.spool.left():
            # A job that still runs must stay claimed until no beat has come for long enough. And
            # after a deregistration, jobs that ran but could not be reported would run again at
            # once.
            self._beats.close()
            return
        self._beats.leave()
        self._beats.close()
        log_event("worker_left", worker=self.id, name=self._beats.name)
