"""One boot of a guarded worker process: it beats, it claims, it reports ends in batches.

A delivery is on the session's list from before its claim is asked for until its end is committed, so
that a beat never leaves out what this worker may be running, nor what it has run and not yet told.

Two threads: one beats (see heart.py), one commits ends. Where jobs run in threads beside them, which a C
call can starve, a stand-in in a process of its own beats when they cannot (see standin.py). A work-horse
forked off the worker has neither; what it reports is written at once. But it watches its worker: should
that die, the horse runs on, and beats in its stead, so that the job is not started beside it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol
from uuid import UUID

from jobguard import failpoint, os_threads
from jobguard.errors import BadRow, JobguardError, StoreUnavailable, is_host_interrupt
from jobguard.host.alone import Alone
from jobguard.host.beats import BeatSender, BeatTracker
from jobguard.host.in_flight import InFlight
from jobguard.host.spool import Spool
from jobguard.log import log_event
from jobguard.model import (
    Claim,
    ClaimAnswer,
    Delivery,
    End,
    Ended,
    Outcome,
    Part,
    Refused,
    Unknown,
    WorkerDeclaredDead,
    new_token,
)
from jobguard.redact import redact
from jobguard.store.protocols import ClaimRequest, HostStore

_HOLD_BACK = 1.0
"""Ends younger than this are no news for a beat: the batch is about to be committed."""
_STEP = 0.025
"""Seconds between two tries of a start to get its claim."""
_DECLINES = 5
"""How often a job goes back that no worker can begin, before it is dead."""
_DECLINED = 5.0
"""Seconds before it goes back the first time; twice as many each time after."""


class SessionTracker(BeatTracker, Protocol):
    """What a session needs of the tracker that opened it."""

    spool: Spool

    def call(self, work: Callable[[HostStore], Any]) -> Any:
        """Make one call to the store, behind the circuit."""

    def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Ask for a claim, or raise as the store does."""

    def end(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Commit ends, or raise as the store does."""

    def replay(self) -> int:
        """Give Postgres what waits in the spool."""

    def tell_full(self, count: int) -> None:
        """Say that so many entries find no room in the spool."""

    def drain_spool(self, *, last: bool = False) -> None:
        """Write what waits, in bounded time."""


def bare_end(end: End) -> End:
    """Leave out of an end all that could be refused: that it ended must be remembered."""
    return replace(end, job_id="", queue="", task="", error=None)


class WorkerSession:
    """The session of one worker process; see jobguard.adapter.Session."""

    def __init__(
        self,
        tracker: SessionTracker,
        beat_store: HostStore,
        *,
        name: str,
        queues: Sequence[str],
        inherited: tuple[UUID, int] | None = None,
        lists: Callable[[], Iterable[UUID]] | None = None,
        apart: bool = False,
    ) -> None:
        self.closed = False
        self._tracker = tracker
        self._settings = tracker.settings
        self._listed = InFlight(inherited[1] if inherited else os.getpid())
        self._beats = BeatSender(
            tracker,
            beat_store,
            self._listed,
            name=name,
            queues=queues,
            inherited=inherited,
            lists=lists,
            unflushed=self._unflushed,
        )
        if apart:
            self._beats.start_beat_process()
        self._alone = Alone()
        self._lock = os_threads.lock()
        self._lock_pid = os.getpid()
        self._pending: deque[End] = deque()
        self._flushing = threading.Lock()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._flusher: threading.Thread | None = None

    @property
    def id(self) -> UUID:
        """The name of this worker; see Session."""
        return self._beats.id

    @property
    def is_mine(self) -> bool:
        """Whether this process opened it; a forked child only inherited it."""
        return self._beats.is_mine

    def _mine(self) -> None:
        """In a forked child: begin with locks that no thread of the parent holds, and nothing to tell."""
        if self._lock_pid != os.getpid():
            self._lock_pid = os.getpid()
            self._listed.after_fork()
            self._alone.after_fork()
            self._lock = os_threads.lock()
            self._flushing = threading.Lock()
            self._pending = deque()

    def open(self) -> None:
        """Beat once, so that claims have somebody to belong to, and go on beating."""
        self._beats.introduce()
        log_event(
            "worker_started", worker=self.id, name=self._beats.name, queues=self._beats.queues
        )
        self._beats.start(self._heard)
        self._flusher = threading.Thread(target=self._flushes, name="jobguard-ends", daemon=True)
        self._flusher.start()

    # -- starts ------------------------------------------------------------------------------------

    def start(
        self,
        token: UUID,
        describe: Callable[[], Delivery],
        *,
        idle: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Claim | Refused:
        """Ask for the claim to run a delivery; see Session."""
        self._mine()
        self._listed.add(token)  # before the claim is asked for
        answer: Claim | Refused | None = None
        try:
            if not self._alone.enters(token):
                with idle():
                    self._alone.enter(token)
            answer = self._started(token, describe)
            if isinstance(answer, Claim) and answer.crashes:
                answer = self._start_alone(answer, describe, idle)
        except BaseException:
            self._listed.remove((token,))
            raise
        finally:
            if not isinstance(answer, Claim):
                self._alone.leave(token)
        return answer

    def _start_alone(
        self,
        claim: Claim,
        describe: Callable[[], Delivery],
        idle: Callable[[], AbstractContextManager[None]],
    ) -> Claim | Refused:
        """Start what is charged with a worker's death when nothing else runs here.

        What ended here is committed first: a claim that is not ended yet looks like company.
        """
        if not self._alone.take(claim.token):
            if not self._gave_back(claim):
                return claim  # Postgres is away: then no death is charged to it either
            self._beats.beat_now()  # it has no claim now, and must be on the list
            log_event("start_waits", token=claim.token)
            with idle():
                self._alone.wait(claim.token)
            self.flush()
            return self._started(claim.token, describe)
        self.flush()
        return claim

    def _started(self, token: UUID, describe: Callable[[], Delivery]) -> Claim | Refused:
        nonce = new_token()
        try:
            answer = self._claim_patiently(token, nonce, describe)
        except StoreUnavailable as error:
            # Fail open: the job runs, and is claimed as soon as Postgres answers again.
            log_event("start_unclaimed", error=str(error))
            self._listed.without_claim(token, nonce)
            self._beats.beat_now()
            return Claim(token, 0)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log_event("guest_failed", where="claim", error=str(error))
            return Claim(token, 0)
        if isinstance(answer, Claim):
            return answer
        if isinstance(answer, WorkerDeclaredDead):
            # A child cannot know its worker's new name; the worker lists what it runs.
            log_event("start_unclaimed", error="its worker was declared dead")
            return Claim(token, 0)
        if self._settings.mode == "observe":
            log_event("start_unfenced", reason=answer.reason.value)
            return Claim(token, 0)
        self._listed.skip(token)
        log_event(
            "start_skipped",
            reason=answer.reason.value,
            outcome=answer.outcome.value if answer.outcome else None,
        )
        if not self._beats.leader_live:
            log_event("nobody_leads")
        return answer

    def _claim_patiently(
        self, token: UUID, nonce: UUID, describe: Callable[[], Delivery]
    ) -> Claim | Refused | WorkerDeclaredDead:
        """Claim, again if Postgres was only slow: without a claim, copies of one job run twice.

        Waits as long as one record may take, and only that long after the circuit opened; or, for a worker
        that is not introduced yet, after it closed or the worker took its name. An outage costs one such
        wait.
        """
        until: float | None = None
        while True:
            try:
                return self._claim(token, nonce, describe)
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
        self, token: UUID, nonce: UUID, describe: Callable[[], Delivery] | None
    ) -> Claim | Refused | WorkerDeclaredDead:
        worker = self._beats.introduced()
        if worker is None:
            self._tracker.circuit.check()  # the outage in which it began may just be over
            raise StoreUnavailable("this worker has not been able to introduce itself")
        request = ClaimRequest(
            token=token,
            nonce=nonce,
            worker=worker,
            pid=os.getpid(),
            namespace=self._tracker.source.namespace,
            worker_timeout=self._settings.worker_timeout,
            crash_budget=self._settings.crash_budget,
        )
        answer = self._tracker.claim(request)
        if isinstance(answer, Unknown):
            if describe is None:
                raise BadRow("nothing is known of it")
            self._adopt(describe())
            answer = self._tracker.claim(request)
        if isinstance(answer, Unknown):
            raise StoreUnavailable("it is neither owed nor ended, though it was just recorded")
        if isinstance(answer, WorkerDeclaredDead) and self.is_mine:
            self._beats.register_again(worker)
            raise StoreUnavailable("this worker was declared dead")
        return answer

    def _adopt(self, delivery: Delivery) -> None:
        """Record what nobody recorded: an unguarded producer's job, or one that waits in a spool."""
        source = self._tracker.source
        self._tracker.call(
            lambda store: store.record(
                source.id, [delivery], namespace=source.namespace, replay=True, newest=True
            )
        )

    def _heard(self) -> None:
        # A claim takes locks that greenlets wait for: from a thread of its own it must not.
        if not os_threads.is_patched():
            self._late_claims()

    def _late_claims(self) -> None:
        for token, nonce in self._listed.unclaimed():
            try:
                answer = self._claim(token, nonce, None)
            except StoreUnavailable:
                return
            except JobguardError:
                # Its record still waits in somebody's spool: the list in the beat protects the run.
                continue
            self._listed.claim_resolved(token)
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
        self._listed.claim_resolved(claim.token)
        self._alone.leave(claim.token)
        with self._lock:
            self._pending.append(end)
            many = len(self._pending) >= self._settings.ends_batch
        if not self.is_mine or self._settings.ends == "durable" or many:
            self.flush()
        else:
            self._wake.set()

    def take(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Take over what a child of this worker has to report, and list it until it is committed."""
        for end in ends:
            self._listed.add(end.token)
        with self._lock:
            self._pending.extend(ends)
            many = len(self._pending) >= self._settings.ends_batch
        if self._settings.ends == "durable" or many or self.closed:
            self.flush()
        else:
            self._wake.set()
        return [Ended.ENDED] * len(ends)

    def mark_superseded(self, claim: Claim) -> None:
        """Nothing is left to report of this delivery; see Session."""
        self._mine()
        self._listed.remove((claim.token,))
        self._alone.leave(claim.token)

    def release(self, claim: Claim) -> None:
        """Let anyone start it again; see Session."""
        self._mine()
        # If this fails, whoever starts it is refused until a leader has seen that nobody lists it.
        self._gave_back(claim)
        self._listed.remove((claim.token,))
        self._alone.leave(claim.token)

    def _gave_back(self, claim: Claim) -> bool:
        source = self._tracker.source.id
        try:
            self._tracker.call(
                lambda store: store.release(source, claim.token, self.id, number=claim.number)
            )
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            log_event("not_written", what="give_back", error=str(failure))
            return False
        return True

    def abandon(self, claim: Claim) -> None:
        """Give a claim up as a dead worker's; see Session."""
        self._mine()
        self._listed.remove((claim.token,))
        self._alone.leave(claim.token)
        self._beats.beat_now()  # a claim that is not listed is nobody's

    def decline(self, token: UUID, *, job_id: str, error: str) -> None:
        """Have it go back later, a few times; see Session."""
        self._mine()
        source = self._tracker.source.id
        try:
            left = self._tracker.call(
                lambda store: store.decline(
                    source, token, most=_DECLINES, wait=_DECLINED, error=redact(error)
                )
            )
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            # Nothing is lost: it is owed, and found absent by the sweep.
            log_event("not_written", what="decline", error=str(failure))
            return
        log_event("job_declined", job_id=job_id, tries_left=left, error=error)

    def ended(self, ends: Sequence[End]) -> None:
        """These ends are in Postgres: they need not be listed any more."""
        self._listed.remove([end.token for end in ends])

    def flush(self) -> None:
        """Commit every end reported so far, or put it into the spool; see Session."""
        self._mine()
        with self._flushing:
            while batch := self._take():
                self._commit(batch)

    def _take(self) -> list[End]:
        with self._lock:
            count = min(len(self._pending), self._settings.ends_batch)
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
            if self._tracker.spool.put(batch):
                self._beats.beat_now()
                return  # listed until they are replayed
            self._tracker.tell_full(len(batch))
        self.ended(batch)

    def _commit_alone(self, batch: Sequence[End], error: BadRow) -> None:
        if len(batch) > 1:
            for end in batch:
                self._commit([end])
            return
        self._tracker.spool.counts.quarantined += 1
        log_event("row_refused", job_id=batch[0].job_id, error=str(error))
        bare = bare_end(batch[0])
        if bare != batch[0]:
            # Else it stays listed: a leader must not take the claim for a dead one.
            self._commit([bare])

    def _flushes(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._settings.beat_interval)
            self._wake.clear()
            self._stop.wait(self._settings.ends_interval)
            try:
                self.flush()
                if self._tracker.spool.pending:
                    self._tracker.replay()
                if os_threads.is_patched() and self._beats.known:
                    self._late_claims()
            except Exception as error:
                log_event("guest_failed", where="ends", error=str(error), exc_info=True)

    # -- beats -------------------------------------------------------------------------------------

    def _unflushed(self) -> float | None:
        """Since when reports of this worker or its children wait; None: none do."""
        with self._lock:
            oldest = self._pending[0].ended_at if self._pending else None
        if oldest is not None and time.time() - oldest < _HOLD_BACK:
            oldest = None
        waiting = (oldest, self._tracker.spool.oldest(), self._listed.children.oldest())
        return min((at for at in waiting if at is not None), default=None)

    def waits(self, since: float | None) -> None:
        """In a child: it has reports since then that Postgres does not have; None: none."""
        self._listed.children.note(since)

    def share(self, other: WorkerSession) -> None:
        """In a child: tell what waits where the worker looks, whose forked session this is."""
        self._listed.children = other._listed.children

    def consumes(self, queues: Sequence[str]) -> None:
        """Say from the next beat on that it takes from these queues; see Session."""
        self._beats.consumes(queues)

    def take_over_beats(self, claim: Claim, gone: Callable[[], bool]) -> None:
        """Beat in the worker's stead if it dies before this child of it; see Session."""
        self._mine()
        name = "jobguard-heir"
        threading.Thread(
            target=self._beat_for_parent, args=(claim, gone), name=name, daemon=True
        ).start()

    def _beat_for_parent(self, claim: Claim, gone: Callable[[], bool]) -> None:
        if not gone():
            return
        self._beats.take_over_beats(claim.token)
        self._tracker.replay()
        while True:
            try:
                self._beats.beat()
            except Exception as error:
                log_event("guest_failed", where="beats", error=str(error), exc_info=True)
            time.sleep(self._settings.beat_interval)

    def close(self, *, running: bool = False) -> None:
        """Flush and say goodbye; see Session."""
        if self.closed or not self.is_mine:
            return
        self.closed = True
        self._beats.stop()
        self._stop.set()
        self._wake.set()
        if self._flusher is not None:
            self._flusher.join(timeout=self._settings.record_timeout)
        if self._beats.ended is not None:
            self._beats.ended.wait(self._settings.record_timeout)
        self.flush()
        self._tracker.drain_spool(last=True)
        if running or self._tracker.spool.pending:
            # What still runs is nobody's only when nobody has been heard for long enough; and after
            # a goodbye, what we ran and could not report would be run again at once.
            self._beats.close()
            return
        self._beats.leave()
        self._beats.close()
        log_event("worker_left", worker=self.id, name=self._beats.name)
