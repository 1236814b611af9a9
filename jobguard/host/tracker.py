"""The tracker: all reports of a host process to the ledger pass through this module.

The path of a job: the adapter passes a delivery, ``record`` commits it (group commit, behind the
circuit), and only then does the library push it. While Postgres is away, entries that could not be
written go into the spool. When the circuit closes, they are written from the spool in order. No
exception of jobguard reaches the host, unless the user asked for it.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import redis

from jobguard import job_keys, os_threads
from jobguard.adapter import Source
from jobguard.errors import (
    BadRow,
    BreakerOpen,
    JobguardError,
    KeyHeld,
    NoRights,
    NotMigrated,
    NotWritten,
    StoreUnavailable,
    WrongInstallation,
    is_host_interrupt,
)
from jobguard.fork import OwnerProcess
from jobguard.host import batch as batches
from jobguard.host.circuit import Circuit
from jobguard.host.group_commit import GroupCommit
from jobguard.host.parent import Door, ParentSpool, ParentStore
from jobguard.host.redis_health import RedisHealth
from jobguard.host.replay import BATCH, Replay, write_cancellation, write_late
from jobguard.host.spool import (
    Cancelled,
    Entry,
    JoinOpened,
    MemorySpool,
    Released,
    Spool,
    Unsent,
    depends_on_order,
)
from jobguard.host.stream import Notes, ReportStream
from jobguard.host_safety import contain_errors, safe_tracker
from jobguard.log import log_event
from jobguard.model import (
    Beside,
    Claim,
    ClaimAnswer,
    Delivery,
    End,
    Ended,
    Outcome,
    Recorded,
)
from jobguard.pulse import parse_pulse, read_pulse
from jobguard.redact import redact
from jobguard.sealing import Sealer
from jobguard.settings import Settings
from jobguard.store import texts
from jobguard.store.protocols import ClaimRequest, HostStore, SourceRow

if TYPE_CHECKING:
    from jobguard.host.session import WorkerSession

_UNSHARED = ("outbox", "replay", "newest")
"""The options of a record that cannot share a group commit."""
_PATIENCE = 5.0
"""Seconds that a process waits in all, before it ends, for Postgres to take its reports."""
_ADOPTABLE_PATIENCE = 0.5
"""Seconds that it waits for records of jobs that are in Redis: a worker that starts one records it."""
_UNHEARD = 1.0
"""Seconds without an answer of Postgres after which an outage may have passed unseen."""
_COMPARE_AGAIN = 15.0
"""Seconds until a pulse that was not in Redis is looked for again."""
_MOST_IDS = 20
"""The maximum number of unwritten job ids in a log line."""


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
        self._make_store = store
        self._queues = queues
        self.client = client
        self._redis_health = None if client is None else RedisHealth(client)
        self.stream = self._new_stream()
        self.spool: Spool = self._memory_spool() if spool is None else spool
        self._session: WorkerSession | None = None
        self._door: Door | None = None
        self._parent: ParentStore | None = None
        self._refusal: str | None = None
        self._installation: str | None = None
        self.circuit: Circuit
        self._owner = OwnerProcess()
        self._start()

    # -- one process, one set of locks and connections --------------------------------------------

    def _mine(self) -> HostTracker:
        self._owner.take_over(lambda: self._start(parent_circuit=self.circuit))
        return self

    def _start(self, parent_circuit: Circuit | None = None) -> None:
        """Make the parts that a forked child must not share with its parent."""
        self._sealer = Sealer(self.settings.encrypt)
        self.seal = self._sealer.seal
        self._store = self._new_store()
        self._registered = self._asked_others = False
        self._pulse_missed = False
        self._compare_at = 0.0
        self._warned = self._logged_full = self._logged_light = self._logged_left = False
        self._patience = _PATIENCE
        self._reports_may_wait = self._parent is None
        self._led = False  # by the last record
        self._beside_until = 0.0
        self._registering = threading.Lock()
        self.circuit = Circuit(
            self._probe,
            retry_interval=self.settings.retry_interval,
            on_change=self._circuit_changed,
        )
        if parent_circuit is not None:
            self.circuit.copy_state(parent_circuit)
            # The parent replays the entries of its own spool.
            self.stream = self._new_stream()
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
            stream=self.stream,
        )
        timeout = self.settings.record_timeout
        self._commit = GroupCommit(self._write, timeout=timeout)
        self._claims = GroupCommit(self._write_claims, timeout=timeout)
        if self._redis_health is not None:
            self._redis_health.after_fork()

    def _memory_spool(self) -> MemorySpool:
        return MemorySpool(
            self.settings.spool_size,
            self._spool_changed,
            most_bytes=self.settings.spool_bytes,
            lightened=self._spool_lightened,
            stream=self.stream,
            left_to_stream=self._left_to_stream,
        )

    def _new_stream(self) -> ReportStream | None:
        if self.client is None or self._redis_health is None:
            return None
        health = self._redis_health
        return ReportStream(
            self.source,
            self.client,
            bound=self.settings.stream_bytes,
            settings=self.settings.fingerprint(),
            away=health.is_known_away,
            failed=health.failed,
        )

    def _left_to_stream(self, entries: Sequence[Entry]) -> None:
        self._ended([entry for entry in entries if isinstance(entry, End)])

    def _new_store(self) -> HostStore:
        """Return a store of this process; in a worker's child, a store that calls the worker."""
        door = self._door
        if door is None or door.owner.is_current:
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
            if self.stream is not None and self._parent is None:
                self.stream.postgres_is_back()
        else:
            self._reports_may_wait = True
            log_event("postgres_away", error=self.circuit.why)

    def _ready(self) -> HostStore:
        """Return the store, and register this source on the first call. Raises as the store does."""
        if self._refusal:
            raise WrongInstallation(self._refusal)
        if not self._registered:
            with self._registering:
                if not self._registered:
                    self._register()
        return self._store

    def _row(self) -> SourceRow:
        return SourceRow(
            id=self.source.id,
            namespace=self.source.namespace,
            library=self.source.library,
            address=self.source.address,
            prefix=self.source.prefix,
            name=self.source.name,
            settings=self.settings.fingerprint(),
            one_body=self.source.one_body,
            serializer=self.source.serializer,
        )

    def _register(self) -> None:
        row = self._row()
        there = self._store.register(row)
        name = self._store.installation
        if self.settings.installation is not None and name != self.settings.installation:
            self._refusal = (
                f"the database is installation {name!r}, JOBGUARD_INSTALLATION says "
                f"{self.settings.installation!r}: nothing is written to it"
            )
            log_event("wrong_installation", has=name, wants=self.settings.installation)
            raise WrongInstallation(self._refusal)
        if there.settings != row.settings:
            settings = {"here": row.settings, "there": there.settings}
            log_event("settings_differ", source=str(self.source), **settings)
        self._registered = True

    def _compare_pulse(self) -> None:
        """Log if the reconciler inspects another Redis for this source; a worker tells it by its beats."""
        self._compare_at = float("inf")
        if self.client is None or self._session is not None or self._parent is not None:
            return
        with contain_errors("compare the pulse"), suppress(JobguardError):
            there = self.call(lambda store: store.register(self._row()))
            if not self._is_compared(there.pulse_epoch):
                self._compare_at = time.monotonic() + _COMPARE_AGAIN

    def _is_compared(self, epoch: UUID | None) -> bool:
        """Compare the pulse in this Redis; return False to look again later.

        ``epoch``: that of the pulse in the reconciler's Redis. A pulse that was just lost is made again at
        once, so that only a second look decides.
        """
        assert self.client is not None
        if self._redis_health is None or self._redis_health.is_known_away():
            return False
        try:
            with closing(self.client()) as client:
                pulse = parse_pulse(read_pulse(client, self.source))
        except redis.RedisError:
            return False
        if pulse is not None and pulse.source != self.source.id:
            log_event("source_differs", source=str(self.source))
        elif epoch is not None and (pulse is None or pulse.epoch != epoch):
            if not (self._pulse_missed and self._led):
                self._pulse_missed = True
                return False
            log_event(
                "pulse_elsewhere", source=str(self.source), redis=self.source.address, epoch=epoch
            )
        return True

    def call(self, work: Callable[[HostStore], Any]) -> Any:
        """Make one call to the store, behind the circuit, after the entries that wait in the spool.

        Raises BreakerOpen, StoreUnavailable, BadRow, WrongInstallation.
        """
        self._mine()
        self._ask_others()
        if len(self.spool):
            self.replay()
        with self.circuit.calling():
            return work(self._ready())

    def _ask_others(self) -> None:
        """Before the first call, learn from other processes of this host that Postgres is away.

        Otherwise each script and each short-lived worker would wait to find it out.
        """
        if self._asked_others or self._registered:
            return
        self._asked_others = True
        if self._parent is None and self.stream is not None and self.stream.postgres_is_away():
            self.circuit.open()

    def connect(self) -> None:
        """Reach Postgres now. Raises the reason why it cannot be used."""
        self.call(lambda store: None)

    # -- producers ---------------------------------------------------------------------------------

    def guards(self, queue: str) -> bool:
        """Return True if this queue is guarded; see Tracker."""
        return self._queues is None or queue in self._queues

    def guard_also(self, queues: frozenset[str] | None) -> None:
        """Guard these queues of the source as well; None means every queue."""
        if queues is None or self._queues is None:
            self._queues = None
        else:
            self._queues |= queues

    def record(self, deliveries: Sequence[Delivery], *, outbox: bool = False) -> Recorded:
        """Commit deliveries before their push; see Tracker."""
        if not deliveries:
            return Recorded()
        self._mine()
        if any(one.parent is None and one.closes is None for one in deliveries):
            batches.refuse(self.source.id, f"job {deliveries[0].job_id}")
        if any(map(_is_keyed, deliveries)):
            return self._record_keyed(self._with_rules(deliveries))
        deliveries = self._with_rules(_with_errors(deliveries))
        ended = self._ended_before(deliveries)
        if ended:
            left = [one for one in deliveries if one.token not in ended]
            recorded = self.record(left, outbox=outbox)
            return replace(recorded, refused=recorded.refused | ended)
        # Otherwise a leader might push a delivery whose sender receives an error.
        outbox = outbox and self._accepts

        def work() -> Recorded:
            recorded: Recorded
            if outbox or len(deliveries) > BATCH:
                recorded = self.call(lambda store: self._send(store, deliveries, outbox=outbox))
            else:
                recorded = self.call(lambda _store: self._commit.submit(deliveries))
            return recorded

        return self._recorded(deliveries, work, outbox=outbox)

    def _ended_before(self, deliveries: Sequence[Delivery]) -> frozenset[UUID]:
        """Return what must not be pushed: a report in the stream has cancelled or replaced its parent."""
        replacing = [one for one in deliveries if one.parent is not None]
        if not replacing or self.settings.mode != "guard" or not self.reports_may_wait:
            return frozenset()
        return frozenset(one.token for one in replacing if self.notes_of(one).outcome is not None)

    def _with_rules(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Add the rules of their tasks, which the reconciler finds in the ledger alone."""
        rule = self.settings.recover_rule
        if not self.settings.recover:
            return deliveries
        return [replace(one, recover=rule(one.task)) for one in deliveries]

    def record_beside(self, deliveries: Sequence[Delivery]) -> Beside | None:
        """Send a record whose commit and push can overlap; see Tracker."""
        self._mine()
        now = time.monotonic()
        if (
            len(deliveries) != 1
            # Callers that come meanwhile share the next commit.
            or now < self._beside_until
            or not self._commit.is_idle
            or self.settings.when_postgres_down == "raise"
            or self._parent is not None
            or not (self._registered and self.circuit.closed)
            or len(self.spool)
            or batches.is_open(self.source.id)
            or not self._with_rules(deliveries)[0].is_plain
        ):
            return None
        self._beside_until = now + self.settings.record_timeout
        try:
            with self.circuit.calling():
                read = self._ready().record_beside(
                    self.source.id,
                    deliveries[0],
                    namespace=self.source.namespace,
                    relaxed=self.settings.durability == "relaxed",
                )
        except JobguardError:  # nothing is pushed yet: the caller records first, and sees the error
            self._beside_until = 0.0
            return None

        def work() -> Recorded:
            try:
                with self.circuit.calling():
                    return read()
            finally:
                self._beside_until = 0.0

        return Beside(
            Recorded(leader_live=self._led), lambda: self._recorded(deliveries, work, outbox=False)
        )

    def _recorded(
        self, deliveries: Sequence[Delivery], work: Callable[[], Recorded], *, outbox: bool
    ) -> Recorded:
        """Return the result of a record; the spool takes what Postgres does not take."""
        try:
            recorded = work()
        except BadRow as error:
            return self._record_alone(deliveries, error, outbox=outbox)
        except StoreUnavailable as error:
            if self.settings.when_postgres_down == "raise" and not any(map(_goes_on, deliveries)):
                if not isinstance(error, NotWritten):
                    self._cancel_unanswered(error, deliveries)
                raise
            return self._overflow(deliveries, error)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log_event("record_lost", count=len(deliveries), error=str(error))
            self.spool.counts.lost += len(deliveries)
            return Recorded(lost=True)
        self._led = recorded.leader_live
        if time.monotonic() >= self._compare_at:
            self._compare_pulse()
        if not recorded.refused:
            return recorded
        mine = frozenset(d.token for d in deliveries)
        return Recorded(refused=recorded.refused & mine, leader_live=recorded.leader_live)

    def _record_keyed(self, deliveries: Sequence[Delivery]) -> Recorded:
        """Record deliveries of which some have keys. Without Postgres, their senders get an error."""
        refused: set[UUID] = set()
        led = False
        for one in deliveries:
            if not _is_keyed(one):
                recorded = self.record([one])
                refused |= recorded.refused
                led = recorded.leader_live
                continue
            assert one.rule is not None
            try:
                verdict, holder, led = self.call(
                    partial(_send_keyed, self.source, one, self.push_deadline)
                )
            except (BadRow, WrongInstallation) as error:
                # Without a record nothing holds the key: it must not be pushed.
                raise NotWritten(str(error)) from error
            taken = verdict in ("free", "replaced")
            if not taken and one.rule.on_conflict == "raise":
                held = f"held by job {holder}" if holder else "throttled after an earlier job"
                raise KeyHeld(f"the key {one.rule.key!r} is {held}")
            job_keys.report(sent=taken, job_id=one.job_id if taken else holder)
            if not taken:
                refused.add(one.token)
                log_event("key_held", job_id=one.job_id, key=one.rule.key, holder=holder)
        return Recorded(refused=frozenset(refused), leader_live=led)

    def _cancel_unanswered(self, error: StoreUnavailable, deliveries: Sequence[Delivery]) -> None:
        """Cancel deliveries that may be recorded although their sender receives an error."""
        tokens = tuple(delivery.token for delivery in deliveries)
        if not self.spool.put([Cancelled(tokens, (), None)]):
            ids = ", ".join(delivery.job_id for delivery in deliveries)
            error.add_note(f"jobguard: it may still be recorded, and run: job {ids}")

    def _write(self, deliveries: Sequence[Delivery]) -> Recorded:
        if not self.circuit.closed:  # it opened while this batch waited: one wait is enough
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
        """Keep these until the end of the batch, if there is one; see Tracker."""
        return batches.defer(self.source.id, self._with_rules(deliveries), push)

    def batch(
        self,
        *,
        patience: float | None = None,
        first_at_once: bool = False,
        unheard: bool = False,
        apart: bool = False,
    ) -> AbstractContextManager[None]:
        """Record in one statement all that is sent inside the block; see Tracker."""
        tracker = safe_tracker(self)  # the pushes at its end are an adapter's
        return batches.batch(
            self.source.id,
            tracker,
            patience,
            first_at_once=first_at_once,
            unheard=unheard,
            apart=apart,
        )

    def open_join(self, join: str, size: int, state: bytes = b"") -> Recorded:
        """Record that a continuation waits for this many jobs; see Tracker."""
        batches.refuse(self.source.id, "a group of jobs with a continuation")
        return self._record_intent(JoinOpened(join, size, state), "open_join")

    def close_join(self, join: str) -> None:
        """Close a join that will not continue; see Tracker."""
        self._record_intent(JoinOpened(join, 0, closed=True), "close_join")

    def _record_alone(
        self, deliveries: Sequence[Delivery], error: BadRow, *, outbox: bool
    ) -> Recorded:
        """Find the bad one among several deliveries, and record the others."""
        if len(deliveries) == 1:
            self.spool.counts.quarantined += 1
            log_event("row_refused", job_id=deliveries[0].job_id, error=str(error))
            return Recorded(lost=True)
        parts: list[Recorded] = []
        for delivery in deliveries:
            try:
                parts.append(self.record([delivery], outbox=outbox))
            except StoreUnavailable as unanswered:
                self._cancel_unanswered(unanswered, deliveries[: len(parts)])
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
            self._log_once(error)
            return Recorded(spooled=True)
        self.log_full_spool(len(entries))
        return Recorded(lost=True)

    def log_full_spool(self, count: int) -> None:
        """Log that entries find no room in the spool, once until it is empty again."""
        if not self._logged_full:
            self._logged_full = True
            log_event(
                "spool_full",
                entries=self.spool.pending,
                bytes=self.spool.size,
                count=count,
                lost=self.spool.counts.lost,
            )

    def _spool_lightened(self, count: int) -> None:
        if not self._logged_light:
            self._logged_light = True
            log_event("spool_lightened", count=count, bytes=self.spool.size)

    def _log_once(self, error: Exception) -> None:
        """Log one line per outage: otherwise a busy producer would fill its log."""
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
        """Withdraw deliveries that were surely not pushed; see Tracker."""
        tokens = [d.token for d in deliveries]
        surely_removed = self.forget_spooled(tokens)
        withdrawn = self._try_call("withdraw", lambda store: self._withdraw(store, tokens))
        if surely_removed or withdrawn:
            return
        # A record may be in the stream, for the leader to write. A derived delivery gets no tombstone:
        # the run that sends it may send it again under the same token.
        final = tuple(d.token for d in deliveries if not d.derived)
        if final:
            self.spool.put([Cancelled(final, (), None)])

    def _withdraw(self, store: HostStore, tokens: Sequence[UUID]) -> bool:
        store.withdraw(self.source.id, tokens)
        return True

    def installation_id(self) -> str:
        """Return the identity of the ledger. Raises StoreUnavailable or a subclass."""
        self._mine()
        if self._installation is None:
            self._installation = self.call(lambda store: store.installation_id())
        return str(self._installation)

    def take_committed(self, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Take the push of deliveries that a transaction recorded; return the committed ones."""
        source, deadline = self.source.id, self.push_deadline
        taken = self._try_call(
            "take_committed",
            lambda store: store.take_committed(source, tokens, deadline=deadline),
        )
        return frozenset(taken or ())

    def forget_spooled(self, tokens: Sequence[UUID]) -> bool:
        """Remove the records of these from the spool; see Tracker."""
        self._mine()
        return self._replay.remove(tokens, patience=self.settings.call_timeout)

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Leave the push to the leader; see Tracker."""
        written = self._try_call("outbox", lambda store: self._outbox(store, tokens))
        if not written or self.spool.pending:
            # After the records, which may wait in the spool as well, while another thread writes it.
            # Without it the sweep finds the deliveries absent, but only later, and only while the
            # queue is trusted.
            self.spool.put([Unsent(tuple(tokens))])

    def _outbox(self, store: HostStore, tokens: Sequence[UUID]) -> bool:
        store.outbox(self.source.id, tokens)
        return True

    def broker_in_doubt(self) -> bool:
        """Return True if Redis did not answer a moment ago; see Tracker."""
        self._mine()
        return self._redis_health is not None and self._redis_health()

    def broker_error(self) -> Exception | None:
        """Return why Redis does not answer, or None; see Tracker."""
        self._mine()
        return None if self._redis_health is None else self._redis_health.error()

    def broker_answered(self) -> None:
        """Note that Redis has just answered the host; see Tracker."""
        if self._redis_health is not None:
            self._redis_health.answered()

    def broker_failed(self) -> None:
        """Note that Redis just failed the host; see Tracker."""
        if self._redis_health is not None:
            self._redis_health.failed()

    def accepts_without_broker(self, recorded: Recorded) -> bool:
        """Return True if a recorded job may be accepted although Redis is away; see Tracker."""
        accepts = recorded.committed or self._accepts
        return accepts and recorded.leader_live and not recorded.refused and not recorded.lost

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
        """Write the tombstones before Redis forgets the jobs; see Tracker."""
        self._mine()  # a child must not ask its parent's spool
        waiting = self.spool.waiting(job_ids, queue)
        self._record_intent(Cancelled(tuple(tokens), tuple(job_ids), queue, waiting), "cancel")

    def amend(self, token: UUID, change: Callable[[bytes], bytes]) -> bool:
        """Change the envelope with which an owed delivery is restored; see Tracker."""
        try:
            return bool(self.call(lambda store: store.amend(self.source.id, token, change)))
        except BreakerOpen:
            return False  # the outage is already logged
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            log_event("not_written", what="amend", error=str(failure))
            return False

    def _record_intent(self, entry: Cancelled | JoinOpened, what: str) -> Recorded:
        try:
            with contain_errors(what, let_pass=StoreUnavailable):
                recorded: Recorded = self.call(
                    lambda store: write_cancellation(store, self.source, entry)
                )
                if isinstance(entry, Cancelled) and self._records_may_wait(entry):
                    # The cancel must also come after them.
                    self.spool.put([entry])
                return recorded
        except StoreUnavailable as error:
            if self.settings.when_postgres_down == "raise":
                raise
            return self._overflow([entry], error)
        return Recorded(lost=True)

    def _records_may_wait(self, cancelled: Cancelled) -> bool:
        """Return True if records that this cancel means may wait in a spool, in memory or in Redis."""
        if self.spool.pending:
            return True
        if self.stream is None or not depends_on_order(cancelled):
            return False
        length = self.stream.length()
        return length is not None and length[0] > 0

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
            self._try_call(
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
        """Return the worker that last lost its claim of this delivery; see Tracker."""
        source = self.source.id
        found: UUID | None = self._try_call(
            "predecessor", lambda store: store.predecessor(source, token)
        )
        return found

    def lock(self, name: str, claim: Claim) -> bool:
        """Take a lock that belongs to this claim; see Tracker."""
        source = self.source.id
        return bool(
            self._try_call(
                "lock",
                lambda store: store.lock(source, name, token=claim.token, number=claim.number),
            )
        )

    def unlock(self, name: str, claim: Claim) -> None:
        """Release a lock of this claim; see Tracker."""
        # If this fails, the lock ends with the claim.
        source = self.source.id
        self._try_call("unlock", lambda store: store.unlock(source, name, token=claim.token))

    def begin_effect(
        self, name: str, job_id: str | None, claim: Claim, *, again: bool
    ) -> tuple[str, str | None]:
        """Begin an effect of a run; see Tracker."""
        source = self.source.id
        answer: tuple[str, str | None] = self.call(
            lambda store: store.begin_effect(
                source, name, job_id=job_id, token=claim.token, number=claim.number, again=again
            )
        )
        verdict, result = answer
        return verdict, self.unseal_result(result)

    def seal_result(self, result: str | None) -> str | None:
        """Return the result of an effect as it is stored."""
        return self._sealer.seal_text(result)

    def unseal_result(self, stored: str | None) -> str | None:
        """Return the result of an effect as it was given."""
        return None if stored is None else self._sealer.unseal_text(stored)

    def finish_effect(self, name: str, claim: Claim, result: str | None) -> None:
        """Store that an effect is done; see Tracker."""
        source, stored = self.source.id, self.seal_result(result)
        self.call(
            lambda store: store.finish_effect(
                source, name, token=claim.token, number=claim.number, result=stored
            )
        )

    def forget_effect(self, name: str, claim: Claim) -> None:
        """Delete an effect that is not done; see Tracker."""
        source = self.source.id
        self.call(
            lambda store: store.forget_effect(source, name, token=claim.token, number=claim.number)
        )

    def effect_values(self, name: str, job_id: str | None, claim: Claim) -> dict[str, str]:
        """Return the parameters of an effect for the application's connection; see Tracker."""
        return {
            "source": str(self.source.id),
            "key": texts.escaped(texts.key(name)),
            "job_id": texts.escaped(job_id or ""),
            "token": str(claim.token),
            "number": str(claim.number),
        }

    def recovers(self, tokens: Sequence[UUID], *, began: bool = True) -> frozenset[UUID] | None:
        """Return the deliveries that the leader restores if their run is killed; see Tracker."""
        wanted = self.settings.recover_killed or not began
        if not (tokens and wanted and self.settings.mode == "guard"):
            return frozenset()
        source = self.source.id
        found: frozenset[UUID] | None = self._try_call(
            "recovers",
            lambda store: store.recoverable(source, tokens),
        )
        return found

    def tombstones(self, tokens: Sequence[UUID]) -> Mapping[UUID, Outcome] | None:
        """Return the outcomes of those that have ended; see Tracker."""
        if not tokens:
            return {}
        found: Mapping[UUID, Outcome] | None = self._try_call(
            "tombstones", lambda store: store.tombstones(self.source.id, tokens)
        )
        return found

    def _try_call(self, what: str, work: Callable[[HostStore], Any]) -> Any:
        try:
            with contain_errors(what, let_pass=JobguardError):
                return self.call(work)
        except JobguardError as error:
            log_event("not_written", what=what, error=str(error))
        return None

    # -- workers -----------------------------------------------------------------------------------

    @property
    def mends_library(self) -> bool:
        """Return True if faults of the library itself may be corrected; see Tracker."""
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
        """Start to beat as a worker; see Tracker."""
        from jobguard.host.session import WorkerSession  # a producer has none

        if self._session is None or not self._session.is_mine or not self._session.join():
            if serves and hasattr(socket, "send_fds") and not os_threads.is_patched():
                self._serve_children()
            self._session = WorkerSession(
                self,
                self._new_store(),
                name=name,
                queues=queues,
                lists=lists,
                apart=apart,
                serves=self._door is not None and self._door.owner.is_current,
            )
            self._session.open()
        elif more := set(queues) - set(self._session.queues):  # another worker of this process
            self._session.consumes(sorted(more | set(self._session.queues)))
        return self._session

    @property
    def parent(self) -> ParentStore | None:
        """Return the way to the worker, in a child that its worker serves."""
        return self._mine()._parent

    def _serve_children(self) -> None:
        if self._door is None or not self._door.owner.is_current:
            self._door = Door(self)
            self._door.open()
            if self._parent is not None:  # a child of a worker that becomes a worker itself
                self._store, self._registered = self._new_store(), False

    def for_child(self, name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Make a call for a child of this worker, together with the calls of others."""
        if name == "end":
            return [] if self._session is None else self._session.take(arguments[1])
        if name == "alone":
            return self._session is None or self._session.step_of_child(*arguments, **options)
        if name == "spool":
            return self.spool.put(*arguments)
        if name == "start_unclaimed":
            return self.start_unclaimed(*arguments)
        if name == "notes_of":
            return self.notes_of(*arguments)
        if name == "reports_may_wait":
            return self.reports_may_wait
        if name == "probe":
            return self.circuit.check()
        if name == "register":
            return self.call(lambda store: (store.register(*arguments), store.installation))
        if name == "claim":
            return self.claim(arguments[1])
        if name == "claims":
            return {request.nonce: self.claim(request) for request in arguments[1]}
        if name == "record" and not any(options.get(how) for how in _UNSHARED):
            return self.call(lambda _store: self._commit.submit(arguments[1]))
        return self.call(lambda store: getattr(store, name)(*arguments, **options))

    def inherit_session(
        self, worker: UUID, pid: int, *, name: str, queues: Sequence[str]
    ) -> WorkerSession:
        """Continue as a child of the worker that spawned this process; see Tracker."""
        from jobguard.host.session import WorkerSession

        before = self._session
        self._session = WorkerSession(
            self, self._new_store(), name=name, queues=queues, inherited=(worker, pid)
        )
        if before is not None:
            self._session.share(before)
        return self._session

    def end(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Commit ends, after the entries that wait in the spool. Raises as the store does."""
        self._mine()
        if self._parent is not None:  # the worker takes them even while Postgres is away
            return self._parent.end(self.source.id, ends)
        answers: Sequence[Ended] = self.call(lambda store: store.end(self.source.id, ends))
        for end, answer in zip(ends, answers, strict=True):
            if answer is Ended.LATE and end.outcome is not Outcome.CANCELLED:
                log_event(
                    "end_late", job_id=end.job_id, outcome=end.outcome.value, number=end.number
                )
        return answers

    def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Ask for a claim, together with the requests of other threads. Raises as the store does."""
        answers: Mapping[UUID, ClaimAnswer] = self.call(
            lambda _store: self._claims.submit([request])
        )
        return answers[request.nonce]

    def start_unclaimed(self, request: ClaimRequest) -> None:
        """Report a start without a claim, because Postgres is away, to the stream."""
        self._mine()
        if self._parent is not None:
            with suppress(JobguardError):
                self._parent.call("start_unclaimed", request)
        elif self.stream is not None and self.spool.copy():
            self.stream.append([request])

    @property
    def reports_may_wait(self) -> bool:
        """Return True from an outage on until the stream is seen empty, as far as this process knows."""
        self._mine()
        if self.circuit.closed and self.circuit.silent_for() > _UNHEARD:
            self._reports_may_wait = True  # an outage may have come and gone meanwhile
        if not self._reports_may_wait or not self.circuit.closed:
            return self._reports_may_wait
        if self._parent is not None:
            with suppress(JobguardError):
                self._reports_may_wait = bool(self._parent.call("reports_may_wait"))
        else:
            length = (0, 0) if self.stream is None else self.stream.length()
            self._reports_may_wait = length is None or length[0] > 0
        return self._reports_may_wait

    def notes_of(self, delivery: Delivery) -> Notes:
        """Return what waits in the stream about this delivery, or in the memory of this process.

        While Redis is away too, only what this process itself has reported is known.
        """
        self._mine()
        if self.stream is not None and not self.spool.copy():
            own = self.spool.outcome_of(delivery.token)
            if own is not None:
                return Notes(own)
        if self._parent is not None:
            with suppress(JobguardError):
                return Notes(*self._parent.call("notes_of", delivery))
        elif self.stream is not None:
            return self.stream.notes_of(delivery)
        return Notes()

    def record_late(self, delivery: Delivery) -> None:
        """Record a delivery that is in Redis already. Raises as the store does."""
        self.call(lambda store: write_late(store, self.source, [delivery], newest=True))

    def release(self, released: Released) -> None:
        """Release a claim, now or when Postgres is back. Raises StoreUnavailable if it was not released."""
        source = self.source.id
        try:
            self.call(
                lambda store: store.release(
                    source,
                    released.token,
                    released.worker,
                    number=released.number,
                    interrupted=released.interrupted,
                )
            )
        except StoreUnavailable:
            if self.stream is not None:  # a leader must not find the claim that is in the stream
                self.spool.put([released])
            raise

    def _write_claims(self, requests: Sequence[ClaimRequest]) -> Mapping[UUID, ClaimAnswer]:
        if not self.circuit.closed:  # it opened while these waited: one wait is enough
            raise BreakerOpen
        if self._session is not None:
            self._session.report_starts()
        if len(requests) == 1:
            return {requests[0].nonce: self._store.claim(self.source.id, requests[0])}
        return self._store.claims(self.source.id, requests)

    # -- the spool ---------------------------------------------------------------------------------

    def _spool_changed(self) -> None:
        """Report the waiting entries to a child's worker, and see that they are written without a call."""
        session = self._session
        if session is not None and not session.is_mine:
            session.waits(self.spool.oldest())
        if not self.spool.pending:
            if self._logged_full or self._logged_light:
                log_event("spool_has_room", lost=self.spool.counts.lost)
            self._logged_full = self._logged_light = False
        elif session is None or not session.is_mine or session.closed:
            self._replay.drain()

    def spooled(self) -> Mapping[str, int]:
        """Return the counts of entries that wait in this process, and of the rest."""
        counts = asdict(self.spool.counts)
        aside = len(self.spool.aside())
        entries, size = (self.stream and self.stream.length()) or (0, 0)
        return {
            "waiting": len(self.spool),
            "aside": aside,
            "bytes": self.spool.size,
            "stream": entries,
            "stream_bytes": size,
            **counts,
        }

    def _ended(self, ends: Sequence[End]) -> None:
        if self._session is not None:
            self._session.ended(ends)

    def replay(self, limit: int = BATCH) -> int:
        """Write entries of the spool to Postgres, oldest first; return how many it took."""
        return self._mine()._replay.some(limit)

    @property
    def push_deadline(self) -> float:
        """Return the seconds after its record in which a producer may push; see Tracker."""
        return self.settings.push_deadline

    def drain_spool(self, *, last: bool = False) -> None:
        """Write waiting entries, within the time of one record; see Tracker.

        ``last``: the process is about to end, and waits for the rest of its patience.
        """
        if not self._owner.is_current:
            return  # a fork that has reported nothing; its parent writes what its parent has
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
        if left and not self._logged_left:
            self._logged_left = True
            ids = [id for id in (getattr(entry, "job_id", "") for entry in left) if id]
            log_event(
                "spool_left",
                count=len(left),
                job_ids=ids[:_MOST_IDS],
                aside=len(self.spool.aside()),
            )

    def close(self) -> None:
        """Write waiting entries, in bounded time, and close the connections."""
        self._mine()
        if self._session is not None and self._session.is_mine:
            self._session.close_for_all()
        if self._door is not None and self._door.owner.is_current:
            self._door.close()
        self.drain_spool(last=True)
        self._store.close()


def _with_errors(deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
    """Add the error of the failed run to its successors: libraries retry while they handle the error."""
    failure = sys.exception()
    if failure is None or not any(delivery.parent for delivery in deliveries):
        return deliveries
    try:
        error = redact(f"{type(failure).__name__}: {failure}")
    except Exception:  # the text comes from the user's code
        error = type(failure).__name__
    return [
        replace(one, parent=replace(one.parent, error=error))
        if one.parent is not None and one.parent.error is None
        else one
        for one in deliveries
    ]


def _is_keyed(delivery: Delivery) -> bool:
    """Return True if it must take a key; a retry keeps the key of its parent."""
    return delivery.rule is not None and delivery.parent is None


def _send_keyed(
    source: Source, delivery: Delivery, deadline: float, store: HostStore
) -> tuple[str, str | None, bool]:
    return store.record_keyed(source.id, delivery, namespace=source.namespace, deadline=deadline)


def _goes_on(delivery: Delivery) -> bool:
    """Return True if a run sends it: if that is refused, nothing sends it again."""
    return delivery.parent is not None or delivery.derived
