"""What a worker says of itself, when it consumes other queues than it began with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import celery
import pytest

from jobguard.adapter import Source, Tracker
from jobguard.adapters.celery import sessions, worker
from tests.fakes.adapters import FakeSession, FakeTracker


class Redis:
    """What the announcement reaches, if it is there."""

    def __init__(self) -> None:
        self.there = True
        self.named: list[str] = []

    def announcement(
        self, app: object, *, name: str, queues: Sequence[str]
    ) -> Callable[[UUID], bool]:
        """As that of the adapter."""

        def again(session: UUID) -> bool:
            if self.there:
                self.named = list(queues)
            return self.there

        return again


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> Redis:
    """Give a Redis that hears what workers say."""
    redis = Redis()
    monkeypatch.setattr(sessions, "announcement", redis.announcement)
    monkeypatch.setattr(sessions, "Unacked", lambda *_, **__: None)
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


def listed(working: sessions.Working) -> list[str]:
    """Return the queues of its next beat."""
    working.lists()
    return cast(FakeSession, working.session).queues


def test_it_follows_what_it_consumes(redis: Redis, working: sessions.Working) -> None:
    """At once, long before it would say again that it is there."""
    queues = working.controller.app.amqp.queues
    assert listed(working) == redis.named == ["celery"]

    queues.select_add("added")
    working.follow()
    assert listed(working) == redis.named == ["celery", "added"]

    queues.deselect("added")
    working.follow()
    assert listed(working) == redis.named == ["celery"]


def test_a_queue_that_it_leaves_is_on_its_list_until_redis_has_heard(
    redis: Redis, working: sessions.Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named there and not in its beats, it would be an unguarded worker: nobody recovers such a queue."""
    queues = working.controller.app.amqp.queues
    queues.select_add("added")
    working.follow()
    listed(working)

    redis.there = False
    queues.deselect("added")
    working.follow()
    assert set(redis.named) <= set(listed(working))

    redis.there = True
    monkeypatch.setattr(sessions, "_ANNOUNCE", 0.0)
    assert listed(working) == redis.named == ["celery"]


def test_it_follows_although_its_connection_broke(
    redis: Redis, working: sessions.Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery consumes what was added as soon as it has connected again; its error stays its own."""
    app = working.controller.app
    monkeypatch.setattr(sessions, "working_for", lambda _: working)

    def add(consumer: Any, queue: str) -> None:
        app.amqp.queues.select_add(queue)
        raise ConnectionError("as it must")

    with pytest.raises(ConnectionError):
        worker.consumes_others(add)(working.controller, "added")
    assert listed(working) == redis.named == ["celery", "added"]


def test_what_goes_wrong_with_us_is_not_the_hosts(
    working: sessions.Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue is consumed all the same."""

    def broken(_: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(sessions, "working_for", broken)
    assert worker.consumes_others(lambda _, queue: queue)(working.controller, "added") == "added"
