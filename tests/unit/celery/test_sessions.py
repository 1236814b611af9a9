"""The announcement of a worker that consumes other queues than at its start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import celery
import pytest

from jobguard.adapter import Source, Tracker
from jobguard.adapters.celery import lookup, sessions, worker
from tests.fakes.adapters import FakeSession, FakeTracker


class Redis:
    """The receiver of the announcement, which can be away."""

    def __init__(self) -> None:
        self.there = True
        self.named: list[str] = []

    def announcement(
        self, app: object, *, name: str, queues: Sequence[str], number: int
    ) -> Callable[[UUID], bool]:
        """Return an announcement function as the adapter does."""

        def again(session: UUID) -> bool:
            if self.there:
                self.named = list(queues)
            return self.there

        return again


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Redis:
    """Give a Redis that records the announcements of workers."""
    redis = Redis()
    monkeypatch.setattr(sessions, "announcement", redis.announcement)
    return redis


@pytest.fixture
def working(redis: Redis, tmp_path: Path) -> sessions.Working:
    """Give a worker that has begun to beat."""
    app: Any = celery.Celery("app", set_as_current=False)
    controller = SimpleNamespace(app=app, hostname="w@h", pool_cls="solo")
    tracker = FakeTracker(Source("n", "celery", "a"), tmp_path / "log")
    working = sessions.Working(controller, cast(Tracker, tracker))
    working.open()
    return working


def queues_in_beat(working: sessions.Working) -> list[str]:
    """Return the queues of its next beat."""
    working.lists()
    return cast(FakeSession, working.session).queues


def test_it_follows_what_it_consumes(redis: Redis, working: sessions.Working) -> None:
    """A change of queues is announced at once, long before the next regular announcement."""
    queues = working.controller.app.amqp.queues
    assert queues_in_beat(working) == redis.named == ["celery"]

    queues.select_add("added")
    working.follow()
    assert queues_in_beat(working) == redis.named == ["celery", "added"]

    queues.deselect("added")
    working.follow()
    assert queues_in_beat(working) == redis.named == ["celery"]


def test_a_queue_that_it_leaves_stays_in_its_beats_until_redis_drops_it(
    redis: Redis, working: sessions.Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue stays in the beats while Redis names it; else the worker would count as unguarded."""
    queues = working.controller.app.amqp.queues
    queues.select_add("added")
    working.follow()
    queues_in_beat(working)

    redis.there = False
    queues.deselect("added")
    working.follow()
    assert set(redis.named) <= set(queues_in_beat(working))

    redis.there = True
    monkeypatch.setattr(sessions, "_ANNOUNCE", 0.0)
    assert queues_in_beat(working) == redis.named == ["celery"]


def test_it_follows_although_its_connection_broke(
    redis: Redis, working: sessions.Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue added during a connection error is announced: Celery consumes it after the reconnect."""
    app = working.controller.app
    monkeypatch.setattr(sessions, "working_for", lambda _: working)

    def add(consumer: Any, queue: str) -> None:
        app.amqp.queues.select_add(queue)
        raise ConnectionError("as it must")

    with pytest.raises(ConnectionError):
        worker.queues_changed(add)(working.controller, "added")
    assert queues_in_beat(working) == redis.named == ["celery", "added"]


def test_our_failure_does_not_reach_the_host(
    working: sessions.Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery consumes the queue even if our announcement fails."""

    def broken(_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(sessions, "working_for", broken)
    assert worker.queues_changed(lambda _, queue: queue)(working.controller, "added") == "added"


class Request:
    """A request as the pool got it."""

    _already_cancelled = False

    def __init__(self, tag: str) -> None:
        self.message = SimpleNamespace(delivery_tag=tag)


def test_a_cancelled_run_is_not_in_the_backlog(working: sessions.Working) -> None:
    """Its message may go back although the request lives on, in a cycle of references."""
    runs, cancelled = Request("runs"), Request("cancelled")
    for request in (runs, cancelled):
        working.handed[request] = 0.0
    assert working.backlog() == {"runs", "cancelled"}
    cancelled._already_cancelled = True
    assert working.backlog() == {"runs"}


def test_one_of_several_workers_ends(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers in threads of a process share a session, which reports all queues and ends with the last."""
    tracker = FakeTracker(Source("n", "celery", "several"), tmp_path / "log")
    shared = FakeSession(tracker, "one@h", [])
    monkeypatch.setattr(tracker, "open_session", lambda **_: shared)
    monkeypatch.setattr(lookup, "tracker_for", lambda _: tracker)
    closes: list[bool] = []  # The session itself counts them.
    monkeypatch.setattr(shared, "close", lambda: closes.append(True))
    left: list[int] = []
    monkeypatch.setattr(sessions, "leave", lambda _, *, session, number: left.append(number))
    controllers = []
    for queue in ("one", "two"):
        app: Any = celery.Celery(queue, set_as_current=False)
        app.conf.task_default_queue = queue
        controllers.append(SimpleNamespace(app=app, hostname=f"{queue}@h", pool_cls="solo"))
    first, second = map(sessions.begin, controllers)
    assert first is not None and second is not None and first.session is second.session
    assert sessions.working_for(controllers[0].app) is first
    assert sorted(shared.queues) == ["one", "two"]

    sessions.end(controllers[0])
    sessions.end(controllers[0])
    assert left == [first.number] and shared.queues == ["two"] and len(closes) == 1
    assert sessions.working_for(controllers[0].app) is second
    sessions.count(cast(Tracker, tracker), 1)
    sessions.end(controllers[1])
    assert len(closes) == 1  # a thread still runs a task
    sessions.count(cast(Tracker, tracker), -1)
    sessions.end(controllers[1])
    assert len(closes) == 2 and left == [first.number, second.number]
