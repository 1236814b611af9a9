"""Watching one source, in steps small enough that the pulse and the lease always have their turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

import redis

from jobguard.adapter import Broker
from jobguard.job import Cause, Owed, Presence, token_at
from jobguard.log import say
from jobguard.pulse import beat_key
from jobguard.reconciler.brake import AutomaticHold
from jobguard.reconciler.liveness import Judgement, Liveness
from jobguard.reconciler.look import Circumstances, Done, Looker, told
from jobguard.reconciler.pulse import Health, PulseKeeper
from jobguard.reconciler.trust import Trust
from jobguard.settings import Settings
from jobguard.store import Brake, LeaderStore, SourceRow, WorkerRow

_DOWN = 0.05
"""Seconds between two looks whether Redis is back."""
_POLL = 0.5
"""Seconds between two polls of the workers' beats."""
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
_SAY_AGAIN = 30.0
"""Seconds between two lines in the log about the same trouble."""
_ASK_ABOUT_PLACE = 10.0
"""Seconds in which a worker of before should have beaten, if there is one."""


@dataclass(slots=True)
class _Lap:
    """A walk over everything owed, page by page."""

    after: UUID | None = None
    began: float = 0.0
    pages: int = 0
    running: bool = False


@dataclass(slots=True)
class _Vouching:
    """A walk over what was recorded before a queue was watched."""

    queue: str
    epoch: UUID | None
    unpushed: set[UUID]
    after: UUID | None = None
    absent: list[tuple[UUID, Cause, str]] = field(default_factory=list)


