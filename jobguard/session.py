"""One boot of a guarded worker process: it beats, it claims, it reports ends in batches.

A delivery is on the session's list from before its claim is asked for until its end is committed, so
that a beat never leaves out what this worker may be running, nor what it has run and not yet told.

Two threads: one beats, on a connection of its own that no breaker holds back, into Postgres and into
Redis; one commits ends. Where jobs run in threads beside them, which a C call can starve, a stand-in in
a process of its own beats when they cannot (see standin.py). A work-horse forked off the worker has
neither; what it reports is written at once. But it watches its worker: should that die, the horse runs
on, and beats in its stead, so that the job is not started beside it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from jobguard import failpoint, native
from jobguard.errors import BadRow, JobguardError, StoreUnavailable, is_host_interrupt
from jobguard.forks import Forks
from jobguard.job import (
    Beat,
    Claim,
    ClaimAnswer,
    Delivery,
    Disowned,
    End,
    Ended,
    Outcome,
    Part,
    Refused,
    Unknown,
    new_token,
)
from jobguard.log import say
from jobguard.pulse import beat_key, parse_pulse, read_pulse
from jobguard.redact import redact
from jobguard.standin import StandIn
from jobguard.store import Ask, BeatReply, HostStore

if TYPE_CHECKING:
    import redis

    from jobguard.adapter import Source
    from jobguard.circuit import Circuit
    from jobguard.settings import Settings
    from jobguard.spool import Spool

_HOLD_BACK = 1.0
"""Ends younger than this are no news for a beat: the batch is about to be committed."""
_STEP = 0.05
"""Seconds between two tries of a worker to introduce itself."""
_HEIR = 1 << 40
"""The beats of a worker's heir are counted from here: any of the worker's own is another number."""
_DECLINES = 5
"""How often a job goes back that no worker can begin, before it is dead."""
_DECLINED = 5.0
"""Seconds before it goes back the first time; twice as many each time after."""
_SAY_WHERE = 60.0
"""Seconds for which a stand-in may use the same address: its password may be one that rotates."""
_BREATH = 0.25
"""Seconds between two beats at least, however much there is to tell."""


class Host(Protocol):
    """What a session needs of the tracker that opened it."""

    source: Source
    settings: Settings
    spool: Spool
    circuit: Circuit
    client: Callable[[], redis.Redis] | None

    def call(self, work: Callable[[HostStore], Any]) -> Any:
        """Make one call to the store, behind the circuit."""

    def claim(self, ask: Ask) -> ClaimAnswer:
        """Ask for a claim, or raise as the store does."""

    def connect(self) -> None:
        """Reach Postgres now, or raise why it cannot be used."""

    def end(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Commit ends, or raise as the store does."""

    def replay(self) -> int:
        """Give Postgres what waits in the spool."""

    def settle(self, *, last: bool = False) -> None:
        """Write what waits, in bounded time."""


def bare_end(end: End) -> End:
    """Leave out of an end all that could be refused: that it ended must be remembered."""
    return replace(end, job_id="", queue="", task="", error=None)


