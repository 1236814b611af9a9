"""Turn requests into recorded deliveries, and due slots of schedules into requests.

SQL callers and schedules write requests. The leader renders each one with the adapter of its library, and
records the delivery together with its outbox row in the transaction that deletes the request. The push
follows as for every delivery in the outbox. This work needs no Redis: while Redis is away, the jobs wait
in the outbox.

The leader learns from the signs that there is something to do, within 0.75 seconds. It does not listen for
notifications: a NOTIFY takes a lock on the whole database at commit, which every transaction of a
trigger would wait for, and a pooler delivers none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

from jobguard import failpoint
from jobguard.adapter import Broker
from jobguard.errors import BadRow, JobguardError, NotLeading, StoreUnavailable
from jobguard.log import log_event
from jobguard.model import Delivery, Request, new_token
from jobguard.reconciler.result import PassResult
from jobguard.store.protocols import LeaderStore, Plan, ScheduleRow, Signs
from jobguard.timing import Timing, cron_of, jitter_of

_REST = 0.2
"""Seconds between two steps when nothing waits."""
_REQUESTS = 500
_BYTES = 4 << 20
"""Requests, and bytes of their arguments, that are taken in one step."""
_SCHEDULES = 100
_SLOTS = 100
"""Missed slots of one schedule that are fired in one step."""
LATE = 30.0
"""Seconds after which a slot counts as missed with ``catch_up="skip"``; a change of leaders is shorter."""
_FORGET = 3600.0


class Requests:
    """The requests and the schedules of one namespace, while this process leads."""

    def __init__(
        self,
        store: LeaderStore,
        namespace: str,
        brokers: Mapping[int, Broker],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._brokers = brokers
        self._clock = clock
        self._forget_at = clock()
        self.rest = _REST
        """Seconds until the next step. Without a sign it asks nothing, so that it can come soon."""
        self.finished = False
        """True if nothing was due in the last step."""
        self.result = PassResult()

    def step(self, term: int, signs: Signs) -> None:
        """Fire what is due, then record what was requested. Raises NotLeading and StoreUnavailable."""
        if self._clock() >= self._forget_at:
            self._forget_at = self._clock() + _FORGET
            self._store.forget_slots()
        self.rest, self.finished = _REST, not signs.requested
        if self.finished:
            return
        schedules = self._store.due_schedules(limit=_SCHEDULES)
        now = self._store.now() if schedules else 0.0
        for schedule in schedules:
            self._fire(term, schedule, now)
        sources = list(self._brokers)  # another thread may add one
        waiting = self._store.requests(sources, limit=_REQUESTS, most_bytes=_BYTES)
        accepted = self._accept(term, waiting) if waiting else 0
        if accepted or schedules:
            self.rest = 0.0
        self.finished = not (schedules or waiting)

    def close(self) -> None:
        """Do nothing: there is no other connection than that of the runner."""

    def _fire(self, term: int, schedule: ScheduleRow, now: float) -> None:
        try:
            plan = plan_for(schedule, self._namespace, now)
            failpoint.hit("before_fire", when=bool(plan.slots))
            fired = self._store.fire(term, schedule, plan)
        except (NotLeading, StoreUnavailable):
            raise
        except Exception as error:  # SQL takes schedules that Python, or the next slot, cannot have
            text = _text(error)
            log_event("schedule_wrong", schedule=schedule.name, error=text)
            self._store.fail_schedule(term, schedule, text)
            return
        failpoint.hit("after_fire", when=fired > 0)
        if plan.skipped:
            log_event("slots_skipped", schedule=schedule.name, count=plan.skipped)

    def _accept(self, term: int, waiting: Sequence[Request]) -> int:
        rendered: dict[int, list[tuple[int, Delivery]]] = {}
        for request in waiting:
            if request.unreadable:
                self._hold(term, request, request.unreadable)
                continue
            try:
                delivery = self._brokers[request.source].render(request, new_token())
            except Exception as error:
                self._hold(term, request, _text(error))
            else:
                rendered.setdefault(request.source, []).append((request.id, delivery))
        for source, deliveries in rendered.items():
            self._record(term, source, deliveries)
        return sum(map(len, rendered.values()))

    def _record(self, term: int, source: int, rendered: list[tuple[int, Delivery]]) -> None:
        try:
            self._store.accept(term, source, rendered)
        except BadRow as error:
            # One row that the database refuses must not stop the others.
            if len(rendered) == 1:
                self._store.hold_request(term, rendered[0][0], str(error)[:500])
                log_event("request_held", job_id=rendered[0][1].job_id, error=str(error)[:500])
                return
            half = len(rendered) // 2
            self._record(term, source, rendered[:half])
            self._record(term, source, rendered[half:])
        else:
            failpoint.hit("after_accept")

    def _hold(self, term: int, request: Request, error: str) -> None:
        log_event("request_held", job_id=request.job_id, task=request.task, error=error)
        self._store.hold_request(term, request.id, error)


def _text(error: Exception) -> str:
    known = isinstance(error, JobguardError)
    return (str(error) if known else f"{type(error).__name__}: {error}")[:500]


def plan_for(schedule: ScheduleRow, namespace: str, now: float) -> Plan:
    """Return what to do about a due schedule at this time of the database. Raises any error."""
    timing = Timing(
        anchor=float(int(schedule.created_at)),
        cron=cron_of(json.loads(schedule.rule)) if schedule.rule is not None else schedule.cron,
        every=schedule.every,
        timezone=schedule.timezone,
        start=schedule.starts_at,
        end=schedule.ends_at,
    )
    identity = f"{namespace}/{schedule.name}"

    def then(slot: float | None, fired: Sequence[float] = (), skipped: int = 0) -> Plan:
        fire_at = None if slot is None else slot + jitter_of(identity, slot, schedule.jitter)
        return Plan(fired, slot, fire_at, skipped)

    if schedule.next_at is None:
        return then(timing.after(now))
    due = timing.due(schedule.next_at, now)
    ready = list(takewhile(lambda s: s + jitter_of(identity, s, schedule.jitter) <= now, due.slots))
    if not ready or due.newest is None:
        return then(schedule.next_at)
    if schedule.catch_up == "all":
        chosen = ready[:_SLOTS]
        return then(timing.after(chosen[-1]), chosen)
    newest = ready[-1] if due.newest == due.slots[-1] else due.newest
    if schedule.catch_up == "one":
        return then(timing.after(newest), [newest], len(ready) - (newest in ready))
    fresh = [s for s in ready if now - s <= LATE + schedule.jitter]
    return then(timing.after(newest), fresh, len(ready) - len(fresh))
