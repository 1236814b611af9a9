"""The actions of a worker before a task begins."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import celery
import pytest
import redis
from celery.app.task import Context
from celery.exceptions import Ignore

from jobguard.adapters.celery import fence, sessions
from jobguard.adapters.celery.run import current_run
from jobguard.model import Outcome, new_token
from tests.integration.celery.support import FakeTracker


@pytest.fixture(autouse=True)
def session(tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process a worker."""
    session = tracker.open_session(name="w", queues=["celery"])
    monkeypatch.setattr(sessions, "session_for", lambda *_: session)


@contextmanager
def received(task: Any, **request: Any) -> Iterator[None]:
    """Make a request for the task from a message."""
    task.push_request(called_directly=False, args=(), kwargs={}, **request)
    try:
        yield
    finally:
        task.pop_request()
        if run := current_run():  # or the next test of this thread would be inside of it
            run.leave()


@pytest.mark.parametrize("away", [False, True], ids=["there", "postgres-away"])
def test_a_part_that_is_pushed_again_is_counted_and_not_run(
    app: celery.Celery, tracker: FakeTracker, client: redis.Redis, away: bool
) -> None:
    """A part that a leader pushed again is counted and not run, also while Postgres is away."""
    task, body = app.tasks["add"], app.tasks["total"].s()
    result = celery.chord([task.s(n, n) for n in range(2)])(body)
    assert result.parent is not None
    tracker.away, group, member = away, result.parent.id, tracker.recorded[0]
    tracker.ended[member.token] = Outcome.COMPLETED
    line = json.dumps([group, member.job_id, 0]).encode()
    left = line + b"\n" + app.backend.encode([1, member.job_id, "SUCCESS", 0]).encode()
    headers = {"jobguard": member.token.hex, "jobguard-part": base64.b64encode(left).decode()}
    with (
        received(task, id=member.job_id, group=group, chord=body, **headers),
        pytest.raises(Ignore),
    ):
        task.before_start(member.job_id, (), {})
    assert not tracker.notes("start")
    assert client.zcard(f"celery-taskset-meta-{group}.j") == 1


def test_every_other_start_claims(app: celery.Celery, tracker: FakeTracker) -> None:
    """Every start of a task asks for its claim."""
    tracker.away, task, token = True, app.tasks["add"], new_token()
    with received(task, id="a", jobguard=token.hex):
        task.before_start("a", (), {})
    assert tracker.notes("start") == [[token.hex]]


@pytest.mark.parametrize("reached", [False, True], ids=["next-step", "result"])
def test_redis_fails_after_the_function_has_returned(
    app: celery.Celery, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    """A task has failed if its next tasks could not be sent, and not if its result could not be stored."""

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
            fence.run_ended(sender=task, retval=3, state="SUCCESS")
    ((_, outcome, _),) = tracker.notes("end")
    assert outcome == ("completed" if reached else "failed")


def test_a_pool_that_asks_in_another_thread(app: celery.Celery, tracker: FakeTracker) -> None:
    """celery-aio-pool shows ``before_start`` one request for all tasks, and the tracer another."""
    task, tokens = app.tasks["add"], [new_token() for _ in range(2)]
    for token in tokens:
        context = Context(id=token.hex, args=(), kwargs={}, jobguard=token.hex)
        context.update(called_directly=False, is_eager=False)
        task.request.update(vars(context))  # of no task: the stack is empty
        thread = threading.Thread(target=task.before_start, args=(token.hex, (), {}))
        thread.start()
        thread.join()
        task.request_stack.push(context)
        try:
            fence.run_ended(sender=task, retval=3, state="SUCCESS")
        finally:
            task.request_stack.pop()
    assert tracker.notes("start") == [[token.hex] for token in tokens]
    assert [outcome for _, outcome, _ in tracker.notes("end")] == ["completed"] * 2


def test_a_refused_copy_does_not_change_the_run_that_goes_on(
    app: celery.Celery, tracker: FakeTracker
) -> None:
    """Two copies have the same token, and requests of their own."""
    task, token = app.tasks["add"], new_token()
    with received(task, id="a", jobguard=token.hex):
        task.before_start("a", (), {})
        tracker.live_elsewhere.add(token)
        copy = Context(id="a", args=(), kwargs={}, jobguard=token.hex, called_directly=False)
        task.request_stack.push(copy)
        with pytest.raises(Ignore):
            task.before_start("a", (), {})
        fence.run_ended(sender=task, retval=None, state="IGNORED")
        task.request_stack.pop()
        assert not tracker.notes("end")
        fence.run_ended(sender=task, retval=3, state="SUCCESS")
    assert [outcome for _, outcome, _ in tracker.notes("end")] == ["completed"]