class WorkerSession:
    """The session of one worker process; see jobguard.adapter.Session."""

    def __init__(
        self,
        tracker: Host,
        beat_store: HostStore,
        *,
        name: str,
        queues: Sequence[str],
        inherited: tuple[UUID, int] | None = None,
        lists: Callable[[], Iterable[UUID]] | None = None,
        apart: bool = False,
    ) -> None:
        self.id, self._pid = inherited or (new_token(), os.getpid())
        self.closed = False
        self._tracker = tracker
        self._settings = tracker.settings
        self._beat_store = beat_store
        self._name = name
        self._queues = tuple(queues)
        self._lists = lists
        self._children: frozenset[UUID] = frozenset()
        self._stand_in = self._apart() if apart else None
        self._conninfo: tuple[float, str] | None = None  # as the stand-in was told it, and when
        self._lock = native.lock()
        self._lock_pid = os.getpid()
        self._forks = Forks()
        self._listed: dict[UUID, int] = {}  # by how many starts of this process
        self._unclaimed: dict[UUID, UUID] = {}  # started while Postgres was away: token -> nonce
        self._pending: deque[End] = deque()
        self._flushing = threading.Lock()
        self._wake = threading.Event()
        self._beat_now = native.Event()
        self._stop = threading.Event()
        self._stop_beats = native.Event()
        self._beats_ended: native.Event | None = None
        self._counter = 0
        self._known = inherited is not None
        self._unknown_since = time.monotonic()
        self._leader_live = False
        self._redis: redis.Redis | None = None
        self._pulse: tuple[UUID, int] | None = None  # as the last beat into Redis saw it
        self._flusher: threading.Thread | None = None

    @property
    def is_mine(self) -> bool:
        """Whether this process opened it; a forked child only inherited it."""
        return self._pid == os.getpid()

    def _mine(self) -> None:
        """In a forked child: begin with locks that no thread of the parent holds, and nothing to tell."""
        if self._lock_pid != os.getpid():
            self._lock_pid = os.getpid()
            self._lock = native.lock()
            self._flushing = threading.Lock()
            self._pending = deque()

    def open(self) -> None:
        """Beat once, so that claims have somebody to belong to, and go on beating."""
        deadline = time.monotonic() + self._settings.record_timeout
        heard = self.beat()
        while not heard and time.monotonic() < deadline:
            # Nothing waits for a worker that has not begun; unknown, it would start jobs unclaimed.
            time.sleep(_STEP)
            heard = self._beat_postgres(self._snapshot(self._pulse))
        say("worker_started", worker=self.id, name=self._name, queues=self._queues)
        self._beats_ended = native.start(self._beats, name="jobguard-beat")
        self._flusher = threading.Thread(target=self._flushes, name="jobguard-ends", daemon=True)
        self._flusher.start()

    # -- starts ------------------------------------------------------------------------------------

    def start(self, token: UUID, describe: Callable[[], Delivery]) -> Claim | Refused:
        """Ask for the claim to run a delivery; see Session."""
        self._mine()
        nonce = new_token()
        with self._lock:
            self._listed[token] = self._listed.get(token, 0) + 1
            # Before the claim is asked for.
            if not self.is_mine:
                self._forks.runs(token)
            if self._stand_in is not None:
                self._stand_in.begins(token.hex)
        try:
            answer = self._claim_patiently(token, nonce, describe)
        except StoreUnavailable as error:
            # Fail open: the job runs, and is claimed as soon as Postgres answers again.
            say("start_unclaimed", error=str(error))
            with self._lock:
                self._unclaimed[token] = nonce
            self._beat_now.set()
            return Claim(token, 0)
        except Exception as error:
            if is_host_interrupt(error):
                self._unlist((token,))
                raise
            say("guest_failed", where="claim", error=str(error))
            return Claim(token, 0)
        if isinstance(answer, Claim):
            return answer
        if isinstance(answer, Disowned):
            # A child cannot know its worker's new name; the worker lists what it runs.
            say("start_unclaimed", error="its worker was declared dead")
            return Claim(token, 0)
        if not self._settings.fence or self._settings.mode == "observe":
            say("start_unfenced", reason=answer.reason.value)
            return Claim(token, 0)
        with self._lock:
            self._count_down(token)  # another thread of ours may hold it: then it stays listed
        say(
            "start_skipped",
            reason=answer.reason.value,
            outcome=answer.outcome.value if answer.outcome else None,
        )
        if not self._leader_live:
            say("nobody_leads")
        return answer

    def _claim_patiently(
        self, token: UUID, nonce: UUID, describe: Callable[[], Delivery]
    ) -> Claim | Refused | Disowned:
        """Claim, again if Postgres was only slow: without a claim, copies of one job run twice.

        Waits as long as one record may take, and only that long after the circuit opened, or the worker
        took its name: an outage costs a worker one such wait.
        """
        until: float | None = None
        while True:
            try:
                return self._claim(token, nonce, describe)
            except StoreUnavailable:
                circuit = self._tracker.circuit
                if until is None:
                    away = circuit.open_for()
                    if not self._known and circuit.closed:
                        away = time.monotonic() - self._unknown_since
                    until = time.monotonic() + self._settings.record_timeout - away
                while not (circuit.look() and self._introduced()) and time.monotonic() < until:
                    time.sleep(_STEP / 2)
                if time.monotonic() >= until:
                    raise

    def _claim(
        self, token: UUID, nonce: UUID, describe: Callable[[], Delivery] | None
    ) -> Claim | Refused | Disowned:
        if not self._known and not (self._tracker.circuit.look() and self._introduced()):
            raise StoreUnavailable("this worker has not been able to introduce itself")
        ask = Ask(
            token=token,
            nonce=nonce,
            worker=self.id,
            pid=os.getpid(),
            namespace=self._tracker.source.namespace,
            worker_timeout=self._settings.worker_timeout,
            crash_budget=self._settings.crash_budget,
        )
        answer = self._tracker.claim(ask)
        if isinstance(answer, Unknown):
            if describe is None:
                raise BadRow("nothing is known of it")
            self._adopt(describe())
            answer = self._tracker.claim(ask)
        if isinstance(answer, Unknown):
            raise StoreUnavailable("it is neither owed nor ended, though it was just recorded")
        if isinstance(answer, Disowned) and self.is_mine:
            self._be_reborn(ask.worker)
            raise StoreUnavailable("this worker was declared dead")
        return answer

    def _introduced(self) -> bool:
        """Whether Postgres knows this worker: a claim must belong to somebody."""
        if not self._known:
            if self.is_mine:
                # Two beats at once could come in the wrong order, and the older one list too little.
                self._beat_now.set()
            else:
                self.beat()
        return self._known

    def _adopt(self, delivery: Delivery) -> None:
        """Record what nobody recorded: an unguarded producer's job, or one that waits in a spool."""
        source = self._tracker.source
        self._tracker.call(
            lambda store: store.record(
                source.id, [delivery], namespace=source.namespace, replay=True, newest=True
            )
        )

    def _late_claims(self) -> None:
        with self._lock:
            waiting = list(self._unclaimed.items())
        for token, nonce in waiting:
            try:
                answer = self._claim(token, nonce, None)
            except StoreUnavailable:
                return
            except JobguardError:
                # Its record still waits in somebody's spool: the list in the beat protects the run.
                continue
            with self._lock:
                self._unclaimed.pop(token, None)
            if isinstance(answer, Refused):
                say("claim_lost", reason=answer.reason.value)

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
        with self._lock:
            self._unclaimed.pop(claim.token, None)
            self._pending.append(end)
            many = len(self._pending) >= self._settings.ends_batch
        if not self.is_mine or self._settings.ends == "durable" or many:
            self.flush()
        else:
            self._wake.set()

    def release(self, claim: Claim) -> None:
        """Nothing is left to report of this delivery; see Session."""
        self._mine()
        self._unlist((claim.token,))

    def give_back(self, claim: Claim) -> None:
        """Let anyone start it again; see Session."""
        self._mine()
        source = self._tracker.source.id
        try:
            self._tracker.call(
                lambda store: store.give_back(source, claim.token, self.id, number=claim.number)
            )
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            # Whoever starts it is refused until a leader has seen that nobody lists it.
            say("not_written", what="give_back", error=str(failure))
        self._unlist((claim.token,))

    def abandon(self, claim: Claim) -> None:
        """Give a claim up as a dead worker's; see Session."""
        self._mine()
        self._unlist((claim.token,))
        self._beat_now.set()  # a claim that is not listed is nobody's

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
            say("not_written", what="decline", error=str(failure))
            return
        say("job_declined", job_id=job_id, tries_left=left, error=error)

    def ended(self, ends: Sequence[End]) -> None:
        """These ends are in Postgres: they need not be listed any more."""
        self._unlist([end.token for end in ends])

    def _unlist(self, tokens: Sequence[UUID]) -> None:
        with self._lock:
            for token in tokens:
                self._count_down(token)
                self._unclaimed.pop(token, None)

    def _count_down(self, token: UUID) -> None:
        """One start of it less: several copies may be starting at once, of which one is granted."""
        count = self._listed.pop(token, 0) - 1
        if count > 0:
            self._listed[token] = count
            return
        if not self.is_mine:
            self._forks.runs(next(reversed(self._listed), None))
        if self._stand_in is not None:
            self._stand_in.ends(token.hex)

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
                say("guest_failed", where="end", error=str(error))
            if self._tracker.spool.put(batch):
                self._beat_now.set()
                return  # listed until they are replayed
            say("spool_full", size=self._settings.spool_size, ends=len(batch))
        self.ended(batch)

    def _commit_alone(self, batch: Sequence[End], error: BadRow) -> None:
        if len(batch) > 1:
            for end in batch:
                self._commit([end])
            return
        self._tracker.spool.counts.quarantined += 1
        say("row_refused", job_id=batch[0].job_id, error=str(error))
        bare = bare_end(batch[0])
        if (
            bare != batch[0]
        ):  # else it stays listed: a leader must not take the claim for a dead one
            self._commit([bare])

    def _flushes(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._settings.beat_interval)
            self._wake.clear()
            self._stop.wait(self._settings.ends_interval)
            try:
                self.flush()
                if len(self._tracker.spool):
                    self._tracker.replay()
                if native.is_patched() and self._known:
                    self._late_claims()
            except Exception as error:
                say("guest_failed", where="ends", error=str(error), exc_info=True)

    # -- beats -------------------------------------------------------------------------------------

    def beat(self) -> bool:
        """Say to both stores that this worker lives; True if Postgres heard it."""
        beat = self._snapshot(self._pulse)
        heard = self._beat_postgres(beat)
        # Second, so that a name that does not resolve, or a Redis that hangs, delays no beat.
        self._pulse = self._beat_redis(beat.counter)
        if self._stand_in is not None:
            self._tell(self._stand_in, beat)
        return heard

    def _apart(self) -> StandIn | None:
        """Make what beats in our stead while something holds the interpreter; None: nothing can."""
        if self._beat_store.conninfo() is None:
            return None
        return StandIn(
            {
                "source": self._tracker.source.id,
                "namespace": self._tracker.source.namespace,
                "interval": self._settings.beat_interval,
                "settings": asdict(self._settings),
            }
        )

    def _tell(self, stand_in: StandIn, beat: Beat) -> None:
        try:
            at = time.monotonic()
            if self._conninfo is None or at - self._conninfo[0] > _SAY_WHERE:
                self._conninfo = (at, self._beat_store.conninfo() or "")
            with self._lock:  # what has begun or ended since the beat is told in this order, too
                claims = tuple(self._listed.keys() | self._children)
                now = replace(
                    beat, worker=self.id, counter=self._counter, claims=claims, pulse=None
                )
                stand_in.beat(now, self._conninfo[1])
        except Exception as error:
            say("guest_failed", where="stand-in", error=str(error), exc_info=True)

    def _beat_postgres(self, beat: Beat) -> bool:
        source = self._tracker.source
        try:
            if not self._known:
                self._tracker.connect()
            reply: BeatReply = self._beat_store.beat(source.id, beat, namespace=source.namespace)
        except JobguardError as error:
            say("beat_unheard", store="postgres", error=str(error))
            return False
        except Exception as error:
            say("guest_failed", where="beat", error=str(error), exc_info=True)
            return False
        self._leader_live = reply.leader_live
        if reply.dead:
            self._be_reborn(beat.worker)
            return self._beat_postgres(self._snapshot(self._pulse))
        with self._lock:
            self._known = self._known or beat.worker == self.id
        if not self._tracker.circuit.closed:
            self._tracker.circuit.answered()
        return True

    def _snapshot(self, pulse: tuple[UUID, int] | None) -> Beat:
        others = self._others() | self._forks.running()
        with self._lock:
            self._counter += 1
            listed = tuple(self._listed.keys() | others)
            oldest = self._pending[0].ended_at if self._pending else None
        if oldest is not None and time.time() - oldest < _HOLD_BACK:
            oldest = None
        waiting = (oldest, self._tracker.spool.oldest(), self._forks.oldest())
        unflushed = min((at for at in waiting if at is not None), default=None)
        return Beat(
            worker=self.id,
            counter=self._counter,
            claims=listed,
            name=self._name,
            host=socket.gethostname(),
            pid=self._pid,
            queues=self._queues,
            unflushed_since=unflushed,
            pulse=pulse,
            fence=self._settings.fence,
        )

    def waits(self, since: float | None) -> None:
        """In a child: it has reports since then that Postgres does not have; None: none."""
        self._forks.note(since)

    def share(self, other: WorkerSession) -> None:
        """In a child: tell what waits where the worker looks, whose forked session this is."""
        self._forks = other._forks

    def _others(self) -> frozenset[UUID]:
        """What children of ours may be running, as the adapter sees it; in doubt, as it saw it last."""
        if self._lists is not None:
            try:
                self._children = frozenset(self._lists())
            except Exception as error:
                say("guest_failed", where="lists", error=str(error), exc_info=True)
        return self._children

    def _be_reborn(self, before: UUID) -> None:
        """A leader has declared us dead: what we held is others' now, and we begin anew."""
        with self._lock:
            if self.id != before:
                return  # another thread has heard it as well
            self.id, self._counter, self._known = new_token(), 0, False
            self._unknown_since = time.monotonic()
        say("worker_renewed", was=before, worker=self.id)

    def _beat_redis(self, counter: int) -> tuple[UUID, int] | None:
        try:
            client = self._client()
            if client is None:
                return None
            pipe = client.pipeline(transaction=False)
            seconds = int(4 * self._settings.worker_timeout)
            pipe.set(beat_key(self.id), counter, ex=seconds)
            read_pulse(pipe, self._tracker.source)
            answers: list[Any] = pipe.execute()
        except Exception as error:
            say("beat_unheard", store="redis", error=str(error))
            return None
        standing = parse_pulse(answers[1])
        if standing is None:
            return None
        if standing.source != self._tracker.source.id:
            say("source_differs", source=str(self._tracker.source))
        return standing.epoch, standing.n

    def _client(self) -> redis.Redis | None:
        if self._redis is None and self._tracker.client is not None:
            self._redis = self._tracker.client()
        return self._redis

    def _beats(self) -> None:
        interval = self._settings.beat_interval
        breath = min(_BREATH, interval)
        while not self._stop_beats.wait(breath):
            # At once where Postgres does not know of something that we run or ran: as long as it is
            # not on our list, its absence from Redis would be taken for a loss.
            self._beat_now.wait(interval - breath)
            self._beat_now.clear()
            if self._stop_beats.is_set():
                return
            try:
                # A claim takes locks that greenlets wait for: from a thread of its own it must not.
                if self.beat() and not native.is_patched():
                    self._late_claims()
            except Exception as error:
                say("guest_failed", where="beats", error=str(error), exc_info=True)

    def consumes(self, queues: Sequence[str]) -> None:
        """Say from the next beat on that it takes from these queues; see Session."""
        queues = tuple(queues)
        if queues != self._queues:
            self._queues = queues
            self._beat_now.set()  # should we die before it is said, nobody vouches for what is new

    def outlive(self, claim: Claim, gone: Callable[[], bool]) -> None:
        """Beat in the worker's stead if it dies before this child of it; see Session."""
        self._mine()
        name = "jobguard-heir"
        threading.Thread(target=self._inherit, args=(claim, gone), name=name, daemon=True).start()

    def _inherit(self, claim: Claim, gone: Callable[[], bool]) -> None:
        if not gone():
            return
        say("worker_inherited", worker=self.id, name=self._name)
        self._redis = None  # its connection is the parent's
        with self._lock:
            self._listed = {claim.token: 1}
            self._lists, self._children, self._stand_in = None, frozenset(), None
            self._counter += _HEIR
        self._tracker.replay()
        while True:
            try:
                self.beat()
            except Exception as error:
                say("guest_failed", where="beats", error=str(error), exc_info=True)
            time.sleep(self._settings.beat_interval)

    def close(self, *, running: bool = False) -> None:
        """Flush and say goodbye; see Session."""
        if self.closed or not self.is_mine:
            return
        self.closed = True
        if self._stand_in is not None:
            self._stand_in.close()
        self._stop.set()
        self._stop_beats.set()
        self._wake.set()
        self._beat_now.set()
        if self._flusher is not None:
            self._flusher.join(timeout=self._settings.record_timeout)
        if self._beats_ended is not None:
            self._beats_ended.wait(self._settings.record_timeout)
        self.flush()
        self._tracker.settle(last=True)
        if running or len(self._tracker.spool):
            # What still runs is nobody's only when nobody has been heard for long enough; and after
            # a goodbye, what we ran and could not report would be run again at once.
            self._beat_store.close()
            return
        try:
            self._beat_store.leave(self.id)
        except Exception as error:
            say("beat_unheard", store="postgres", error=str(error))
        try:
            if (client := self._client()) is not None:
                client.delete(beat_key(self.id))
        except Exception as error:
            say("beat_unheard", store="redis", error=str(error))
        self._beat_store.close()
        say("worker_left", worker=self.id, name=self._name)
