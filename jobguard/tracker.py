"""The tracker: everything a host process tells the ledger passes through here.

A job's road: the adapter hands over a delivery, ``record`` commits it (group commit, behind the
circuit), and only then does the library push. While Postgres is away, what could not be written goes
into the spool, and back from there, in order, when the circuit closes. Nothing in here lets an
exception of ours reach the host, unless the user asked for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from uuid import UUID

import redis

from jobguard import batch as batches
from jobguard.adapter import Source
from jobguard.circuit import Circuit
from jobguard.commit import GroupCommit
from jobguard.doubt import Doubt
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
from jobguard.guest import well_behaved
from jobguard.job import ClaimAnswer, Delivery, End, Ended, Outcome, Recorded
from jobguard.log import say
from jobguard.replay import BATCH, Replay, write_intent
from jobguard.session import WorkerSession
from jobguard.settings import Settings
from jobguard.spool import Cancelled, Entry, JoinOpened, MemorySpool, Spool
from jobguard.store import Ask, HostStore, SourceRow

_PATIENCE = 5.0
"""Seconds that a process which is about to end waits, in all, for Postgres to take what it alone knows."""


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
        if spool is None:
            spool = MemorySpool(settings.spool_size, self._spool_changed)
        self.spool: Spool = spool
        self._make_store = store
        self._queues = queues
        self.client = client
        self._doubt = None if client is None else Doubt(client)
        self._session: WorkerSession | None = None
        self._pid = 0
        self._refuses: str | None = None
        self.circuit: Circuit
        self._mine()

    # -- one process, one set of locks and connections --------------------------------------------

    def _mine(self) -> HostTracker:
        if self._pid != os.getpid():
            before = self.circuit if self._pid else None
            self._pid = os.getpid()
            self._store = self._make_store()
            self._registered = False
            self._told = False
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
                self.spool = MemorySpool(self.settings.spool_size, self._spool_changed)
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
            if self._doubt is not None:
                self._doubt.after_fork()
        return self

    def _probe(self) -> bool:
        return self._store.probe()

    def _circuit_changed(self, closed: bool) -> None:
        if closed:
            self._told = False
            say("postgres_back", to_replay=len(self.spool))
        else:
            say("postgres_away", error=self.circuit.why)

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
            say("wrong_installation", has=name, wants=self.settings.installation)
            raise WrongInstallation(self._refuses)
        if there.settings != mine:
            say("settings_differ", source=str(self.source), here=mine, there=there.settings)
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
            say("record_lost", count=len(deliveries), error=str(error))
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

    def hold(
        self, deliveries: Sequence[Delivery], push: Callable[[Recorded], None]
    ) -> Callable[[], None] | None:
        """Within a batch, keep these until its end; see Tracker."""
        return batches.hold(self.source.id, deliveries, push)

    def batch(
        self,
        *,
        patience: float | None = None,
        first_at_once: bool = False,
        unheard: bool = False,
        apart: bool = False,
    ) -> AbstractContextManager[None]:
        """Record all that is sent inside in one statement; see Tracker."""
        recorder = well_behaved(self)  # what is pushed at its end is an adapter's
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
            say("row_refused", job_id=deliveries[0].job_id, error=str(error))
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
            say("record_skipped", count=len(entries))
            return Recorded(lost=True)
        if self.spool.put(entries):
            self._tell_once(error)
            return Recorded(spooled=True)
        say("spool_full", size=self.settings.spool_size, count=len(entries), error=str(error))
        return Recorded(lost=True)

    def _tell_once(self, error: Exception) -> None:
        """One line an outage: a busy producer would otherwise fill its log with them."""
        if self._told:
            return
        self._told = True
        if isinstance(error, NotMigrated):
            say("not_migrated", error=str(error))
        elif isinstance(error, NoRights):
            say("no_rights", error=str(error))
        else:
            say("record_spooled", error=str(error))

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
        return self._doubt is not None and self._doubt()

    def broker_failed(self) -> None:
        """Redis just failed the host; see Tracker."""
        if self._doubt is not None:
            self._doubt.failed()

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

    def _intend(self, entry: Cancelled | JoinOpened, what: str) -> Recorded:
        try:
            recorded: Recorded = self.call(lambda store: write_intent(store, self.source, entry))
            if isinstance(entry, Cancelled) and len(self.spool):
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
            say("guest_failed", where=what, error=str(error))
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
            say("not_written", what=what, error=str(error))
            return None
        except Exception as error:
            if is_host_interrupt(error):
                raise
            say("guest_failed", where=what, error=str(error), exc_info=True)
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
    ) -> WorkerSession:
        """Begin to beat as a worker; see Tracker."""
        if self._session is None or not self._session.is_mine or self._session.closed:
            self._session = WorkerSession(
                self, self._make_store(), name=name, queues=queues, lists=lists, apart=apart
            )
            self._session.open()
        return self._session

    def inherit_session(
        self, worker: UUID, pid: int, *, name: str, queues: Sequence[str]
    ) -> WorkerSession:
        """Speak for the worker that spawned this process; see Tracker."""
        before = self._session
        self._session = WorkerSession(
            self, self._make_store(), name=name, queues=queues, inherited=(worker, pid)
        )
        if before is not None:
            self._session.share(before)
        return self._session

    def end(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Commit ends. Raises as the store does; what waits in the spool goes first."""
        answers: Sequence[Ended] = self.call(lambda store: store.end(self.source.id, ends))
        for end, answer in zip(ends, answers, strict=True):
            if answer is Ended.LATE:
                say("end_late", job_id=end.job_id, outcome=end.outcome.value, number=end.number)
        return answers

    def claim(self, ask: Ask) -> ClaimAnswer:
        """Ask for a claim, together with what other threads ask for. Raises as the store does."""
        answers: Mapping[UUID, ClaimAnswer] = self.call(lambda _store: self._claims.submit([ask]))
        return answers[ask.nonce]

    def _write_claims(self, asks: Sequence[Ask]) -> Mapping[UUID, ClaimAnswer]:
        if not self.circuit.closed:  # it opened while these stood in line: one wait is enough
            raise BreakerOpen
        if len(asks) == 1:
            return {asks[0].nonce: self._store.claim(self.source.id, asks[0])}
        return self._store.claims(self.source.id, asks)

    # -- the spool ---------------------------------------------------------------------------------

    def _spool_changed(self) -> None:
        """Tell the worker whose child this is; and see to it that all is written, tasks or none."""
        session = self._session
        if session is None or session.is_mine:
            return
        session.waits(self.spool.oldest())
        if len(self.spool):
            self._replay.drain()

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

    def settle(self, *, last: bool = False) -> None:
        """Write what waits, within the time of one record; see Tracker.

        ``last``: this is the end of the process, which waits as long as it has patience left.
        """
        self._mine()
        began = time.monotonic()
        patience = self._patience if last else self.settings.record_timeout
        self._replay.settle(patience)
        if last:
            self._patience -= min(patience, time.monotonic() - began)
        if len(self.spool):
            say("spool_left", count=len(self.spool))

    def close(self) -> None:
        """Write what waits, in bounded time, and let go."""
        self._mine()
        if self._session is not None and self._session.is_mine:
            self._session.close()
        self.settle(last=True)
        self._store.close()


def _goes_on(delivery: Delivery) -> bool:
    """Whether a run sends it: if that is refused, nothing sends it again."""
    return delivery.parent is not None or delivery.derived
