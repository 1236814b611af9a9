"""What a worker does before a task is begun."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import celery
import pytest
import redis
from celery.exceptions import Ignore

from jobguard.adapters.celery import fence, sessions
from jobguard.job import Outcome, new_token
from tests.integration.celery.support import FakeTracker


@pytest.fixture(autouse=True)
def session(tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process be a worker."""
    session = tracker.open_session(name="w", queues=["celery"])
    monkeypatch.setattr(sessions, "session_for", lambda *_: session)


@contextmanager
def received(task: Any, **request: Any) -> Iterator[None]:
    """Have the task be asked for in a message."""
    task.push_request(called_directly=False, args=(), kwargs={}, **request)
    try:
        yield
    finally:
        task.pop_request()


@pytest.mark.parametrize("away", [False, True], ids=["there", "postgres-away"])
def test_a_part_that_is_told_again_is_counted_and_not_run(
    app: celery.Celery, tracker: FakeTracker, client: redis.Redis, away: bool
) -> None:
    """Nor where Postgres cannot be asked whether it has ended: a leader has said so."""
    task, body = app.tasks["add"], app.tasks["total"].s()
    result = celery.chord([task.s(n, n) for n in range(2)])(body)
    assert result.parent is not None
    tracker.away, group, member = away, result.parent.id, tracker.recorded[0]
    tracker.ended[member.token] = Outcome.COMPLETED
    line = json.dumps([group, member.job_id, 0]).encode()
    left = line + b"\n" + app.backend.encode([1, member.job_id, "SUCCESS", 0]).encode()
    told = {"jobguard": member.token.hex, "jobguard-part": base64.b64encode(left).decode()}
    with received(task, id=member.job_id, group=group, chord=body, **told), pytest.raises(Ignore):
        task.before_start(member.job_id, (), {})
    assert not tracker.notes("start")
    assert client.zcard(f"celery-taskset-meta-{group}.j") == 1


def test_whatever_else_begins(app: celery.Celery, tracker: FakeTracker) -> None:
    """Its claim is asked for."""
    tracker.away, task, token = True, app.tasks["add"], new_token()
    with received(task, id="a", jobguard=token.hex):
        task.before_start("a", (), {})
    assert tracker.notes("start") == [[token.hex]]


@pytest.mark.parametrize("reached", [False, True], ids=["next-step", "result"])
def test_redis_fails_after_the_function_has_returned(
    app: celery.Celery, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    """It could not be sent what comes next: the task has failed. It could not be stored: it has not."""

    def fail(*_: object, **__: object) -> None:
        raise redis.ConnectionError("as it must")

    monkeypatch.setattr(app.backend, "set", fail)
    task = app.tasks["add"]
    with received(task, id="a", jobguard=new_token().hex):
        task.before_start("a", (), {})
        try:
            if reached:
                app.backend.mark_as_done("a", 3, task.request)
            raise redis.ConnectionError("as it must")
        except redis.ConnectionError:
            fence.after_the_run(sender=task, retval=3, state="SUCCESS")
    ((_, outcome, _),) = tracker.notes("end")
    assert outcome == ("completed" if reached else "failed")