class Watch:
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
        self._named = named
        self._clock = clock
        self._pulse = PulseKeeper(client, store, source, installation)
        self._liveness = Liveness(settings.worker_timeout)
        self._looker = Looker(client, broker, store, source.id, settings)
        self._auto = AutomaticHold(count=settings.brake_count, share=settings.brake_share)
        self._counted: set[UUID] = set()  # unexplained absences that the brake knows of
        self._released: dict[str, float] = {}  # queue -> when a person last said resume
        self._trust = Trust(source.id, watching_since=store.now())
        self._trust.load(store.queues(source.id))
        self._workers: Sequence[WorkerRow] = ()
        self._judgement: Judgement | None = None
        self._beats: Mapping[UUID, int] = {}  # in this Redis
        self._first_beats: dict[UUID, int] = {}  # as this leader found them
        self._brake = Brake()
        self._owed: Mapping[str, int] = {}
        self._lap = _Lap()
        self._laps_done = 0
        self._due: dict[str, float] = {}
        self._verify_at: list[float] = []
        self._doubt_until: dict[Cause, float] = {}
        self._incident_at: float | None = None
        self._incidents: list[int] = []
        self._health = Health.STEADY
        self._watched_after: UUID | None = None
        self._watched_took = 0.0  # seconds of the present round over all of them
        self._deaths: dict[str, float] = {}  # queue -> when a consumer of it last died or left
        self._gone: set[UUID] = set()
        self._mourned = False
        self._asked = False
        self._vouching: _Vouching | None = None
        self._pending = 0
        self.done = Done()
        self._resume_incidents()

    def _resume_incidents(self) -> None:
        """What an earlier leader had begun is finished by this one."""
        for incident in self._store.incidents(self.source.id):
            if incident.cause is Cause.INCIDENT:
                say("incident_resumed", incident=incident.id, detail=incident.detail)
                self._begin_incident(self._clock() - incident.age, incident.id)

    def _begin_incident(self, at: float, incident: int | None) -> None:
        self._incident_at = at
        if incident is not None and incident not in self._incidents:
            self._incidents.append(incident)
        self._lap = _Lap(running=True, began=self._clock())
        self._due["watched"] = 0.0

    @property
    def busy(self) -> bool:
        """Whether the next step should follow at once."""
        return self._lap.running and self._incident_at is not None

    @property
    def settled(self) -> bool:
        """Whether everything owed has been looked at and nothing waits for another look."""
        return (
            self._laps_done > 0
            and self._incident_at is None
            and self._judgement is not None
            and not self._someone_may_be_dead()
            and not self._pending
        )

    def _someone_may_be_dead(self) -> bool:
        """Whether a worker that holds claims has not been heard of since we began to listen."""
        silent = self._judgement.silent if self._judgement else frozenset()
        return any(row.claims for row in self._workers if row.id in silent)

    # -- one step ----------------------------------------------------------------------------------

    def step(self, term: int, brake: Brake) -> None:
        """Do what is due. Raises NotLeading, StoreUnavailable; Redis' errors are a state."""
        self._see_brake(brake)
        now = self._clock()
        health = self._tick(term, now)
        if health is Health.LOST:
            self._loss(now)
        try:
            self._poll(term, now, health)
            if health in (Health.DOWN, Health.UNSURE, Health.STOP):
                return
            self._doubts(now)
            self._consumers(term, now)
            self._vouch(term, now)
            self._look_at_urgent(term, now)
            self._look_at_watched(term, now)
            self._look_at_young(term, now)
            self._walk(term, now)
        except redis.RedisError as error:
            if now >= self._due.get("failed", 0.0):
                self._due["failed"] = now + _SAY_AGAIN
                say("redis_away", source=self.source.address, error=str(error))

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
            term, place_is_sure=partial(self._place_is_sure, term), now=now
        )
        if self._health in (Health.DOWN, Health.UNSURE):
            self._due["tick"] = now + _DOWN  # what it lost is to be seen as soon as it is back
        return self._health

    def _place_is_sure(self, term: int, missed_since: float, *, own: bool) -> bool | None:
        """Whether a Redis that does not know our pulse, where we never saw it, is this ledger's.

        A worker that beats into this very Redis says yes; one that sees the pulse alive elsewhere says
        that we are in the wrong place. Where there is no worker at all, a pulse of this ledger says yes
        (``own``: there is one, only an older), and so does a named installation, whose name has been
        compared. Otherwise a person is asked: an empty Redis beside a copied database looks the same.
        """
        if self._judgement is None:
            return None
        present = [row for row in self._workers if row.id in self._judgement.live]
        for row in present:
            lives_elsewhere = row.pulse is not None and row.pulse[0] == self._pulse.epoch
            silent = row.id in self._judgement.silent
            if lives_elsewhere and not silent and not self._beats_here(row):
                if self._clock() >= self._due.get("wrong_redis", 0.0):
                    self._due["wrong_redis"] = self._clock() + _SAY_AGAIN
                    say("wrong_redis", source=self.source.address)
                return False
        if any(self._beats_here(row) for row in present):
            return True
        if present and self._clock() - missed_since < _ASK_ABOUT_PLACE:
            return None  # they have yet to beat, here or elsewhere
        if self._named or own:
            return True
        if self._asked:
            return None if self._brake.holds(self.source.id, "*") else True
        if self._clock() - missed_since < _ASK_ABOUT_PLACE:
            return None
        self._asked = True
        reason = (
            "redis lost its pulse and no worker of before is alive to say that it is the right one"
        )
        self._store.hold(term, self.source.id, "*", reason)
        say("place_unsure", source=self.source.address, reason=reason)
        return None

    def _beats_here(self, row: WorkerRow) -> bool:
        """Whether this worker beats into this very Redis; an old master has an old beat of it."""
        return self._beats.get(row.id, -1) > self._first_beats.get(row.id, -1)

    def _loss(self, now: float) -> None:
        self._liveness.interrupted(now)
        self._trust.registry_lost(self._store.now())
        incidents = [i for i in self._store.incidents(self.source.id) if i.cause is Cause.INCIDENT]
        self._begin_incident(now, incidents[-1].id if incidents else None)

    # -- workers -----------------------------------------------------------------------------------

    def _poll(self, term: int, now: float, health: Health) -> None:
        if now < self._due.get("poll", 0.0):
            return
        # Polls further apart than a fifth of the timeout would prove nobody dead.
        self._due["poll"] = now + min(_POLL, self._settings.worker_timeout / 10)
        self._workers = self._store.workers(self.source.id)
        self._beats = {}
        present = [row.id for row in self._workers if not row.left and not row.dead]
        beats: dict[UUID, int] | None = {}
        try:
            if health in (Health.DOWN, Health.STOP):
                beats = None
            elif present:
                answers = self._client.mget([beat_key(id) for id in present])
                beats = {
                    id: int(answer)
                    for id, answer in zip(present, answers, strict=True)
                    if answer is not None
                }
        except redis.RedisError:
            beats = None
        self._judgement = self._liveness.poll(now, self._workers, beats)
        self._beats = beats or {}
        for id in present:
            self._first_beats.setdefault(id, self._beats.get(id, -1))
        if self._judgement.dead:
            self._store.declare_dead(term, self._judgement.dead)
        self._mourn(term, now)

    def _mourn(self, term: int, now: float) -> None:
        assert self._judgement is not None
        dead = set(self._judgement.dead)
        for row in self._workers:
            if (row.id in dead or row.dead or row.left) and row.id not in self._gone:
                self._gone.add(row.id)
                if self._mourned:  # else nobody knows when it went
                    self._deaths.update((queue, now) for queue in row.queues)
                self._due["watched"] = 0.0
                if row.id in dead:
                    say(
                        "worker_dead",
                        worker=row.id,
                        name=row.name,
                        host=row.host,
                        pid=row.pid,
                        claims=row.claims,
                    )
        self._mourned = True
        if now >= self._due.setdefault("forget", now + _POLL * 100):
            self._due["forget"] = now + _POLL * 100
            gone = [row.id for row in self._workers if row.left or row.dead]
            self._store.forget(term, gone)

    def _consumers(self, term: int, now: float) -> None:
        if now < self._due.get("consumers", 0.0):
            return
        self._due["consumers"] = now + _CONSUMERS
        self._owed = self._store.count(self.source.id)
        guarded: dict[str, set[str]] = {}
        for row in self._workers:
            for queue in row.queues:
                guarded.setdefault(queue, set()).add(row.name)
        changed = self._trust.observe(
            self._store.now(),
            self._broker.consumers(),
            {queue: frozenset(names) for queue, names in guarded.items()},
            self._owed,
        )
        self._store.trust(term, changed)
        for row_changed in changed:
            if row_changed.unguarded:
                say(
                    "queue_untrusted",
                    queue=row_changed.queue,
                    workers=list(row_changed.unguarded),
                )

    def _vouch(self, term: int, now: float) -> None:
        """Look at what was recorded before anybody watched a queue: the absent is not ours to judge.

        A page a step; and nothing of it counts unless Redis has not lost anything meanwhile.
        """
        if self._vouching is None:
            queues = self._trust.to_vouch_for()
            if not queues:
                return
            self._vouching = _Vouching(queues[0], self._pulse.epoch, self._unpushed())
        walk = self._vouching
        if walk.epoch != self._pulse.epoch or self._incident_at is not None:
            self._vouching = None
            return
        page = self._store.page(self.source.id, after=walk.after, limit=self._settings.page)
        old_enough = self._store.now() - (self._trust.rows[walk.queue].clean_since or 0.0)
        old = [
            owed
            for owed in page
            if owed.queue == walk.queue
            and owed.age > old_enough
            and owed.claim_number is None
            and owed.token not in walk.unpushed
        ]
        seen = self._broker.presence(old) if old else {}
        walk.absent += [
            (owed.token, Cause.UNTRUSTED, seen[owed.token].mark)
            for owed in old
            if seen[owed.token].presence is Presence.ABSENT
        ]
        if len(page) == self._settings.page:
            walk.after = page[-1].token
            return
        self._vouching = None
        if not self._pulse.stands():
            return  # it was flushed under our eyes: look again when that is dealt with
        self._store.suspect(term, self.source.id, walk.absent)
        self._store.trust(term, [self._trust.vouched(walk.queue)])
        say("queue_trusted", queue=walk.queue)
        if walk.absent:
            say("jobs_untrusted", queue=walk.queue, count=len(walk.absent))

    def _unpushed(self) -> set[UUID]:
        """What producers left to us: nobody can have run it yet."""
        found: set[UUID] = set()
        after: UUID | None = None
        while page := self._store.watched(self.source.id, after=after, limit=_WATCHED):
            after = page[-1].token
            found.update(owed.token for owed in page if told(owed))
        return found

    # -- looks -------------------------------------------------------------------------------------

    def _circumstances(self, term: int, now: float) -> Circumstances:
        assert self._judgement is not None
        live = self._judgement.live
        listed = {token for row in self._workers if row.id in live for token in row.lists}
        here = self._store.now()
        return Circumstances(
            judgeable=not self._judgement.unflushed and not self._judgement.silent,
            listed=listed,
            trusts=lambda queue, age: self._trust.trusts(queue, here - age),
            holds=lambda queue: self._brake.holds(self.source.id, queue),
            cause_of=lambda owed: self._cause_of(owed, now),
            too_many=lambda queue, absent: self._too_many(term, queue, absent),
        )

    def _cause_of(self, owed: Owed, now: float) -> Cause:
        if self._incident_at is not None and owed.age > now - self._incident_at:
            return Cause.INCIDENT
        for cause, until in self._doubt_until.items():
            if now < until:
                return cause
        death = self._deaths.get(owed.queue)
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
        say("queue_held", queue=queue, reason=reason)
        self._auto.forget(queue)
        return True

    def _doubts(self, now: float) -> None:
        """A change of topology, an eviction: look at everything now, and again a little later."""
        while self._pulse.doubts:
            cause = self._pulse.doubts.pop()
            self._doubt_until[cause] = now + _VERIFY_AGAIN[-1] + self._settings.sweep_interval
            self._verify_at = [now, *(now + wait for wait in _VERIFY_AGAIN)]
            say("verifying", source=self.source.address, cause=cause.value)
        if self._verify_at and now >= self._verify_at[0] and not self._lap.running:
            self._verify_at.pop(0)
            self._lap = _Lap(running=True, began=now)
            self._due["page"] = now

    def _look_at_urgent(self, term: int, now: float) -> None:
        """What we were told of goes first: a million lost jobs do not delay one killed worker's."""
        if now < self._due.get("urgent", 0.0):
            return
        page = self._store.watched(self.source.id, limit=_WATCHED, urgent=True)
        done = self._looker.look(term, page, self._circumstances(term, now)) if page else Done()
        self.done += done
        took = self._clock() - now
        acted = done.requeued or done.restored
        self._due["urgent"] = now if acted else now + max(_URGENT, 4 * took)

    def _look_at_watched(self, term: int, now: float) -> None:
        if now < self._due.get("watched", 0.0):
            return
        page = self._store.watched(self.source.id, after=self._watched_after, limit=_WATCHED)
        done = self._looker.look(term, page, self._circumstances(term, now))
        first, last = self._watched_after is None, len(page) < _WATCHED
        if first and not page:
            self._counted.clear()
        if not done.throttled and not (done.in_grace and self._incident_at is not None):
            # What waits for the limiter, or for its second look after a loss, keeps its place, and
            # with it the order of recording.
            self._watched_after = None if last else page[-1].token
        self._pending = done.waiting + (0 if last else 1)
        self._count(term, done, first and last)
        self._watched_took += self._clock() - now
        if done.requeued or done.restored:
            self._due["watched"] = now
        else:
            # Many that nothing can be done for now (a held queue) must not keep us from the others.
            quiet = max(self._settings.loss_grace / 4, 4 * self._watched_took) if last else 0.0
            self._due["watched"] = now + min(quiet, self._settings.grace)
        if last:
            self._watched_took = 0.0

    def _count(self, term: int, done: Done, whole: bool) -> None:
        self.done += done
        if self._incident_at is None or self._lap.running:
            return
        # The loss is dealt with when a whole walk is over and nobody is suspected for it any more.
        over = whole and not (done.waiting or done.held or done.restored or done.requeued)
        if self._incidents and done.restored[Cause.INCIDENT]:
            self._progress(term, restored=done.restored[Cause.INCIDENT])
        if over:
            for incident in self._incidents:
                self._store.progress(term, incident, missing=0, restored=0, close=True)
            self._incident_at = None
            self._incidents.clear()
            say("incident_closed", source=self.source.address)

    def _progress(self, term: int, *, missing: int = 0, restored: int = 0) -> None:
        self._store.progress(
            term, self._incidents[-1], missing=missing, restored=restored, close=False
        )

    def _look_at_young(self, term: int, now: float) -> None:
        """What was recorded in the last minute: a producer may have died before its push."""
        if now < self._due.get("young", 0.0) or self._incident_at is not None:
            return
        self._due["young"] = now + _FRESH
        after: UUID | None = token_at(self._store.now() - _YOUNG)
        for _ in range(_YOUNG_PAGES):
            page = self._store.page(self.source.id, after=after, limit=self._settings.page)
            old_enough = [owed for owed in page if owed.age > self._settings.push_deadline]
            self.done += self._looker.look(term, old_enough, self._circumstances(term, now))
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
        done = self._looker.look(term, page, self._circumstances(term, now))
        self.done += done
        self._pending += done.waiting  # the second looks are still to come: see settled
        if self._incidents:
            self._progress(term, missing=done.absent, restored=done.restored[Cause.INCIDENT])
        self._lap.pages += 1
        pages = max(1, sum(self._owed.values()) // self._settings.page + 1)
        took = self._clock() - now
        self._due["page"] = now + max(self._settings.sweep_interval / pages / 2, 5 * took)
        if len(page) < self._settings.page:
            self._lap.running = False
            self._lap.after = None
            self._laps_done += 1
            self._due["lap"] = self._lap.began + self._settings.sweep_interval
            self._due["watched"] = 0.0
        else:
            self._lap.after = page[-1].token
