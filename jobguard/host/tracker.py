"""The tracker: everything a host process tells the ledger passes through here.

A job's road: the adapter hands over a delivery, ``record`` commits it (group commit, behind the
circuit), and only then does the library push. While Postgres is away, what could not be written goes
into the spool, and back from there, in order, when the circuit closes. Nothing in here lets an
exception of ours reach the host, unless the user asked for it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any, cast
from uuid import UUID

import redis

from jobguard import os_threads
from jobguard.adapter import Source
from jobguard.errors import (
    BadRow,
    BreakerOpen,
    JobguardError,
    NoRights,
    NotMigrated,
    NotWritten,
    StoreUnavailable,
    WrongInstallation,
    is_host_interrupt,
)
from jobguard.host import batch as batches
from jobguard.host.circuit import Circuit
from jobguard.host.group_commit import GroupCommit
from jobguard.host.parent import Door, ParentSpool, ParentStore
from jobguard.host.redis_health import RedisHealth
from jobguard.host.replay import BATCH, Replay, write_cancellation
from jobguard.host.session import WorkerSession
from jobguard.host.spool import Cancelled, Entry, JoinOpened, MemorySpool, Spool
from jobguard.host_safety import safe_tracker
from jobguard.log import log_event
from jobguard.model import Claim, ClaimAnswer, Delivery, End, Ended, Outcome, Recorded
from jobguard.redact import redact
from jobguard.settings import Settings
from jobguard.store.protocols import ClaimRequest, HostStore, SourceRow

_OF_ITS_OWN = ("outbox", "replay", "newest")
"""How a record is written that no other may join."""
_PATIENCE = 5.0
"""Seconds that a process which is about to end waits, in all, for Postgres to take what it alone knows."""
_ADOPTABLE_PATIENCE = 0.5
"""Seconds that it waits for records of jobs that are in Redis: a worker that starts one records it."""
_NAMED = 20
"""Ids of what was not written that are named, at most."""


class HostTracker:
    """The tracker of one source in one process; see jobguard.adapter.Tracker."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        store: Callable[[], HostStore],
        *,
        queues: frozenset[str] | None = None,
        client: Callable[[], redis.Redis] | None = None,
        spool: Spool | None = None,
    ) -> None:
        self.source = source
        self.settings = settings
        self.spool: Spool = self._memory_spool() if spool is None else spool
        self._make_store = store
        self._queues = queues
        self.client = client
        self._redis_health = None if client is None else RedisHealth(client)
        self._session: WorkerSession | None = None
        self._door: Door | None = None
        self._parent: ParentStore | None = None
        self._pid = 0
        self._refuses: str | None = None
        self.circuit: Circuit
        self._mine()

    # -- one process, one set of locks and connections --------------------------------------------

    def _mine(self) -> HostTracker:
        if self._pid != os.getpid():
            before = self.circuit if self._pid else None
            self._pid = os.getpid()
            self._store = self._new_store()
            self._registered = False
            self._warned = self._told_full = self._told_light = self._told_left = False
            self._patience = _PATIENCE
            self._registering = threading.Lock()
            self.circuit = Circuit(
                self._probe,
                retry_interval=self.settings.retry_interval,
                on_change=self._circuit_changed,
            )
            if before is not None:
                self.circuit.copy_state(before)
                # What waits in the parent's spool is the parent's to replay.
                self.spool = self._memory_spool()
                if self._parent is not None:
                    self.spool = ParentSpool(self._parent, self.spool)
            self._replay = Replay(
                self.source,
                self.spool,
                self.circuit,
                self._ready,
                retry_interval=self.settings.retry_interval,
                ended=self._ended,
            )
            timeout = self.settings.record_timeout
            self._commit = GroupCommit(self._write, timeout=timeout)
            self._claims = GroupCommit(self._write_claims, timeout=timeout)
            if self._redis_health is not None:
                self._redis_health.after_fork()
        return self

    def _memory_spool(self) -> MemorySpool:
        return MemorySpool(
            self.settings.spool_size,
            self._spool_changed,
            most_bytes=self.settings.spool_bytes,
            lightened=self._spool_lightened,
        )

    def _new_store(self) -> HostStore:
        """Return a store of this process; of a worker's child: one that leads through its worker."""
        door = self._door
        if door is None or door.pid == os.getpid():
            self._parent = None
            return self._make_store()
        patience = self.settings.record_timeout + self.settings.call_timeout
        self._parent = ParentStore(door, timeout=patience)
        return cast(HostStore, self._parent)

    def _probe(self) -> bool:
        return self._store.probe()

    def _circuit_changed(self, closed: bool) -> None:
        if closed:
            self._warned = False
            log_event("postgres_back", to_replay=self.spool.pending)
        else:
            log_event("postgres_away", error=self.circuit.why)

    def _ready(self) -> HostStore:
        """The store, made known to this source on the first call. Raises as the store does."""
        if self._refuses:
            raise WrongInstallation(self._refuses)
        if not self._registered:
            with self._registering:
                if not self._registered:
                    self._register()
        return self._store

    def _register(self) -> None:
        mine = self.settings.fingerprint()
        there = self._store.register(
            SourceRow(
                id=self.source.id,
                namespace=self.source.namespace,
                library=self.source.library,
                address=self.source.address,
                prefix=self.source.prefix,
                name=self.source.name,
                settings=mine,
                one_body=self.source.one_body,
            )
        )
        name = self._store.installation
        if self.settings.installation is not None and name != self.settings.installation:
            self._refuses = (
                f"the database is installation {name!r}, JOBGUARD_INSTALLATION says "
                f"{self.settings.installation!r}: nothing is written to it"
            )
            log_event("wrong_installation", has=name, wants=self.settings.installation)
            raise WrongInstallation(self._refuses)
        if there.settings != mine:
            log_event("settings_differ", source=str(self.source), here=mine, there=there.settings)
        self._registered = True

    def call(self, work: Callable[[HostStore], Any]) -> Any:
        """Make one call to the store, behind the circuit, after what still waits in the spool.

        Raises BreakerOpen, StoreUnavailable, BadRow, WrongInstallation.
        """
        self._mine()
        if len(self.spool):
            self.replay()
        with self.circuit.calling():
            return work(self._ready())

    def connect(self) -> None:
        """Reach Postgres now. Raises why it cannot be used."""
        self.call(lambda store: None)

    # -- producers ---------------------------------------------------------------------------------

    def guards(self, queue: str) -> bool:
        """Whether this queue is guarded; see Tracker."""
        return self._queues is None or queue in self._queues

    def guard_also(self, queues: frozenset[str] | None) -> None:
        """Guard these queues of the source as well; None: every queue."""
        if queues is None or self._queues is None:
            self._queues = None
        else:
            self._queues |= queues

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Commit before the push; see Tracker."""
        if not deliveries:
            return Recorded()
        self._mine()
        deliveries = _with_errors(deliveries)
        # Else a leader might push what its sender is told has failed.
        outbox = outbox and self._accepts
        try:
            if outbox or len(deliveries) > BATCH:
                recorded = self.call(lambda store: self._send(store, deliveries, outbox=outbox))
            else:
                recorded = self.call(lambda _store: self._commit.submit(deliveries))
        except BadRow as error:
            return self._record_alone(deliveries, error, outbox=outbox)
        except StoreUnavailable as error:
            if self.settings.when_postgres_down == "raise" and not any(map(_goes_on, deliveries)):
                if not isinstance(error, NotWritten):
                    self._cancel_unheard(error, deliveries)
                raise
            return self._overflow(deliveries, error)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log_event("record_lost", count=len(deliveries), error=str(error))
            self.spool.counts.lost += len(deliveries)
            return Recorded(lost=True)
        mine = frozenset(d.token for d in deliveries)
        return Recorded(refused=recorded.refused & mine, leader_live=recorded.leader_live)

    def _cancel_unheard(self, error: StoreUnavailable, deliveries: Sequence[Delivery]) -> None:
        """Their sender hears that they were not recorded, which they may be: then they are cancelled."""
        tokens = tuple(delivery.token for delivery in deliveries)
        if not self.spool.put([Cancelled(tokens, (), None)]):
            ids = ", ".join(delivery.job_id for delivery in deliveries)
            error.add_note(f"jobguard: it may be recorded all the same, and run: job {ids}")

    def _write(self, deliveries: Sequence[Delivery]) -> Recorded:
        if not self.circuit.closed:  # it opened while this batch stood in line: one wait is enough
            raise BreakerOpen
        return self._send(self._store, deliveries, outbox=False)

    def _send(self, store: HostStore, deliveries: Sequence[Delivery], *, outbox: bool) -> Recorded:
        return store.record(
            self.source.id,
            deliveries,
            namespace=self.source.namespace,
            outbox=outbox,
            relaxed=self.settings.durability == "relaxed",
        )

    def defer(
        self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]
    ) -> Callable[[], None] | None:
        """Within a batch, keep these until its end; see Tracker."""
        return batches.defer(self.source.id, deliveries, push)

    def batch(
        self,
        *,
        patience: float | None = None,
        first_at_once: bool = False,
        unheard: bool = False,
        apart: bool = False,
    ) -> AbstractContextManager[None]:
        """Record all that is sent inside in one statement; see Tracker."""
        recorder = safe_tracker(self)  # what is pushed at its end is an adapter's
        return batches.batch(
            self.source.id,
            recorder,
            patience,
            first_at_once=first_at_once,
            unheard=unheard,
            apart=apart,
        )

    def open_join(self, join: str, size: int, state: bytes = b"") -> Recorded:
        """Remember that a continuation waits for so many jobs; see Tracker."""
        return self._intend(JoinOpened(join, size, state), "open_join")

    def close_join(self, join: str) -> None:
        """Nothing will come of this join; see Tracker."""
        self._intend(JoinOpened(join, 0, closed=True), "close_join")

    def _record_alone(
        self, deliveries: Sequence[Delivery], error: BadRow, *, outbox: bool
    ) -> Recorded:
        """One of several is bad: find out which; the others shall not suffer for it."""
        if len(deliveries) == 1:
            self.spool.counts.quarantined += 1
            log_event("row_refused", job_id=deliveries[0].job_id, error=str(error))
            return Recorded(lost=True)
        parts: list[Recorded] = []
        for delivery in deliveries:
            try:
                parts.append(self.record([delivery], outbox=outbox))
            except StoreUnavailable as unheard:
                self._cancel_unheard(unheard, deliveries[: len(parts)])
                raise
        return Recorded(
            refused=frozenset().union(*(part.refused for part in parts)),
            leader_live=any(part.leader_live for part in parts),
            spooled=any(part.spooled for part in parts),
            lost=any(part.lost for part in parts),
        )

    def _overflow(self, entries: Sequence[Entry], error: Exception) -> Recorded:
        if self.settings.when_postgres_down == "skip":
            self.spool.counts.lost += len(entries)
            log_event("record_skipped", count=len(entries))
            return Recorded(lost=True)
        if self.spool.put(entries):
            self._tell_once(error)
            return Recorded(spooled=True)
        self.tell_full(len(entries))
        return Recorded(lost=True)

    def tell_full(self, count: int) -> None:
        """Say that entries find no room in the spool, once until it is empty again."""
        if not self._told_full:
            self._told_full = True
            log_event(
                "spool_full",
                entries=self.spool.pending,
                bytes=self.spool.size,
                count=count,
                lost=self.spool.counts.lost,
            )

    def _spool_lightened(self, count: int) -> None:
        if not self._told_light:
            self._told_light = True
            log_event("spool_lightened", count=count, bytes=self.spool.size)

    def _tell_once(self, error: Exception) -> None:
        """One line an outage: a busy producer would otherwise fill its log with them."""
        if self._warned:
            return
        self._warned = True
        if isinstance(error, NotMigrated):
            log_event("not_migrated", error=str(error))
        elif isinstance(error, NoRights):
            log_event("no_rights", error=str(error))
        else:
            log_event("record_spooled", error=str(error))

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Take back what was surely not pushed; see Tracker."""
        tokens = [d.token for d in deliveries]
        self.spool.remove(tokens)
        self._quietly("withdraw", lambda store: store.withdraw(self.source.id, tokens))

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """The leader shall see to the push; see Tracker."""
        # If this fails, the sweep finds the deliveries absent all the same, only later.
        self._quietly("outbox", lambda store: store.outbox(self.source.id, tokens))

    def broker_in_doubt(self) -> bool:
        """Whether Redis did not answer a moment ago; see Tracker."""
        self._mine()
        return self._redis_health is not None and self._redis_health()

    def broker_failed(self) -> None:
        """Redis just failed the host; see Tracker."""
        if self._redis_health is not None:
            self._redis_health.failed()

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """Whether a recorded job may be accepted although Redis is away; see Tracker."""
        return self._accepts and recorded.leader_live and not recorded.refused and not recorded.lost

    @property
    def _accepts(self) -> bool:
        return self.settings.when_redis_down == "accept" and self.settings.mode == "guard"

    def cancel(
        self,
        *,
        tokens: Sequence[UUID] = (),
        job_ids: Sequence[str] = (),
        queue: str | None = None,
    ) -> None:
        """Write the tombstones before Redis forgets; see Tracker."""
        self._mine()  # a parent's spool, which a child must not ask, is the parent's
        waiting = self.spool.waiting(job_ids, queue)
        self._intend(Cancelled(tuple(tokens), tuple(job_ids), queue, waiting), "cancel")

    def amend(self, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change what an owed delivery is put back as; see Tracker."""
        try:
            return bool(self.call(lambda store: store.amend(self.source.id, token, change)))
        except BreakerOpen:
            return False  # that has been said
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            log_event("not_written", what="amend", error=str(failure))
            return False

    def _intend(self, entry: Cancelled | JoinOpened, what: str) -> Recorded:
        try:
            recorded: Recorded = self.call(
                lambda store: write_cancellation(store, self.source, entry)
            )
            if isinstance(entry, Cancelled) and self.spool.pending:
                # Its record may still wait there: the intent must come after it as well.
                self.spool.put([entry])
            return recorded
        except StoreUnavailable as error:
            if self.settings.when_postgres_down == "raise":
                raise
            return self._overflow([entry], error)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log_event("guest_failed", where=what, error=str(error))
            return Recorded(lost=True)

    def heartbeat(
        self,
        job_id: str,
        *,
        token: UUID | None = None,
        number: int | None = None,
        progress: float | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Note a running job's progress; unknown ids are ignored."""
        return bool(
            self._quietly(
                "heartbeat",
                lambda store: store.heartbeat(
                    self.source.id,
                    job_id=job_id,
                    token=token,
                    number=number,
                    progress=progress,
                    attrs=attrs,
                ),
            )
        )

    def predecessor(self, token: UUID) -> UUID | None:
        """The worker whose claim of this delivery was taken away last; see Tracker."""
        source = self.source.id
        found: UUID | None = self._quietly(
            "predecessor", lambda store: store.predecessor(source, token)
        )
        return found

    def lock(self, name: str, claim: Claim) -> bool:
        """Take a lock in the name of this claim; see Tracker."""
        source = self.source.id
        return bool(
            self._quietly(
                "lock",
                lambda store: store.lock(source, name, token=claim.token, number=claim.number),
            )
        )

    def unlock(self, name: str, claim: Claim) -> None:
        """Let go of a lock of this claim; see Tracker."""
        # If this fails, the lock ends with the claim.
        source = self.source.id
        self._quietly("unlock", lambda store: store.unlock(source, name, token=claim.token))

    def recovers(self, tokens: Sequence[UUID], *, began: bool = True) -> frozenset[UUID] | None:
        """Which of these the leader brings back if their run was killed; see Tracker."""
        wanted = self.settings.recover_killed or not began
        if not (tokens and wanted and self.settings.mode == "guard"):
            return frozenset()
        source = self.source.id
        found: frozenset[UUID] | None = self._quietly(
            "recovers",
            lambda store: store.recoverable(source, tokens),
        )
        return found

    def tombstones(self, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome] | None:
        """How these have ended; see Tracker."""
        if not tokens:
            return {}
        found: Mapping[UUID, Outcome] | None = self._quietly(
            "tombstones", lambda store: store.tombstones(self.source.id, tokens)
        )
        return found

    def _quietly(self, what: str, work: Callable[[HostStore], Any]) -> Any:
        try:
            return self.call(work)
        except JobguardError as error:
            log_event("not_written", what=what, error=str(error))
            return None
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log_event("guest_failed", where=what, error=str(error), exc_info=True)
            return None

    # -- workers -----------------------------------------------------------------------------------

    @property
    def mends_library(self) -> bool:
        """Whether faults of the library itself may be mended; see Tracker."""
        return self.settings.mend_library and self.settings.mode == "guard"

    def open_session(
        self,
        *,
        name: str,
        queues: Sequence[str],
        lists: Callable[[], Iterable[UUID]] | None = None,
        apart: bool = False,
        serves: bool = False,
    ) -> WorkerSession:
        """Begin to beat as a worker; see Tracker."""
        if self._session is None or not self._session.is_mine or self._session.closed:
            if serves and hasattr(socket, "send_fds") and not os_threads.is_patched():
                self._serve_children()
            self._session = WorkerSession(
                self, self._new_store(), name=name, queues=queues, lists=lists, apart=apart
            )
            self._session.open()
        return self._session

    def _serve_children(self) -> None:
        if self._door is None or self._door.pid != os.getpid():
            self._door = Door(self)
            self._door.open()
            if self._parent is not None:  # a child of a worker that becomes a worker itself
                self._store, self._registered = self._new_store(), False

    def for_child(self, name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Make a call that a child of this worker asks for, together with what others ask."""
        if name == "end":
            return [] if self._session is None else self._session.take(arguments[1])
        if name == "spool":
            return self.spool.put(*arguments)
        if name == "probe":
            return self.circuit.check()
        if name == "register":
            return self.call(lambda store: (store.register(*arguments), store.installation))
        if name == "claim":
            return self.claim(arguments[1])
        if name == "claims":
            return {request.nonce: self.claim(request) for request in arguments[1]}
        if name == "record" and not any(options.get(how) for how in _OF_ITS_OWN):
            return self.call(lambda _store: self._commit.submit(arguments[1]))
        return self.call(lambda store: getattr(store, name)(*arguments, **options))

    def inherit_session(
        self, worker: UUID, pid: int, *, name: str, queues: Sequence[str]
    ) -> WorkerSession:
        """Speak for the worker that spawned this process; see Tracker."""
        before = self._session
        self._session = WorkerSession(
            self, self._new_store(), name=name, queues=queues, inherited=(worker, pid)
        )
        if before is not None:
            self._session.share(before)
        return self._session

    def end(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Commit ends. Raises as the store does; what waits in the spool goes first."""
        self._mine()
        if self._parent is not None:  # which takes them also while Postgres is away
            return self._parent.end(self.source.id, ends)
        answers: Sequence[Ended] = self.call(lambda store: store.end(self.source.id, ends))
        for end, answer in zip(ends, answers, strict=True):
            if answer is Ended.LATE and end.outcome is not Outcome.CANCELLED:
                log_event(
                    "end_late", job_id=end.job_id, outcome=end.outcome.value, number=end.number
                )
        return answers

    def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Ask for a claim, together with what other threads ask for. Raises as the store does."""
        answers: Mapping[UUID, ClaimAnswer] = self.call(
            lambda _store: self._claims.submit([request])
        )
        return answers[request.nonce]

    def _write_claims(self, requests: Sequence[ClaimRequest]) -> Mapping[UUID, ClaimAnswer]:
        if not self.circuit.closed:  # it opened while these stood in line: one wait is enough
            raise BreakerOpen
        if len(requests) == 1:
            return {requests[0].nonce: self._store.claim(self.source.id, requests[0])}
        return self._store.claims(self.source.id, requests)

    # -- the spool ---------------------------------------------------------------------------------

    def _spool_changed(self) -> None:
        """Tell the worker whose child this is; and see to it that all is written, tasks or none."""
        session = self._session
        if session is not None and not session.is_mine:
            session.waits(self.spool.oldest())
        if not self.spool.pending:
            if self._told_full or self._told_light:
                log_event("spool_has_room", lost=self.spool.counts.lost)
            self._told_full = self._told_light = False
        elif session is None or not session.is_mine or session.closed:
            self._replay.drain()

    def spooled(self) -> Mapping[str, int]:
        """What this process keeps that Postgres does not have, and what became of the rest."""
        counts = asdict(self.spool.counts)
        aside = len(self.spool.aside())
        return {"waiting": len(self.spool), "aside": aside, "bytes": self.spool.size, **counts}

    def _ended(self, ends: Sequence[End]) -> None:
        if self._session is not None:
            self._session.ended(ends)

    def replay(self, limit: int = BATCH) -> int:
        """Give Postgres what waits in the spool, oldest first; returns how many entries it took."""
        return self._mine()._replay.some(limit)

    @property
    def push_deadline(self) -> float:
        """Seconds after its record in which a producer may push; see Tracker."""
        return self.settings.push_deadline

    def drain_spool(self, *, last: bool = False) -> None:
        """Write what waits, within the time of one record; see Tracker.

        ``last``: this is the end of the process, which waits as long as it has patience left.
        """
        self._mine()
        if not last:
            self._replay.drain_for(self.settings.record_timeout)
            return
        began = time.monotonic()
        patience = self._patience
        if self.spool.only_adoptable():
            patience = min(patience, _ADOPTABLE_PATIENCE)
        self._replay.drain_for(patience)
        self._patience -= min(self._patience, time.monotonic() - began)
        left = self.spool.left()
        if left and not self._told_left:
            self._told_left = True
            ids = [id for id in (getattr(entry, "job_id", "") for entry in left) if id]
            log_event(
                "spool_left", count=len(left), job_ids=ids[:_NAMED], aside=len(self.spool.aside())
            )

    def close(self) -> None:
        """Write what waits, in bounded time, and let go."""
        self._mine()
        if self._session is not None and self._session.is_mine:
            self._session.close()
        if self._door is not None and self._door.pid == os.getpid():
            self._door.close()
        self.drain_spool(last=True)
        self._store.close()


def _with_errors(deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
    """Say why the runs failed that these take the place of: libraries retry while they handle that."""
    failure = sys.exception()
    if failure is None or not any(delivery.parent for delivery in deliveries):
        return deliveries
    try:
        error = redact(f"{type(failure).__name__}: {failure}")
    except Exception:  # its words are the user's code
        error = type(failure).__name__
    return [
        replace(one, parent=replace(one.parent, error=error))
        if one.parent is not None and one.parent.error is None
        else one
        for one in deliveries
    ]


def _goes_on(delivery: Delivery) -> bool:
    """Whether a run sends it: if that is refused, nothing sends it again."""
    return delivery.parent is not None or delivery.derived
