"""A task that a person cancels stays cancelled: the tombstone is written before Redis is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import celery
import pytest
import redis
from celery.bin.base import CLIContext
from celery.bin.control import control
from celery.bin.purge import purge as program
from celery.canvas import StampingVisitor
from click.testing import CliRunner
from kombu.pidbox import Mailbox

from jobguard.model import Outcome
from tests.integration.celery.support import FakeTracker, take

Make = Callable[..., celery.Celery]
Guard = Callable[[celery.Celery], FakeTracker]


class TestRevoke:
    """Tasks that are revoked in any way."""

    def test_by_id(self, app: celery.Celery, tracker: FakeTracker) -> None:
        """One id, several ids, through a result, and with terminate: all are recorded."""
        results = [app.tasks["add"].delay(n) for n in range(5)]
        app.control.revoke(results[0].id)
        app.control.revoke([results[1].id, results[2].id])
        results[3].revoke()
        app.control.terminate(results[4].id)
        assert not tracker.owed
        assert set(tracker.ended.values()) == {Outcome.CANCELLED}

    def test_before_the_workers_are_informed(
        self, app: celery.Celery, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Our tombstone comes first."""
        result = app.tasks["add"].delay(1)
        seen = []
        monkeypatch.setattr(Mailbox, "_broadcast", lambda *_, **__: seen.append(len(tracker.ended)))
        app.control.revoke(result.id)
        assert seen == [1]

    def test_for_some_workers_only(self, app: celery.Celery, tracker: FakeTracker) -> None:
        """A revoke for some workers only is not recorded, because other workers may run the task."""
        result = app.tasks["add"].delay(1)
        app.control.revoke(result.id, destination=["w1@h"])
        app.control.revoke(result.id, pattern="w1@*", matcher="pcre")
        assert not tracker.ended

    @pytest.mark.parametrize("command", ["revoke a b", "terminate SIGKILL a b"])
    def test_command(self, app: celery.Celery, tracker: FakeTracker, command: str) -> None:
        """A revoke from the command line is recorded, although it calls no method for revokes."""
        for job_id in "abc":
            app.tasks["add"].apply_async((1,), task_id=job_id)
        CliRunner().invoke(
            control, ["-t", "0.1", *command.split()], obj=CLIContext(app, True, False)
        )
        assert {one.job_id for one in tracker.recorded if one.token in tracker.ended} == {"a", "b"}

    def test_by_stamps(self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis) -> None:
        """A revoke by stamp cancels the deliveries with that stamp, waiting or taken."""

        class Visitor(StampingVisitor):  # type: ignore[misc]
            def __init__(self, value: str) -> None:
                self._value = value

            def on_signature(self, sig: Any, **_: Any) -> dict[str, Any]:
                return {"customer": self._value, "stamped_headers": ["customer"]}

        for value in ("a", "b", "a"):
            sig = app.tasks["add"].s(1, 2)
            sig.stamp(Visitor(value))
            sig.apply_async()
        app.tasks["add"].delay(1)
        take(client)
        app.control.revoke_by_stamped_headers({"customer": ["a", "c"]})
        first, second, third, _ = tracker.recorded
        assert set(tracker.ended) == {first.token, third.token}
        command = ["-t", "0.1", "revoke_by_stamped_headers", "customer=b"]
        CliRunner().invoke(control, command, obj=CLIContext(app, True, False))
        assert set(tracker.ended) == {first.token, second.token, third.token}


class TestPurge:
    """Queues that are purged by any command."""

    @pytest.fixture
    def three(self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis) -> list[Any]:
        """Return three deliveries; the first is with a worker, and not in its queue."""
        for priority in (0, 0, 9):
            app.tasks["add"].apply_async((1,), priority=priority)
        take(client)
        return tracker.recorded

    @pytest.mark.parametrize("name", ["purge", "discard_all"])
    def test_control(
        self, name: str, app: celery.Celery, tracker: FakeTracker, three: list[Any]
    ) -> None:
        """A purge from a program cancels all waiting deliveries, and none that a worker has taken."""
        assert getattr(app.control, name)() == 2
        assert set(tracker.ended) == {three[1].token, three[2].token}

    def test_command(self, app: celery.Celery, tracker: FakeTracker, three: list[Any]) -> None:
        """A purge from the command line cancels them too."""
        done = CliRunner().invoke(program, ["-f"], obj=CLIContext(app, True, False))
        assert "Purged 2 messages" in done.output
        assert set(tracker.ended) == {three[1].token, three[2].token}

    @pytest.mark.parametrize("declared", [True, False])
    @pytest.mark.parametrize("if_empty", [True, False])
    def test_deleted_queue(
        self,
        declared: bool,
        if_empty: bool,
        app: celery.Celery,
        tracker: FakeTracker,
        three: list[Any],
        client: redis.Redis,
    ) -> None:
        """The deletion of a queue cancels its deliveries, if kombu really deletes the queue."""
        with app.connection_for_write() as connection:
            queue = app.amqp.queues["celery"](connection.default_channel)
            if declared:
                queue.declare()
            queue.delete(if_empty=if_empty)
        gone = set() if client.exists("celery") else {three[1].token, three[2].token}
        assert bool(gone) is (declared and not if_empty)
        assert set(tracker.ended) == gone

    def test_prefix(self, make_app: Make, guard: Guard) -> None:
        """A purge works under a key prefix."""
        app = make_app(broker_transport_options={"global_keyprefix": "me:"})
        tracker = guard(app)
        app.tasks["add"].delay(1)
        assert app.control.purge() == 1
        assert len(tracker.ended) == 1

    def test_replies_are_no_tasks(
        self, app: celery.Celery, tracker: FakeTracker, three: list[Any]
    ) -> None:
        """The deletion of a reply queue cancels nothing."""
        app.control.ping(timeout=0.1)
        assert not tracker.cancelled
