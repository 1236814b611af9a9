"""A task with a spent crash budget: a worker reports its failure to Celery; the function never runs."""

from __future__ import annotations

import time
from typing import Any

import celery
import pytest
import redis
from celery.exceptions import Ignore

from jobguard.adapters.celery import sessions
from jobguard.adapters.celery.broker import CeleryBroker
from jobguard.model import Outcome
from tests.fakes.adapters import lost
from tests.integration.celery.support import FakeTracker, lists
from tests.integration.celery.test_fence import received


@pytest.fixture(autouse=True)
def session(tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process a worker."""
    session = tracker.open_session(name="w", queues=["celery"])
    monkeypatch.setattr(sessions, "session_for", lambda *_: session)


def waiting(client: redis.Redis) -> list[dict[str, Any]]:
    """Return the waiting messages."""
    return lists(client).get("celery", [])


def test_tasks_with_a_callback_or_a_chord_are_pushed_again(
    app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
) -> None:
    """A dead task is pushed if it has an error callback or is a member of a chord, and not otherwise."""
    add = app.tasks["add"]
    add.apply_async((1, 2))
    add.apply_async((1, 2), link_error=app.tasks["total"].s())
    celery.chord([add.s(1, 1)])(app.tasks["total"].s())
    pushed = [delivery.job_id for delivery in tracker.recorded[1:]]
    client.delete("celery")

    broker.report([lost(one) for one in tracker.recorded], deadline=time.time() + 60)

    found = {message["headers"]["id"]: message["headers"] for message in waiting(client)}
    assert set(found) == set(pushed)
    assert {headers["jobguard-dead"] for headers in found.values()} == {"1"}
    assert {headers["jobguard"] for headers in found.values()} == {
        delivery.token.hex for delivery in tracker.recorded[1:]
    }

    alone = lost(tracker.recorded[0])  # a worker is to learn of each dead task
    broker.report([alone], deadline=time.time() + 60, all_of_them=True)
    pushed.append(alone.job_id)
    assert {message["headers"]["id"] for message in waiting(client)} == set(pushed)


def test_too_late_is_not_at_all(
    app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
) -> None:
    """A leader after its deadline pushes nothing."""
    app.tasks["add"].apply_async((1, 2), link_error=app.tasks["total"].s())
    client.delete("celery")
    broker.report([lost(one) for one in tracker.recorded], deadline=time.time() - 1)
    assert not waiting(client)


def test_the_worker_tells_celery_and_runs_nothing(
    app: celery.Celery, tracker: FakeTracker, client: redis.Redis
) -> None:
    """The result is a failure and the error callback is sent; a copy without our header is skipped."""
    task, errback = app.tasks["add"], app.tasks["total"].s()
    task.apply_async((1, 2), task_id="a", link_error=errback)
    (delivery,) = tracker.recorded
    client.delete("celery")
    tracker.ended[delivery.token] = Outcome.DEAD
    request: dict[str, Any] = {"id": "a", "jobguard": delivery.token.hex, "errbacks": [errback]}
    request["delivery_info"] = {}

    with received(task, **request), pytest.raises(Ignore):
        task.before_start("a", (), {})
    assert app.AsyncResult("a").state == "PENDING"
    assert not waiting(client)

    with received(task, **request, **{"jobguard-dead": "1"}), pytest.raises(Ignore):
        task.before_start("a", (), {})
    assert app.AsyncResult("a").state == "FAILURE"
    assert [message["headers"]["task"] for message in waiting(client)] == ["total"]
