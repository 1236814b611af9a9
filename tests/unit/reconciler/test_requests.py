"""Schedules and requests while leaders die, are stale, or have wrong clocks."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest

from jobguard.errors import NotLeading, StoreUnavailable
from jobguard.reconciler.requests import Requests, plan_for
from jobguard.store.protocols import LeaderStore, Plan, ScheduleRow, Signs
from jobguard.timing import jitter_of
from tests.fakes.store import MemoryLedger
from tests.fakes.store.tables import Schedule
from tests.fakes.world import NAMESPACE, SOURCE, Clock, FakeBroker, FakeRedis, source_row

BERLIN = ZoneInfo("Europe/Berlin")
DAY = 86400.0


class Dying:
    """A store whose leader is sometimes killed before a write, and sometimes after it."""

    def __init__(self, store: LeaderStore, stage: Stage) -> None:
        self._store, self._stage = store, stage

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        if name not in ("fire", "accept"):
            return call

        def write(*args: Any) -> Any:
            drawn = self._stage.random.random()
            if drawn < self._stage.failing / 2:
                raise StoreUnavailable("killed before the write")
            answer = call(*args)
            if drawn < self._stage.failing:
                raise StoreUnavailable("killed after the write")
            return answer

        return write


class Stage:
    """A namespace with one source, and the leaders that follow each other."""

    def __init__(self, at: float = 1e9) -> None:
        self.at = at
        self.ledger = MemoryLedger(clock=lambda: self.at)
        self.tables = self.ledger._tables
        self.ledger.host().register(source_row())
        self.random = random.Random(1)
        self.failing = 0.0
        self.deaths = 0
        self.stale: tuple[Requests, int] | None = None
        self.requests: Requests
        self.term: int
        self.lead()

    def lead(self) -> None:
        """Let a new process lead. The one before does not know that its term is over."""
        if NAMESPACE in self.tables.leases:
            self.stale = self.requests, self.term
            self.tables.leases[NAMESPACE].expires_at = self.at
        store: Any = Dying(self.ledger.leader(NAMESPACE, uuid4()), self)
        self.term = store.elect(lease=1e12)
        skew = self.random.uniform(-1e6, 1e6)
        broker: Any = FakeBroker(FakeRedis(Clock()))
        self.requests = Requests(
            store, NAMESPACE, {SOURCE.id: broker}, clock=lambda: self.at * 1.5 + skew
        )

    def schedule(self, name: str = "s", *, task: str = "app.task", **more: Any) -> Schedule:
        """Add a schedule."""
        given: dict[str, Any] = {
            **dict.fromkeys(("cron", "every", "rule", "starts_at", "ends_at", "next_at")),
            **{"timezone": "UTC", "jitter": 0.0, "catch_up": "one", "version": uuid4()},
        }
        row = ScheduleRow(name, **{**given, "created_at": self.at, **more})
        made = self.tables.schedules[NAMESPACE, name] = Schedule(
            NAMESPACE, SOURCE.id, row, task=task
        )
        return made

    def step(self, *, after: float = 0.0) -> None:
        """Make time pass, and let the leader make a step."""
        self.at += after
        try:
            self.requests.step(self.term, Signs())
        except StoreUnavailable:
            self.deaths += 1
            self.lead()

    def fired(self, name: str = "s") -> list[float]:
        """Return the slots that were fired."""
        return sorted(slot for _, schedule, slot in self.tables.slots if schedule == name)

    def owed(self) -> Counter[str]:
        """Return how often each job id is owed."""
        return Counter(job.delivery.job_id for job in self.tables.jobs.values())


def test_each_slot_of_a_year_fires_once_whatever_happens_to_the_leaders() -> None:
    """A year with two changes of the clocks, killed and stale leaders, and clocks that are wrong."""
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    stage = Stage(begin.timestamp())
    stage.failing = 0.1
    stage.schedule("local", cron="0 */4 * * *", timezone="Europe/Berlin", catch_up="all")
    stage.schedule("daily", cron="30 2 * * *", timezone="Europe/Berlin", catch_up="all")
    stage.schedule("grid", every=6 * 3600.0, catch_up="all")
    stage.schedule("spread", cron="0 12 * * *", catch_up="all", jitter=600.0)
    stage.step()
    end = stage.at + 365 * DAY
    while stage.at < end:
        stage.step(after=stage.random.choice([1.0, 600.0, 4 * 3600.0, 30 * 3600.0]))
        if stage.stale is not None and stage.random.random() < 0.1:
            requests, term = stage.stale
            with suppress(NotLeading, StoreUnavailable):
                requests.step(term, Signs())
    stage.failing = 0.0
    stage.step(after=DAY)
    stage.step()
    ended = stage.at

    hours = [
        begin + timedelta(hours=n) for n in range(int((ended - begin.timestamp()) // 3600) + 1)
    ]
    local = [hour.astimezone(BERLIN) for hour in hours[1:]]
    assert stage.fired("local") == [h.timestamp() for h in local if h.hour % 4 == 0]
    days = [(begin + timedelta(days=n)).date() for n in range(370)]
    half_past_two = [datetime(d.year, d.month, d.day, 2, 30, tzinfo=BERLIN) for d in days]
    skipped = datetime(2026, 3, 29, 3, 0, tzinfo=BERLIN)  # there is no 02:30 on that day
    at = [(skipped if d.date() == skipped.date() else d).timestamp() for d in half_past_two]
    assert stage.fired("daily") == [t for t in at if begin.timestamp() < t <= ended]
    assert stage.fired("grid") == [h.timestamp() for h in hours[6::6]]
    noons = [h.timestamp() for h in hours if h.hour == 12]
    assert stage.fired("spread") == [
        t for t in noons if t + jitter_of(f"{NAMESPACE}/spread", t, 600.0) <= ended
    ]
    # Every slot became one job, and no other job is owed.
    assert stage.deaths > 100
    assert stage.owed() == Counter(stage.tables.slots.values())
    assert stage.tables.requests == {}
    assert all(unsent for _, unsent in stage.tables.outbox.values())


@pytest.mark.parametrize(
    ("catch_up", "fires", "skips"),
    [("one", [0], 9), ("all", list(range(-9, 1)), 0), ("skip", [0], 9)],
)
def test_slots_that_nobody_led_in_are_made_up_for_as_wanted(
    catch_up: str, fires: list[int], skips: int
) -> None:
    """After ten slots without a leader, the newest fires, or all of them, or those that are not late."""
    stage = Stage()
    schedule = stage.schedule(every=60.0, catch_up=catch_up)
    stage.step()
    stage.step(after=605.0)
    assert stage.fired() == [1e9 + 600 + 60 * n for n in fires]
    assert schedule.skipped == skips
    assert schedule.row.next_at == 1e9 + 660


def test_a_late_slot_is_skipped_if_the_schedule_says_so() -> None:
    """With catch_up="skip" nothing fires if the newest slot is more than 30 seconds late."""
    stage = Stage()
    schedule = stage.schedule(every=600.0, catch_up="skip")
    stage.step()
    stage.step(after=640.0)
    assert (stage.fired(), schedule.skipped) == ([], 1)


def test_a_year_of_missed_seconds_is_made_up_for_by_one_run() -> None:
    """A schedule of one second that nobody led for a year plans its next slot at once."""
    stage = Stage()
    stage.schedule(every=1.0)
    stage.step()
    stage.step(after=365 * DAY)
    assert stage.fired() == [stage.at]


def test_missed_slots_fire_in_pages() -> None:
    """A schedule that makes up for many slots does so a hundred at a time, in their order."""
    stage = Stage()
    stage.schedule(every=1.0, catch_up="all")
    stage.step()
    stage.step(after=250.0)
    assert stage.fired() == [1e9 + n for n in range(1, 101)]
    stage.step()
    stage.step()
    assert stage.fired() == [1e9 + n for n in range(1, 251)]


def test_a_schedule_ends() -> None:
    """After its last slot a schedule is finished."""
    stage = Stage()
    schedule = stage.schedule(every=60.0, ends_at=1e9 + 90)
    stage.step()
    stage.step(after=61.0)
    stage.step(after=600.0)
    assert (stage.fired(), schedule.finished) == ([1e9 + 60], True)


def test_a_wrong_schedule_stops_no_other() -> None:
    """A schedule from SQL that cannot be planned keeps its error, and the others fire."""
    stage = Stage()
    wrong = stage.schedule("wrong", cron="61 * * * *")
    stage.schedule("right", every=60.0)
    stage.step()
    stage.step(after=61.0)
    assert wrong.error is not None and "Bad minute" in wrong.error
    assert stage.fired("right") == [1e9 + 60]


@pytest.mark.parametrize("wrong", [{"starts_at": 1e12, "cron": "0 0 * * *"}, {"rule": "1"}])
def test_a_schedule_that_python_cannot_compute_stops_no_other(wrong: dict[str, Any]) -> None:
    """A start in the year 33658, or a rule that is a number, is the error of this schedule alone."""
    stage = Stage()
    failed = stage.schedule("wrong", **wrong)
    stage.schedule("right", every=60.0)
    stage.step()
    stage.step(after=61.0)
    assert failed.error
    assert stage.fired("right") == [1e9 + 60]


def test_a_request_that_cannot_be_rendered_is_held_and_stops_no_other() -> None:
    """The reason stays with the request; what comes after it is recorded."""
    stage = Stage()
    stage.schedule("bad", every=60.0, task="wrong")
    stage.schedule("good", every=60.0)
    stage.step()
    stage.step(after=61.0)
    assert list(stage.tables.held_requests.values()) == ["a wrong task"]
    assert sum(stage.owed().values()) == 1


def test_a_row_that_the_database_refuses_is_held_alone() -> None:
    """If the database refuses one of many deliveries, the others are recorded."""
    stage = Stage()
    for name in ("a", "b", "c"):
        stage.schedule(name, every=60.0, task=f"task {name}")
    stage.ledger.refuse(lambda text: text == "task b")
    stage.step()
    stage.step(after=61.0)
    assert len(stage.tables.held_requests) == 1
    assert sum(stage.owed().values()) == 2


def test_a_slot_waits_for_its_jitter() -> None:
    """A slot with jitter fires later, and it is the slot itself that counts for the next one."""
    stage = Stage()
    schedule = stage.schedule(every=600.0, jitter=300.0)
    stage.step()
    wait = jitter_of(f"{NAMESPACE}/s", 1e9 + 600, 300.0)
    assert schedule.fire_at == 1e9 + 600 + wait
    assert plan_for(schedule.row, NAMESPACE, 1e9 + 600 + wait - 1) == Plan(
        (), 1e9 + 600, schedule.fire_at
    )
    stage.step(after=600 + wait)
    assert stage.fired() == [1e9 + 600]
