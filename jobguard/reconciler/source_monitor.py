"""Monitor one source, in steps so small that the pulse and the lease are always checked in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from uuid import UUID

import redis

from jobguard.adapter import Broker
from jobguard.errors import JobguardError
from jobguard.log import log_event
from jobguard.model import Cause, Owed, token_at
from jobguard.reconciler.backfill import Backfill
from jobguard.reconciler.backlog_trust import BacklogTrust
from jobguard.reconciler.context import YOUNG, InspectionContext
from jobguard.reconciler.evidence import lost_since
from jobguard.reconciler.hold import AutomaticHold
from jobguard.reconciler.identity import RedisIdentityCheck
from jobguard.reconciler.inspection import Inspector
from jobguard.reconciler.limiter import RowSlice
from jobguard.reconciler.pulse import Health, PulseKeeper
from jobguard.reconciler.result import PassResult
from jobguard.reconciler.stream_drain import StreamDrain
from jobguard.reconciler.tally import Tally
from jobguard.reconciler.trust import Trust
from jobguard.reconciler.workers import Workers
from jobguard.redis_refusal import refusal_of
from jobguard.redis_values import name_in
from jobguard.settings import Settings
from jobguard.store.protocols import (
    Brake,
    HostStore,
    LeaderStore,
    Signs,
    SourceRow,
    WorkerRow,
)

_STEP = 0.2
"""Seconds between two steps when nothing is urgent."""
_QUIET = 1.0
"""The same when nothing is owed. The signs end it sooner."""

_DOWN = 0.05
"""Seconds between two checks whether Redis is back."""
_COMPARE_CLOCKS = 1.0
"""Seconds for which the difference between our clock and that of the database is known."""
_CONSUMERS = 2.0
"""Seconds between two reads of the consumers of each queue."""
_CONSUMERS_LATEST = 4.0
"""The same, if a read takes long: a gap of more than some seconds would count as unwatched."""
_FRESH = 5.0
"""Seconds between two inspections of deliveries recorded in the last minute."""
_REST = 24
"""A lap without a cause takes at most one part in so many of the time."""
_YOUNG_PAGES = 10
_URGENT = 0.25
"""Seconds between two inspections of deliveries whose absence was reported."""
_PUSHED_AFTER = 1.0
"""Seconds that a process has for the push after the commit of its transaction."""
_WATCHED = 1000
"""Suspects that are inspected in one step."""
_WATCHED_LEAST = 100
_THROTTLED = 0.1
"""Seconds after which the limiter is asked again."""
_VERIFY_AGAIN = (10.0, 60.0)
"""Seconds after a change of topology at which all owed deliveries are inspected again."""
_FILL = 500
"""The number of waiting jobs that one step of the backfill reads."""
_RETRY = 1.0
"""Seconds until a failed part of a step is tried again."""
_LOG_AGAIN = 30.0
"""Seconds between two log lines about the same failure."""


@dataclass(slots=True)
class _Lap:
    """A walk over all owed deliveries, page by page."""

    after: UUID | None = None
    began: float = 0.0
    running: bool = False
    brisk: bool = False
    """The walk goes from page to page without a wait, because of an event; otherwise it is spread
    over sweep_interval."""
    absent: int = 0
    """How many jobs it has seen absent."""


class SourceMonitor:
    """One source, while this process leads."""

    def __init__(
        self,
        client: redis.Redis,
        broker: Broker,
        store: LeaderStore,
        source: SourceRow,
        installation: UUID,
        settings: Settings,
        *,
        named: bool,
        clock: Callable[[], float] = time.monotonic,
        drain: StreamDrain | None = None,
        host: HostStore | None = None,
        vouches: Callable[[float], bool] = lambda _gap: False,
        saw: Callable[[Mapping[str, frozenset[str]]], None] = lambda _consumers: None,
    ) -> None:
        """Create the monitor.

        ``vouches``: whether no unguarded consumer was there in a gap of so many seconds that ends now.
        ``saw``: called with the consumers of each inspection.
        ``drain``: writes what processes left in Redis while Postgres was away. ``host``: records
        what waits in Redis without a record.
        """
        self._saw = saw
        self._drain = drain
        self._host = host
        self._drained = drain is None
        self._blocked = False  # A store was away in the last step: the next one needs a pause.
        self._backfill: Backfill | None = None
        self._filled: set[str] = set()  # Queues whose backlog was recorded since this leader began.
        self._client = client
        self._broker = broker
        self._store = store
        self.source = source
        self._settings = settings
        self._clock = clock
        self._pulse = PulseKeeper(client, store, source, installation)
        self._workers = Workers(client, store, source.id, settings, clock, source.pulse_epoch)
        self._identity_check = RedisIdentityCheck(
            self._workers, self._hold, source.id, source.address, named=named, clock=clock
        )
        self._auto = AutomaticHold(count=settings.brake_count, share=settings.brake_share)
        # Unexplained absences that the automatic hold has counted.
        self._counted: set[UUID] = set()
        self._released: dict[str, float] = {}  # For each queue: when a person last resumed it.
        now = store.now()
        watched_until = source.watched_at
        if watched_until is not None and vouches(now - watched_until):
            watched_until = now
        self._trust = Trust(
            source.id,
            watching_since=now,
            watched_until=watched_until,
            change_of_leaders=2 * settings.lease,
            vouches=vouches,
        )
        self._trust.load(store.queues(source.id))
        self._inspector = Inspector(
            client, broker, store, source, settings, self._workers, self._trust, clock
        )
        self._refusals = self._inspector.restorer.refusals
        self._backlog_trust = BacklogTrust(
            broker,
            store,
            source.id,
            self._trust,
            self._pulse,
            page=settings.page,
            lost=self._is_surely_lost,
        )
        self._never_inspected = source.pulse_epoch is None
        # Before this time, Redis lost all data; see evidence.py.
        self._lost_at: float | None = None
        self._uncounted = ""
        self._foreign: frozenset[str] = frozenset()
        self._elsewhere: frozenset[UUID] = frozenset()
        self._clocks_compared_at = float("-inf")
        self._clock_behind = 0.0
        self._brake = Brake()
        self._held_at = float("-inf")  # When this monitor held a queue last.
        self._quiet = False  # Nothing is owed, and nothing is left to do.
        self._tally = Tally(store, source.id, clock)
        self._lap = _Lap()
        self._laps_done = 0
        self._due: dict[str, float] = {}
        self._verify_at: list[float] = []
        self._walk_at_once = False
        self._verify_until: dict[Cause, float] = {}
        self._incident_at: float | None = None
        self._incidents: list[int] = []
        self._missing = 0  # The count of the newest of them: the most that one walk saw absent.
        self._health = Health.STEADY
        self._watched_after: UUID | None = None
        self._watched_took = 0.0  # Seconds of the present round over all suspects.
        self._pending = 0
        self._committed_until = (
            0.0  # Before this, it waits for processes to push what they committed.
        )
        self._term = 0
        self._lost = False  # Redis was found to have lost data, since the last step.
        broker.pause_with(self._keep_watch_beside)
        self._unheld_after: UUID | None = None  # The last worker whose claims were checked.
        self._unheld_slice = RowSlice(begin=100, most=1_000)
        self._unheld_checked = False
        self._unheld_waiting = 0
        self.result = PassResult()
        self._resume_incidents()

    def _resume_incidents(self) -> None:
        """Continue the incidents that an earlier leader began."""
        for incident in self._store.incidents(self.source.id):
            if incident.cause is Cause.INCIDENT:
                log_event("incident_resumed", incident=incident.id, detail=incident.detail)
                self._begin_incident(self._clock() - incident.age, incident.id)
                self._missing = incident.missing

    def _begin_incident(self, at: float, incident: int | None) -> None:
        self._incident_at = at
        if incident is not None and incident not in self._incidents:
            self._incidents.append(incident)
            self._missing = 0
        self._lap = _Lap(running=True, began=self._clock(), brisk=True)
        self._due["watched"] = 0.0

    @property
    def busy(self) -> bool:
        """True if the next step should follow at once."""
        restoring = self._incident_at is not None and self._due.get("watched", 0.0) <= self._clock()
        walking = self._lap.running and self._lap.brisk
        wanted = self._lost or not self._drained or restoring or walking
        return wanted and not self._blocked

    @property
    def rest(self) -> float:
        """Seconds until the next step; 0: it should follow at once."""
        if self.busy:
            return 0.0
        if self._health in (Health.DOWN, Health.UNSURE):
            return _DOWN
        # The death of a worker is proved by polls that are not far apart; see Liveness.
        return min(_QUIET, self._settings.worker_timeout / 15) if self._quiet else _STEP

    def close(self) -> None:
        """Close the connections that belong to this monitor alone."""
        if self._host is not None:
            self._host.close()

    @property
    def finished(self) -> bool:
        """True if all owed deliveries were inspected and none waits for another inspection."""
        return (
            self._laps_done > 0
            and self._drained
            and self._incident_at is None
            and self._workers.polled
            and not self._workers.may_be_dead()
            and not self._pending
            and self._clock() >= self._committed_until
            and self._unheld_checked
            and not self._unheld_waiting
            and not self._inspector.restorer.has_joins_to_see_again
        )

    # -- one step ----------------------------------------------------------------------------------

    def step(self, term: int, signs: Signs) -> None:
        """Do all due work of one step.

        Raises NotLeading and StoreUnavailable. Errors of Redis are a state, and are not raised.
        """
        if signs.asked_at > self._held_at:
            self._see_brake(signs.brake)
        self._see_owed(signs.owed)
        self._term = term
        health = self._keep_watch()
        now = self._clock()
        if self._lost:
            self._lost = False
            self._loss(now)
        self._blocked = True
        try:
            if health in (Health.DOWN, Health.UNSURE, Health.STOP):
                return
            if self._drain is not None:
                self._drained = self._drain.step()
                if not self._drained:
                    self._blocked = self._drain.stalled
                    return  # Nothing is judged before the reports are known.
            self._begin_verification(now)
            active = not self._quiet or self._lap.running
            if active:
                self._part("tally", self._tally.step)
            self._part("consumers", partial(self._consumers, term, now))
            self._part(
                "backlog",
                partial(self._backlog_trust.step, term, in_incident=self._incident_at is not None),
            )
            if active:
                self._look_after_owed(term, now)
            self._part("backfill", partial(self._fill, now))
            self._refusals.step(term, waits=self._pending > 0)
            self._inspector.restorer.sealed.step(term, waits=False)
            self._blocked = False
        except redis.RedisError as error:
            if now >= self._due.get("failed", 0.0):
                self._due["failed"] = now + _LOG_AGAIN
                log_event("redis_away", source=self.source.address, error=str(error))

    def _look_after_owed(self, term: int, now: float) -> None:
        self._part("committed", partial(self._see_committed, term, now))
        self._part("urgent", partial(self._inspect_urgent, term, now))
        self._part("watched", partial(self._inspect_watched, term, now))
        self._part("young", partial(self._inspect_young, term, now))
        self._part("walk", partial(self._walk, term, now))
        if not self._brake.paused:
            self._part("joins", self._inspector.finish_joins)

    def _see_owed(self, owed: bool) -> None:
        """Be quiet while nothing is owed, and nothing is left to do."""
        quiet = not owed and self.finished
        if self._quiet and not quiet:
            self._due["consumers"] = self._due["beats"] = 0.0
        self._quiet = quiet

    def _keep_watch(self) -> Health:
        """Check the pulse and the beats, if it is time.

        Called in each step, and between the pieces of every long read, so that neither waits for a walk
        over long queues. A loss is acted on in the next step.
        """
        now = self._clock()
        health = self._tick(self._term, now)
        self._lost = self._lost or health is Health.LOST
        # In a Redis that may be the wrong one, the beats show where the workers are, but no death.
        asks, judges = health is not Health.DOWN, health is not Health.STOP
        if self._quiet and now < self._due.get("beats", 0.0):
            return health
        self._due["beats"] = now + self._settings.worker_timeout / 10
        if self._workers.poll(self._term, now, ask_redis=asks, judge_redis=judges):
            self._search_for_taken()
        return health

    def _search_for_taken(self) -> None:
        """Find the deliveries that workers who are gone had claimed, or had taken and not started."""
        self._due["urgent"] = 0.0
        self._walk_at_once = True

    def _keep_watch_beside(self) -> None:
        """Do the same in the middle of a read."""
        self._keep_watch()

    def _part(self, name: str, work: Callable[[], None]) -> None:
        """Do one part of a step. A value that this part cannot read does not stop the other parts."""
        if self._clock() < self._due.get(f"retry {name}", 0.0):
            return
        try:
            work()
        except (JobguardError, redis.ConnectionError, redis.TimeoutError):
            raise
        except Exception as error:
            if refusal_of(error) is not None:
                raise
            self._due[f"retry {name}"] = self._clock() + _RETRY
            log_event(
                "step_failed",
                part=f"{self.source.address} {name}",
                error=str(error)[:500],
                exc_info=not isinstance(error, redis.RedisError),
            )

    def _see_brake(self, brake: Brake) -> None:
        if (brake.paused, brake.held) == (self._brake.paused, self._brake.held):
            return
        queues = self._tally.queues
        released = {queue for queue in queues if self._brake.holds(self.source.id, queue)} - {
            queue for queue in queues if brake.holds(self.source.id, queue)
        }
        for queue in released:
            self._auto.forget(queue)
            self._released[queue] = self._clock()
        self._brake = brake
        self._watched_after = None  # What was held goes back in the order of recording.

    def _tick(self, term: int, now: float) -> Health:
        if now < self._due.get("tick", 0.0):
            return Health.STEADY if self._health is Health.LOST else self._health
        self._due["tick"] = now + self._settings.pulse_interval
        self._health = self._pulse.tick(
            term,
            identity_confirmed=partial(self._identity_confirmed, term),
            now=now,
            quiet=self._quiet,
        )
        if self._pulse.refusal is not None and self._health is Health.STEADY:
            self._refusals.refused(term, self._pulse.refusal, self._pending)
        if self._health in (Health.DOWN, Health.UNSURE):
            self._due["tick"] = now + _DOWN  # A loss must be seen as soon as Redis is back.
        return self._health

    def _identity_confirmed(self, term: int, missed_since: float, *, own: bool) -> bool | None:
        return self._identity_check.is_sure(
            term, self._brake, self._pulse.epoch, missed_since, own=own
        )

    def _loss(self, now: float) -> None:
        self._inspector.restorer.forget_reported_joins()
        self._workers.interrupted(now)
        self._trust.registry_lost(self._store.now())
        incidents = [i for i in self._store.incidents(self.source.id) if i.cause is Cause.INCIDENT]
        self._begin_incident(now, incidents[-1].id if incidents else None)

    def _consumers(self, term: int, now: float) -> None:
        if now < self._due.get("consumers", 0.0):
            return
        self._inspector.restorer.hide_ended()
        if self._never_inspected:
            self._never_inspected = False
            age = lost_since(self._client)
            self._lost_at = None if age is None else now - age
        consumers = self._broker.consumers()
        self._saw(consumers)
        uncounted = str(getattr(consumers, "uncounted", ""))
        proved: frozenset[str] = getattr(consumers, "proved", frozenset())
        ours = self._workers.named_by(getattr(consumers, "sessions", {}))
        alive: frozenset[str] = getattr(consumers, "alive", frozenset())
        expected, foreign = self._workers.not_in_ledger(alive - ours)
        proved = (proved - expected - foreign) | ours
        for name in sorted(foreign - self._foreign):
            log_event("worker_elsewhere", source=self.source.address, worker=name)
        self._foreign = foreign
        passing: frozenset[str] = getattr(consumers, "passing", frozenset())
        soon, elsewhere = self._workers.elsewhere(self._pulse.epoch)
        for row in elsewhere:
            if row.id not in self._elsewhere:
                log_event(
                    "worker_in_another_redis",
                    source=self.source.address,
                    worker=row.name,
                    host=row.host,
                    pid=row.pid,
                )
        self._elsewhere = frozenset(row.id for row in elsewhere)
        guarded = {queue: names | proved for queue, names in self._workers.names().items()}
        for queue in consumers:
            guarded.setdefault(queue, consumers[queue] & proved)
        changed = self._trust.observe(
            self._store.now(),
            consumers,
            guarded,
            self._tally.queues,
            counted=not uncounted,
            proved=proved,
            expected=expected | passing | _named(soon),
            elsewhere=_by_queue([*soon, *elsewhere]),
        )
        if uncounted and not self._uncounted:
            log_event("consumers_uncounted", source=self.source.address, error=uncounted)
        self._uncounted = uncounted
        here = " (guarded, but not in this ledger)"
        changed = [
            replace(row, unguarded=[name_in(n) + here * (n in foreign) for n in row.unguarded])
            for row in changed
        ]
        self._store.trust(term, changed)
        for row_changed in changed:
            if row_changed.unguarded:
                log_event(
                    "queue_untrusted",
                    queue=row_changed.queue,
                    workers=list(row_changed.unguarded),
                )
        # With thousands of queues this takes long, and it must not take all of the time.
        took = self._clock() - now
        least = _CONSUMERS_LATEST if self._quiet else _CONSUMERS
        self._due["consumers"] = now + max(least, min(_CONSUMERS_LATEST, 20 * took))

    def _fill(self, now: float) -> None:
        """Record one page of what waits in Redis without a record.

        There is one walk over each queue after a leader began or found the queue, and one after
        references to jobs were drained. The rate is bounded, so that a queue of a million jobs does
        not delay other work.
        """
        if self._host is None or now < self._due.get("fill", 0.0):
            return
        if self._drain is not None and self._drain.take_references():
            self._filled.clear()
        if self._backfill is None:
            queues = {*self._tally.queues, *self._workers.names(), *self._trust.rows} - self._filled
            if not queues:
                self._due["fill"] = now + _CONSUMERS
                return
            self._filled |= queues
            self._backfill = Backfill(
                self._broker,
                self._store,
                self._host,
                self.source,
                queues,
                page=min(self._settings.page, _FILL),
                mark=self._settings.mode == "guard",
                drain=self._drain.step if self._drain is not None else lambda: True,
            )
        read = self._backfill.step()
        self._due["fill"] = now + max(
            read / self._settings.recovery_rate, 2 * (self._clock() - now)
        )
        if self._backfill.finished:
            counts, self._backfill = self._backfill.counts, None
            if counts.recorded or counts.unreadable:
                log_event("backlog_recorded", source=self.source.address, **asdict(counts))

    # -- inspections ----------------------------------------------------------------------------

    def _inspect(self, term: int, page: Sequence[Owed], now: float) -> PassResult:
        """Inspect a page, hold queues with too many unexplained absences, and restore the rest."""
        self._tally.saw(owed.queue for owed in page)
        if self._workers.poll_for(term, self._clock(), page):
            self._search_for_taken()
        inspection = self._inspector.inspect(term, page, self._context(now))
        for queue, absent in inspection.unexplained().items():
            if self._are_too_many(queue, absent):
                self._hold_automatically(term, queue)
                inspection.hold(queue)
        return self._inspector.restore(term, inspection)

    def _context(self, now: float) -> InspectionContext:
        return InspectionContext(
            at=self._store.now(),
            reports_complete=self._workers.have_reported(),
            brake=self._brake,
            incident_age=None if self._incident_at is None else now - self._incident_at,
            losses=self._loss_ages(now),
            verified_cause=next(
                (c for c, until in self._verify_until.items() if now < until), None
            ),
            deaths={queue: now - at for queue, at in self._workers.deaths.items()},
        )

    def _loss_ages(self, now: float) -> list[float]:
        return [now - at for at in (self._incident_at, self._lost_at) if at is not None]

    def _is_surely_lost(self, queue: str, age: float) -> bool:
        """Return True if Redis lost a delivery of this age, and no unguarded worker can have run it."""
        if not any(age > loss for loss in self._loss_ages(self._clock())):
            return False
        return self._trust.trusts(queue, self._database_time() - age, lost=True)

    def _database_time(self) -> float:
        """Return the time of the database; ask it once a second at most."""
        now = self._clock()
        if now - self._clocks_compared_at >= _COMPARE_CLOCKS:
            self._clocks_compared_at = now
            # Read our clock after the answer: a slow one must not make deliveries look younger than
            # they are, because younger ones are trusted.
            self._clock_behind = self._store.now() - self._clock()
        return now + self._clock_behind

    def _are_too_many(self, queue: str, absent: Sequence[Owed]) -> bool:
        # Each job counts once, however often it is inspected while it waits for the limiter. Jobs
        # that were known to be absent when a person resumed the queue do not count again.
        released = self._clock() - self._released.get(queue, float("-inf"))
        fresh = {owed.token for owed in absent if owed.suspected_for < released} - self._counted
        self._counted |= fresh
        return self._auto.exceeded(queue, len(fresh), self._tally.of(queue))

    def _hold(self, term: int, queue: str, reason: str) -> None:
        self._store.hold(term, self.source.id, queue, reason)
        # The brake that other threads have read a moment ago does not show it yet.
        self._held_at = self._clock()
        held = {**self._brake.held, f"{self.source.id}/{queue}": {"reason": reason}}
        self._brake = replace(self._brake, held=held)

    def _hold_automatically(self, term: int, queue: str) -> None:
        reason = "too many jobs are absent without a cause"
        self._hold(term, queue, reason)
        log_event("queue_held", queue=queue, reason=reason)
        self._auto.forget(queue)

    def _begin_verification(self, now: float) -> None:
        """After a change of topology or an eviction, inspect all deliveries now and again later."""
        while self._pulse.to_verify:
            cause = self._pulse.to_verify.pop()
            self._verify_until[cause] = now + _VERIFY_AGAIN[-1] + self._settings.sweep_interval
            self._verify_at = [now, *(now + wait for wait in _VERIFY_AGAIN)]
            log_event("verifying", source=self.source.address, cause=cause.value)
        due = bool(self._verify_at) and now >= self._verify_at[0]
        if (due or self._walk_at_once) and not (self._lap.running and self._lap.brisk):
            if due:
                self._verify_at.pop(0)
            self._walk_at_once = False
            self._lap = _Lap(running=True, began=now, brisk=True)
            self._due["page"] = now

    def _see_committed(self, term: int, now: float) -> None:
        """Give the processes a moment to push what their transactions have committed."""
        if now >= self._due.get("committed", 0.0):
            self._due["committed"] = now + _URGENT
            if self._store.see_committed(term, self.source.id, wait=_PUSHED_AFTER):
                # Counted from the answer: the moment begins in the statement, which may be slow.
                self._committed_until = self._clock() + _PUSHED_AFTER + _URGENT
                self._due["watched"] = min(self._due.get("watched", 0.0), self._committed_until)

    def _inspect_urgent(self, term: int, now: float) -> None:
        """Inspect deliveries whose absence was reported.

        They go first, so that a million lost jobs do not delay the job of one killed worker.
        """
        if now < self._due.get("urgent", 0.0):
            return
        page = [*self._store.watched(self.source.id, limit=_WATCHED, urgent=True)]
        unheld = self._unheld()
        known = {owed.token for owed in page}
        page += [owed for owed in unheld if owed.token not in known]
        result = self._inspect(term, page, now) if page else PassResult()
        self._add(term, result)
        self._unheld_waiting += result.waiting if unheld else 0
        took = self._clock() - now
        acted = result.requeued or result.restored
        self._due["urgent"] = now if acted else now + max(_URGENT, 4 * took)

    def _unheld(self) -> Sequence[Owed]:
        """Return claims that their live workers dropped: of some workers now, of others next time."""
        first, began = self._unheld_after is None, self._clock()
        if first:
            self._unheld_waiting = 0
        found, self._unheld_after = self._store.unheld(
            self.source.id,
            after=self._unheld_after,
            workers=self._unheld_slice.rows,
            limit=_WATCHED,
        )
        self._unheld_slice.took(self._clock() - began)
        self._unheld_checked = self._unheld_checked or self._unheld_after is None
        return found

    def _inspect_watched(self, term: int, now: float) -> None:
        if now < self._due.get("watched", 0.0):
            return
        limit = _WATCHED
        if self._incident_at is not None and self._settings.mode == "guard":
            # More than the limiter lets through would only be inspected again.
            limit = max(_WATCHED_LEAST, min(_WATCHED, self._inspector.restorer.room))
        page = self._store.watched(self.source.id, after=self._watched_after, limit=limit)
        result = self._inspect(term, page, now)
        first, last = self._watched_after is None, len(page) < limit
        if first and not page:
            self._counted.clear()
        if not result.throttled and not (result.in_grace and self._incident_at is not None):
            # Deliveries that wait for the limiter, or for their second inspection after a loss,
            # keep their place, and so the order of recording.
            self._watched_after = None if last else page[-1].token
        self._pending = result.waiting + (0 if last else 1)
        self._count(term, result, first and last)
        self._watched_took += self._clock() - now
        if (result.requeued or result.restored) and not result.throttled:
            self._due["watched"] = now
        elif result.throttled:
            self._due["watched"] = now + _THROTTLED
        else:
            # Many deliveries that cannot be restored now (of a held queue) must not delay the
            # others.
            quiet = max(self._settings.loss_grace / 4, 4 * self._watched_took) if last else 0.0
            self._due["watched"] = now + min(quiet, self._settings.grace)
        if last:
            self._watched_took = 0.0

    def _count(self, term: int, result: PassResult, whole: bool) -> None:
        self._add(term, result)
        if self._incident_at is None or self._lap.running:
            return
        # A loss is repaired when a whole walk is over and no delivery is a suspect because of it.
        over = whole and not (result.waiting or result.held or result.restored or result.requeued)
        if over:
            for incident in self._incidents:
                self._store.progress(term, incident, missing=0, restored=0, close=True)
            self._incident_at = None
            self._incidents.clear()
            log_event("incident_closed", source=self.source.address)

    def _add(self, term: int, result: PassResult) -> None:
        """Add a result; what an inspection of any kind has restored belongs to the incident."""
        self.result += result
        if self._incidents and result.restored[Cause.INCIDENT]:
            self._progress(term, restored=result.restored[Cause.INCIDENT])

    def _progress(self, term: int, *, missing: int = 0, restored: int = 0) -> None:
        self._store.progress(
            term, self._incidents[-1], missing=missing, restored=restored, close=False
        )

    def _inspect_young(self, term: int, now: float) -> None:
        """Inspect deliveries of the last minute: a producer may have died before its push."""
        if now < self._due.get("young", 0.0) or self._incident_at is not None:
            return
        self._due["young"] = now + _FRESH
        after: UUID | None = token_at(self._store.now() - YOUNG)
        for _ in range(_YOUNG_PAGES):
            page = self._store.page(self.source.id, after=after, limit=self._settings.page)
            old_enough = [owed for owed in page if owed.age > self._settings.push_deadline]
            self._add(term, self._inspect(term, old_enough, now))
            if len(page) < self._settings.page:
                break
            after = page[-1].token
        # This reads long queues completely: it takes no more than a tenth of the time.
        self._due["young"] = now + max(_FRESH, 10 * (self._clock() - now))

    def _walk(self, term: int, now: float) -> None:
        """Inspect one page of the walk over all owed deliveries.

        Without a loss the pages are spread over sweep_interval.
        """
        if not self._lap.running:
            if now < self._due.get("lap", 0.0):
                return
            # A new leader inspects all of it at once: without a leader, nothing was inspected.
            self._lap = _Lap(running=True, began=now, brisk=not self._laps_done)
        if self._incident_at is None and now < self._due.get("page", 0.0):
            return
        page = self._store.page(self.source.id, after=self._lap.after, limit=self._settings.page)
        result = self._inspect(term, page, now)
        self._add(term, result)
        self._pending += result.waiting  # The second inspections are still to come; see finished.
        if self._incidents:
            self._lap.absent += result.absent
            more = max(0, self._lap.absent - self._missing)  # Walks see the same jobs again.
            self._missing += more
            self._progress(term, missing=more)
        pages = self._tally.total // self._settings.page + 1
        took = self._clock() - now
        spread = self._settings.sweep_interval / pages / 2
        self._due["page"] = now + (0.0 if self._lap.brisk else max(spread, _REST * took))
        if len(page) < self._settings.page:
            self._lap.running = False
            self._lap.after = None
            self._laps_done += 1
            self._lost_at = None  # All of it has been inspected.
            self._inspector.bypass.lap_over(term)
            again = self._inspector.restorer.has_joins_to_see_again
            wait = self._settings.grace if again else self._settings.sweep_interval
            self._due["lap"] = self._lap.began + min(wait, self._settings.sweep_interval)
            self._due["watched"] = 0.0
        else:
            self._lap.after = page[-1].token


def _in_another_redis(worker: WorkerRow) -> str:
    return f"{worker.name} (guarded, but in another Redis)"


def _named(workers: Iterable[WorkerRow]) -> frozenset[str]:
    return frozenset(map(_in_another_redis, workers))


def _by_queue(workers: Sequence[WorkerRow]) -> dict[str, frozenset[str]]:
    queues = {queue for worker in workers for queue in worker.queues}
    return {queue: _named(one for one in workers if queue in one.queues) for queue in queues}
