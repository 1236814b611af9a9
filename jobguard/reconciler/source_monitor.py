"""Watching one source, in steps small enough that the pulse and the lease always have their turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID

import redis

from jobguard.adapter import Broker
from jobguard.errors import JobguardError
from jobguard.log import log_event
from jobguard.model import Cause, Owed, token_at
from jobguard.reconciler.backlog_trust import BacklogTrust
from jobguard.reconciler.evidence import lost_since
from jobguard.reconciler.hold import AutomaticHold
from jobguard.reconciler.identity import RedisIdentityCheck
from jobguard.reconciler.inspection import InspectionContext, Inspector
from jobguard.reconciler.pulse import Health, PulseKeeper
from jobguard.reconciler.result import PassResult
from jobguard.reconciler.trust import Trust
from jobguard.reconciler.workers import Workers
from jobguard.redis_refusal import refusal_of
from jobguard.redis_values import name_in
from jobguard.settings import Settings
from jobguard.store.protocols import Brake, LeaderStore, SourceRow

_DOWN = 0.05
"""Seconds between two looks whether Redis is back."""
_CONSUMERS = 2.0
"""Seconds between two looks at who consumes which queue."""
_FRESH = 5.0
"""Seconds between two looks at what was recorded in the last minute."""
_YOUNG = 60.0
_YOUNG_PAGES = 10
_URGENT = 0.25
"""Seconds between two looks at what we were told of."""
_WATCHED = 1000
"""Suspects looked at in one step."""
_VERIFY_AGAIN = (10.0, 60.0)
"""Seconds after a change of topology at which everything owed is looked at once more."""
_RETRY = 1.0
"""Seconds until a part of a step that failed is tried again."""
_SAY_AGAIN = 30.0
"""Seconds between two lines in the log about the same trouble."""


@dataclass(slots=True)
class _Lap:
    """A walk over everything owed, page by page."""

    after: UUID | None = None
    began: float = 0.0
    running: bool = False
    brisk: bool = False
    """Something has happened: page after page, rather than spread over sweep_interval."""


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
    ) -> None:
        self._client = client
        self._broker = broker
        self._store = store
        self.source = source
        self._settings = settings
        self._clock = clock
        self._pulse = PulseKeeper(client, store, source, installation)
        self._workers = Workers(client, store, source.id, settings, clock)
        self._identity_check = RedisIdentityCheck(
            self._workers, store, source.id, source.address, named=named, clock=clock
        )
        self._inspector = Inspector(
            client, broker, store, source.id, settings, clock, source.address
        )
        self._refusals = self._inspector.putting_back.refusals
        self._auto = AutomaticHold(count=settings.brake_count, share=settings.brake_share)
        self._counted: set[UUID] = set()  # unexplained absences that the brake knows of
        self._released: dict[str, float] = {}  # queue -> when a person last said resume
        self._trust = Trust(
            source.id,
            watching_since=store.now(),
            watched_until=source.watched_at,
            change_of_leaders=2 * settings.lease,
        )
        self._trust.load(store.queues(source.id))
        self._backlog_trust = BacklogTrust(
            broker,
            store,
            source.id,
            self._trust,
            self._pulse,
            page=settings.page,
            lost=lambda queue, age: self._trusts(queue, age, self._clock()),
        )
        self._first_look = source.pulse_epoch is None
        self._lost_at: float | None = None  # before this, Redis lost what it had: see evidence.py
        self._uncounted = ""
        self._brake = Brake()
        self._owed: Mapping[str, int] = {}
        self._lap = _Lap()
        self._laps_done = 0
        self._due: dict[str, float] = {}
        self._verify_at: list[float] = []
        self._walk_at_once = False
        self._doubt_until: dict[Cause, float] = {}
        self._incident_at: float | None = None
        self._incidents: list[int] = []
        self._health = Health.STEADY
        self._watched_after: UUID | None = None
        self._watched_took = 0.0  # seconds of the present round over all of them
        self._pending = 0
        self.result = PassResult()
        self._resume_incidents()

    def _resume_incidents(self) -> None:
        """What an earlier leader had begun is finished by this one."""
        for incident in self._store.incidents(self.source.id):
            if incident.cause is Cause.INCIDENT:
                log_event("incident_resumed", incident=incident.id, detail=incident.detail)
                self._begin_incident(self._clock() - incident.age, incident.id)

    def _begin_incident(self, at: float, incident: int | None) -> None:
        self._incident_at = at
        if incident is not None and incident not in self._incidents:
            self._incidents.append(incident)
        self._lap = _Lap(running=True, began=self._clock(), brisk=True)
        self._due["watched"] = 0.0

    @property
    def busy(self) -> bool:
        """Whether the next step should follow at once."""
        return self._lap.running and self._incident_at is not None

    @property
    def finished(self) -> bool:
        """Whether everything owed has been looked at and nothing waits for another look."""
        return (
            self._laps_done > 0
            and self._incident_at is None
            and self._workers.polled
            and not self._workers.may_be_dead()
            and not self._pending
            and not self._inspector.putting_back.has_joins_to_see_again
        )

    # -- one step ----------------------------------------------------------------------------------

    def step(self, term: int, brake: Brake) -> None:
        """Do what is due. Raises NotLeading, StoreUnavailable; Redis' errors are a state."""
        self._see_brake(brake)
        now = self._clock()
        health = self._tick(term, now)
        if health is Health.LOST:
            self._loss(now)
        try:
            asks = health not in (Health.DOWN, Health.STOP)
            if self._workers.poll(term, now, ask_redis=asks):
                self._due["urgent"] = 0.0
                self._walk_at_once = True  # for what they had taken and not begun
            if health in (Health.DOWN, Health.UNSURE, Health.STOP):
                return
            self._doubts(now)
            self._part("consumers", partial(self._consumers, term, now))
            self._part(
                "vouching",
                partial(self._backlog_trust.step, term, in_incident=self._incident_at is not None),
            )
            self._part("urgent", partial(self._inspect_urgent, term, now))
            self._part("watched", partial(self._inspect_watched, term, now))
            self._part("young", partial(self._inspect_young, term, now))
            self._part("walk", partial(self._walk, term, now))
            if not self._brake.paused:
                self._part("joins", self._inspector.finish_joins)
            self._refusals.step(term, waits=self._pending > 0)
        except redis.RedisError as error:
            if now >= self._due.get("failed", 0.0):
                self._due["failed"] = now + _SAY_AGAIN
                log_event("redis_away", source=self.source.address, error=str(error))

    def _part(self, name: str, work: Callable[[], None]) -> None:
        """Do one part of a step. A value that it cannot read keeps no other part from its turn."""
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
        released = {queue for queue in self._owed if self._brake.holds(self.source.id, queue)} - {
            queue for queue in self._owed if brake.holds(self.source.id, queue)
        }
        for queue in released:
            self._auto.forget(queue)
            self._released[queue] = self._clock()
        self._brake = brake

    def _tick(self, term: int, now: float) -> Health:
        if now < self._due.get("tick", 0.0):
            return Health.STEADY if self._health is Health.LOST else self._health
        self._due["tick"] = now + self._settings.pulse_interval
        self._health = self._pulse.tick(
            term, identity_confirmed=partial(self._identity_confirmed, term), now=now
        )
        if self._pulse.refusal is not None and self._health is Health.STEADY:
            self._refusals.refused(term, self._pulse.refusal, self._pending)
        if self._health in (Health.DOWN, Health.UNSURE):
            self._due["tick"] = now + _DOWN  # what it lost is to be seen as soon as it is back
        return self._health

    def _identity_confirmed(self, term: int, missed_since: float, *, own: bool) -> bool | None:
        return self._identity_check.is_sure(
            term, self._brake, self._pulse.epoch, missed_since, own=own
        )

    def _loss(self, now: float) -> None:
        self._workers.interrupted(now)
        self._trust.registry_lost(self._store.now())
        incidents = [i for i in self._store.incidents(self.source.id) if i.cause is Cause.INCIDENT]
        self._begin_incident(now, incidents[-1].id if incidents else None)

    def _consumers(self, term: int, now: float) -> None:
        if now < self._due.get("consumers", 0.0):
            return
        self._due["consumers"] = now + _CONSUMERS
        self._inspector.putting_back.hide_ended()
        self._owed = self._store.count(self.source.id)
        if self._first_look:
            self._first_look = False
            age = lost_since(self._client)
            self._lost_at = None if age is None else now - age
        consumers = self._broker.consumers()
        uncounted = str(getattr(consumers, "uncounted", ""))
        changed = self._trust.observe(
            self._store.now(),
            consumers,
            self._workers.names(),
            self._owed,
            counted=not uncounted,
        )
        if uncounted and not self._uncounted:
            log_event("consumers_uncounted", source=self.source.address, error=uncounted)
        self._uncounted = uncounted
        changed = [replace(row, unguarded=[*map(name_in, row.unguarded)]) for row in changed]
        self._store.trust(term, changed)
        for row_changed in changed:
            if row_changed.unguarded:
                log_event(
                    "queue_untrusted",
                    queue=row_changed.queue,
                    workers=list(row_changed.unguarded),
                )

    # -- looks -------------------------------------------------------------------------------------

    def _context(self, term: int, now: float) -> InspectionContext:
        here = self._store.now()
        return InspectionContext(
            reports_complete=self._workers.have_reported(),
            listed=self._workers.listed(),
            trusts=lambda queue, age: self._trust.trusts(
                queue, here - age, lost=self._is_lost(age, now)
            ),
            holds=lambda queue: self._brake.holds(self.source.id, queue),
            cause_of=lambda owed: self._cause_of(owed, now),
            gone=self._workers.gone,
            alone=self._workers.died_alone,
            too_many=lambda queue, absent: self._too_many(term, queue, absent),
        )

    def _trusts(self, queue: str, age: float, now: float) -> bool:
        lost = self._is_lost(age, now)
        return lost and self._trust.trusts(queue, self._store.now() - age, lost=True)

    def _is_lost(self, age: float, now: float) -> bool:
        """Whether Redis is known to have lost what it had when a record of this age was made."""
        return any(at is not None and age > now - at for at in (self._incident_at, self._lost_at))

    def _cause_of(self, owed: Owed, now: float) -> Cause:
        if self._incident_at is not None and owed.age > now - self._incident_at:
            return Cause.INCIDENT
        if self._is_lost(owed.age, now):
            return Cause.TOPOLOGY
        for cause, until in self._doubt_until.items():
            if now < until:
                return cause
        death = self._workers.deaths.get(owed.queue)
        recent = 3 * self._settings.sweep_interval  # by then it was looked at, and found absent
        if death is not None and now - death < min(owed.age, recent):
            return Cause.WORKER  # popped, and gone with the worker before it was claimed
        if owed.age < _YOUNG + self._settings.grace:
            return Cause.PUSH
        return Cause.UNEXPLAINED

    def _too_many(self, term: int, queue: str, absent: Sequence[Owed]) -> bool:
        # Each job counts once, however often it is looked at while it waits for the limiter; and what
        # was known to be absent when a person said resume does not count again.
        released = self._clock() - self._released.get(queue, float("-inf"))
        fresh = {owed.token for owed in absent if owed.suspected_for < released} - self._counted
        self._counted |= fresh
        if not self._auto.exceeded(queue, len(fresh), self._owed.get(queue, 0)):
            return False
        reason = "too many jobs are absent without a cause"
        self._store.hold(term, self.source.id, queue, reason)
        log_event("queue_held", queue=queue, reason=reason)
        self._auto.forget(queue)
        return True

    def _doubts(self, now: float) -> None:
        """A change of topology, an eviction: look at everything now, and again a little later."""
        while self._pulse.doubts:
            cause = self._pulse.doubts.pop()
            self._doubt_until[cause] = now + _VERIFY_AGAIN[-1] + self._settings.sweep_interval
            self._verify_at = [now, *(now + wait for wait in _VERIFY_AGAIN)]
            log_event("verifying", source=self.source.address, cause=cause.value)
        due = bool(self._verify_at) and now >= self._verify_at[0]
        if (due or self._walk_at_once) and not (self._lap.running and self._lap.brisk):
            if due:
                self._verify_at.pop(0)
            self._walk_at_once = False
            self._lap = _Lap(running=True, began=now, brisk=True)
            self._due["page"] = now

    def _inspect_urgent(self, term: int, now: float) -> None:
        """What we were told of goes first: a million lost jobs do not delay one killed worker's."""
        if now < self._due.get("urgent", 0.0):
            return
        page = self._store.watched(self.source.id, limit=_WATCHED, urgent=True)
        result = (
            self._inspector.inspect(term, page, self._context(term, now)) if page else PassResult()
        )
        self.result += result
        took = self._clock() - now
        acted = result.requeued or result.restored
        self._due["urgent"] = now if acted else now + max(_URGENT, 4 * took)

    def _inspect_watched(self, term: int, now: float) -> None:
        if now < self._due.get("watched", 0.0):
            return
        page = self._store.watched(self.source.id, after=self._watched_after, limit=_WATCHED)
        result = self._inspector.inspect(term, page, self._context(term, now))
        first, last = self._watched_after is None, len(page) < _WATCHED
        if first and not page:
            self._counted.clear()
        if not result.throttled and not (result.in_grace and self._incident_at is not None):
            # What waits for the limiter, or for its second look after a loss, keeps its place, and
            # with it the order of recording.
            self._watched_after = None if last else page[-1].token
        self._pending = result.waiting + (0 if last else 1)
        self._count(term, result, first and last)
        self._watched_took += self._clock() - now
        if result.requeued or result.restored:
            self._due["watched"] = now
        else:
            # Many that nothing can be done for now (a held queue) must not keep us from the others.
            quiet = max(self._settings.loss_grace / 4, 4 * self._watched_took) if last else 0.0
            self._due["watched"] = now + min(quiet, self._settings.grace)
        if last:
            self._watched_took = 0.0

    def _count(self, term: int, result: PassResult, whole: bool) -> None:
        self.result += result
        if self._incident_at is None or self._lap.running:
            return
        # The loss is dealt with when a whole walk is over and nobody is suspected for it any more.
        over = whole and not (result.waiting or result.held or result.restored or result.requeued)
        if self._incidents and result.restored[Cause.INCIDENT]:
            self._progress(term, restored=result.restored[Cause.INCIDENT])
        if over:
            for incident in self._incidents:
                self._store.progress(term, incident, missing=0, restored=0, close=True)
            self._incident_at = None
            self._incidents.clear()
            log_event("incident_closed", source=self.source.address)

    def _progress(self, term: int, *, missing: int = 0, restored: int = 0) -> None:
        self._store.progress(
            term, self._incidents[-1], missing=missing, restored=restored, close=False
        )

    def _inspect_young(self, term: int, now: float) -> None:
        """What was recorded in the last minute: a producer may have died before its push."""
        if now < self._due.get("young", 0.0) or self._incident_at is not None:
            return
        self._due["young"] = now + _FRESH
        after: UUID | None = token_at(self._store.now() - _YOUNG)
        for _ in range(_YOUNG_PAGES):
            page = self._store.page(self.source.id, after=after, limit=self._settings.page)
            old_enough = [owed for owed in page if owed.age > self._settings.push_deadline]
            self.result += self._inspector.inspect(term, old_enough, self._context(term, now))
            if len(page) < self._settings.page:
                break
            after = page[-1].token
        # Long queues are read whole for this: no more than a tenth of the time.
        self._due["young"] = now + max(_FRESH, 10 * (self._clock() - now))

    def _walk(self, term: int, now: float) -> None:
        """One page of the walk over everything owed; without a loss, spread over sweep_interval."""
        if not self._lap.running:
            if now < self._due.get("lap", 0.0):
                return
            self._lap = _Lap(running=True, began=now)
        if self._incident_at is None and now < self._due.get("page", 0.0):
            return
        page = self._store.page(self.source.id, after=self._lap.after, limit=self._settings.page)
        result = self._inspector.inspect(term, page, self._context(term, now))
        self.result += result
        self._pending += result.waiting  # the second looks are still to come: see settled
        if self._incidents:
            self._progress(term, missing=result.absent, restored=result.restored[Cause.INCIDENT])
        pages = max(1, sum(self._owed.values()) // self._settings.page + 1)
        took = self._clock() - now
        spread = 0.0 if self._lap.brisk else self._settings.sweep_interval / pages / 2
        self._due["page"] = now + max(spread, 5 * took)
        if len(page) < self._settings.page:
            self._lap.running = False
            self._lap.after = None
            self._laps_done += 1
            self._lost_at = None  # all of it has been looked at
            self._inspector.bypass.lap_over(term)
            again = self._inspector.putting_back.has_joins_to_see_again
            wait = self._settings.grace if again else self._settings.sweep_interval
            self._due["lap"] = self._lap.began + min(wait, self._settings.sweep_interval)
            self._due["watched"] = 0.0
        else:
            self._lap.after = page[-1].token
