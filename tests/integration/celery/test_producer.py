"""Every publish is recorded before it is sent, by every route."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any
from unittest.mock import MagicMock

import celery
import pytest
import redis
from celery import chain, chord, group
from celery.beat import ScheduleEntry, Scheduler
from celery.bin.base import CLIContext
from celery.bin.call import call as program
from celery.signals import before_task_publish
from click.testing import CliRunner
from kombu.common import Broadcast
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from jobguard.adapters.celery import CeleryAdapter, backend
from jobguard.adapters.celery import run as runs
from jobguard.adapters.celery.producer import hook_app
from jobguard.adapters.celery.run import Run, joining
from jobguard.demo.servers import RedisServer
from jobguard.errors import StoreUnavailable
from jobguard.model import Claim, Outcome, Recorded, derived_token
from jobguard.registry import registered_tracker
from tests.integration.celery.support import FakeTracker, lists

Make = Callable[..., celery.Celery]
Guard = Callable[[celery.Celery], FakeTracker]


def tokens(client: redis.Redis) -> list[str | None]:
    """Return the tokens of all waiting messages, in the order of sending."""
    waiting = [m for messages in lists(client).values() for m in reversed(messages)]
    return [message["headers"].get("jobguard") for message in waiting]


class TestRecord:
    """The record comes first."""

    def test_before_redis(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis
    ) -> None:
        """At the time of the record, Redis has nothing of the message."""
        seen = []
        tracker.before_record = lambda: seen.append(client.llen("celery"))
        app.tasks["add"].delay(1, 2)
        assert seen == [0]
        assert tokens(client) == [tracker.recorded[0].token.hex]

    def test_headers_of_receivers_are_recorded(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis
    ) -> None:
        """A receiver of before_task_publish may write headers, as tracing does."""

        def trace(headers: dict[str, Any], **_: Any) -> None:
            headers["trace"] = "abc"

        before_task_publish.connect(trace)
        try:
            app.tasks["add"].delay(1, 2)
        finally:
            before_task_publish.disconnect(trace)
        assert b'"trace": "abc"' in tracker.recorded[0].envelope

    def test_postgres_away_and_the_user_wants_the_error(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis
    ) -> None:
        """If the record is refused, nothing is sent."""

        def away() -> None:
            raise StoreUnavailable

        tracker.before_record = away
        with pytest.raises(StoreUnavailable):
            app.tasks["add"].delay(1, 2)
        assert not client.exists("celery")

    def test_our_own_failure(
        self,
        app: celery.Celery,
        tracker: FakeTracker,
        client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """If jobguard fails, the host sends as without it."""

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("ours")

        monkeypatch.setattr("jobguard.adapters.celery.producer.target_of", broken)
        app.tasks["add"].delay(1, 2)
        assert tokens(client) == [None] and not tracker.recorded

    def test_their_failure(self, app: celery.Celery, tracker: FakeTracker) -> None:
        """A body that cannot be serialised raises the same error as without jobguard."""
        with pytest.raises(Exception, match="not JSON serializable"):
            app.tasks["add"].delay(object())
        assert not tracker.recorded

    def test_a_queue_that_redis_cannot_have(self, app: celery.Celery, tracker: FakeTracker) -> None:
        """A task whose queue has no UTF-8 name raises as before, and is not owed."""
        with pytest.raises(UnicodeEncodeError):
            app.tasks["add"].apply_async((1, 2), queue="half a pair: \ud800")
        assert tracker.recorded == []

    def test_events_go_by(self, make_app: Make, guard: Guard, client: redis.Redis) -> None:
        """The event of a sent task is not recorded as a task."""
        app = make_app(task_send_sent_event=True)
        tracker = guard(app)
        app.tasks["add"].delay(1, 2)
        assert len(tracker.recorded) == 1 and tokens(client) == [tracker.recorded[0].token.hex]


class TestWays:
    """All routes pass through the hook."""

    def test_producer_and_connection(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis, redis_url: str
    ) -> None:
        """A connection or producer of the user's own, to the same broker, is guarded."""
        with Connection(redis_url) as connection:
            app.tasks["add"].apply_async((1,), connection=connection)
            with app.amqp.Producer(connection, auto_declare=False) as producer:
                app.tasks["add"].apply_async((2,), producer=producer)
        assert tokens(client) == [delivery.token.hex for delivery in tracker.recorded]
        assert len(tracker.recorded) == 2

    def test_another_broker(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis, redis_url: str
    ) -> None:
        """A connection to another broker is not guarded."""
        db = client.connection_pool.connection_kwargs["db"]
        other = f"{redis_url.rpartition('/')[0]}/{(db + 7) % 15 + 1}"
        with Connection(other) as connection, redis.Redis.from_url(other) as there:
            app.tasks["add"].apply_async((1,), connection=connection)
            assert tokens(there) == [None]
            there.flushdb()
        assert not tracker.recorded

    def test_broadcast(self, make_app: Make, guard: Guard) -> None:
        """A broadcast is not recorded, nor is a control command."""
        app = make_app(task_queues=[Broadcast("all"), Queue("celery")])
        tracker = guard(app)
        app.tasks["add"].apply_async((1,), queue="all")
        app.tasks["add"].apply_async((1,), exchange=Exchange("e", "fanout"), routing_key="k")
        app.control.ping(timeout=0.1)
        assert not tracker.recorded

    def test_headers_that_were_inherited(
        self, make_app: Make, redis_url: str, client: redis.Redis
    ) -> None:
        """An unguarded message carries no header of ours, even if its sender's message had them."""
        app = make_app()
        headers = {"jobguard": "a" * 32, "jobguard-worker": "b" * 32, "mine": 1}
        CeleryAdapter().sources(app, namespace="t", name=None)
        hook_app(app)
        app.tasks["add"].apply_async((1,), headers=headers)
        (message,) = lists(client)["celery"]
        assert message["headers"]["mine"] == 1 and len(headers) == 3
        assert not [name for name in message["headers"] if name.startswith("jobguard")]

    def test_several_queues(self, make_app: Make, guard: Guard, client: redis.Redis) -> None:
        """A message to several queues stands for several tasks of one id, and is not recorded."""
        exchange = Exchange("t", "topic")
        queues = [Queue("a", exchange, routing_key="x.#"), Queue("b", exchange, routing_key="#.y")]
        app = make_app(task_queues=queues)
        tracker = guard(app)
        app.tasks["add"].apply_async((1,), queue="a", routing_key="x.y", declare=queues)
        assert not tracker.recorded and tokens(client) == [None, None]

    @pytest.mark.parametrize("protocol", [1, 2])
    def test_without_a_name(self, make_app: Make, guard: Guard, protocol: int) -> None:
        """A task with an empty name is sent as without a guard, and recorded; workers do not know it."""
        app = make_app(task_protocol=protocol)
        tracker = guard(app)
        sent = app.send_task("", (1,))
        assert [(one.job_id, one.task) for one in tracker.recorded] == [(sent.id, "")]

    def test_eager(self, make_app: Make, guard: Guard) -> None:
        """An eager task is not recorded."""
        app = make_app()
        tracker = guard(app)
        app.conf.task_always_eager = True
        assert app.tasks["add"].delay(1, 2).get() == 3
        assert group(app.tasks["add"].s(1, 2) for _ in range(2)).apply_async().get() == [3, 3]
        assert not tracker.recorded

    def test_call_and_beat(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis
    ) -> None:
        """`celery call`, and a schedule that is due, are recorded."""
        done = CliRunner().invoke(
            program, ["add", "-a", "[1, 2]"], obj=CLIContext(app, True, False)
        )
        assert done.exit_code == 0, done.output
        scheduler = Scheduler(app, lazy=True)
        entry = ScheduleEntry(
            name="e",
            task="add",
            schedule=timedelta(0),
            args=(1, 2),
            app=app,
            options={"queue": "b"},
        )
        scheduler.apply_async(entry, advance=False)
        assert [delivery.queue for delivery in tracker.recorded] == ["celery", "b"]
        assert len(tokens(client)) == 2

    def test_before_and_after_the_guard(
        self, make_app: Make, guard: Guard, client: redis.Redis
    ) -> None:
        """An app that has published already is guarded from then on, and unchanged after the guard ends."""
        app = make_app()
        app.tasks["add"].delay(1)
        tracker = guard(app)
        app.tasks["add"].delay(2)
        sender = vars(app.amqp)["send_task_message"]
        CeleryAdapter().install(registered_tracker(tracker), app)
        assert vars(app.amqp)["send_task_message"] is sender
        CeleryAdapter().uninstall(tracker)
        app.tasks["add"].delay(3)
        assert [bool(token) for token in tokens(client)] == [False, True, False]
        assert len(tracker.recorded) == 1

    def test_a_copy_of_the_app(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis
    ) -> None:
        """An app that was pickled, as to a spawned worker, is still guarded."""
        import pickle

        copy = pickle.loads(pickle.dumps(app))
        copy.send_task("add", (1, 2))
        assert tokens(client) == [tracker.recorded[0].token.hex]

    def test_proxies_and_doubles(
        self, app: celery.Celery, tracker: FakeTracker, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A proxy of the app counts as the app; a double of a producer in a user's test is not guarded."""
        app.set_current()
        group([app.tasks["add"].s(n) for n in range(2)], app=celery.current_app).apply_async()
        assert [len(batch) for batch in tracker.batches] == [2]
        app.tasks["add"].apply_async((1,), producer=MagicMock())
        assert len(tracker.recorded) == 2 and not caplog.records

    def test_app_of_its_own_kind(self, redis_url: str, guard: Guard, client: redis.Redis) -> None:
        """An app with an AMQP of its own keeps it."""
        from celery.app.amqp import AMQP

        class Mine(AMQP):  # type: ignore[misc]
            argsrepr_maxsize = 5

        app = celery.Celery("mine", broker=redis_url, amqp=Mine, set_as_current=False)
        tracker = guard(app)
        app.send_task("add", ("x" * 99,))
        assert type(app.amqp) is Mine
        assert tokens(client) == [tracker.recorded[0].token.hex]


class TestBatches:
    """Many tasks are recorded in one statement."""

    @pytest.fixture(autouse=True)
    def patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Raise the patience, so that a busy machine is not taken for a slow generator."""
        monkeypatch.setattr(backend, "_PATIENCE", 60.0)

    def test_generator_that_takes_its_time(
        self, app: celery.Celery, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The tasks of a slow generator are sent one by one, and not at the generator's end."""
        monkeypatch.setattr(backend, "_PATIENCE", 0.0)
        group(app.tasks["add"].s(n) for n in range(6)).apply_async()
        assert len(tracker.batches) > 1 and len(tracker.recorded) == 6

    @pytest.mark.parametrize("kind", ["task", "group", "chunks", "chord"])
    def test_a_task_sent_by_a_generator(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis, kind: str
    ) -> None:
        """A task that the generator itself sends goes out at once, and is not part of the group."""
        add, waiting = app.tasks["add"], []

        def members() -> Iterator[Any]:
            for n in range(3):
                before = int(client.llen("celery"))
                two = [add.s(1, 1), add.s(2, 2)]
                if kind == "task":
                    add.delay(1, 1)
                elif kind == "group":
                    group(two).apply_async()
                elif kind == "chunks":
                    add.chunks([(1, 1), (2, 2)], 1).apply_async()
                else:
                    chord(two, app.tasks["total"].s()).apply_async()
                waiting.append(int(client.llen("celery")) - before)
                yield add.s(n, n)

        group(members()).apply_async()
        assert waiting == [1 if kind == "task" else 2] * 3
        assert len(tracker.recorded) == 3 + sum(waiting)

    def test_group(self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis) -> None:
        """A group is one batch, with all tasks in it."""
        add = app.tasks["add"]
        members = [add.s(n, n) for n in range(20)]
        group([*members, chain(add.s(1, 1), add.s(1)), group(add.s(2, 2), add.s(3, 3))])()
        assert [len(batch) for batch in tracker.batches] == [23]
        assert tokens(client) == [delivery.token.hex for delivery in tracker.recorded]

    def test_chunks(self, app: celery.Celery, tracker: FakeTracker) -> None:
        """Chunks are a group from a generator: the first goes by itself, because the rest may be slow."""
        app.tasks["add"].chunks(zip(range(20), range(20), strict=True), 5).apply_async()
        assert [len(batch) for batch in tracker.batches] == [1, 3]

    def test_chord(self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis) -> None:
        """A chord's header is one batch, and its size is recorded before any member is sent."""
        tracker.before_record = lambda: opened.extend(tracker.joins)
        opened: list[str] = []
        result = chord([app.tasks["add"].s(n, n) for n in range(3)])(app.tasks["total"].s())
        assert [len(batch) for batch in tracker.batches] == [3]
        assert opened == [result.parent.id]
        assert json.loads(tracker.joins[result.parent.id])["groups"] == "celery-taskset-meta-"

    def test_results_elsewhere(self, make_app: Make, guard: Guard, own_redis: RedisServer) -> None:
        """If the results are in another Redis, the chord is not recorded as a join."""
        app = make_app(result_backend=own_redis.url)
        tracker = guard(app)
        chord(app.tasks["add"].s(n, n) for n in range(3))(app.tasks["total"].s())
        assert len(tracker.recorded) == 3 and not tracker.joins

    def test_loop(self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis) -> None:
        """A plain loop in a user's batch is recorded in one statement."""
        with tracker.batch():
            for n in range(5):
                app.tasks["add"].delay(n)
            assert not client.exists("celery")
        assert [len(batch) for batch in tracker.batches] == [5]
        assert tokens(client) == [delivery.token.hex for delivery in tracker.recorded]

    def test_error_in_the_middle(
        self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis
    ) -> None:
        """The tasks before an error are sent, as without jobguard."""
        add = app.tasks["add"]
        with pytest.raises(Exception, match="not JSON serializable"):
            group(add.s(1), add.s(2), add.s(object()), add.s(4)).apply_async()
        assert len(tokens(client)) == len(tracker.recorded) == 2


class TestInsideARun:
    """Tasks that a run sends belong to that run."""

    @pytest.fixture
    def run(self, app: celery.Celery, tracker: FakeTracker) -> Any:
        """Return a run that this thread is in."""
        app.tasks["add"].apply_async((1,), task_id="me")
        token = tracker.recorded[0].token
        session: Any = tracker.open_session(name="w@h", queues=["celery"])
        run = Run(
            registered_tracker(tracker),
            session,
            Claim(token, 1),
            job_id="me",
            queue="celery",
            task="add",
            attempt=1,
        )
        before = runs._current.set(run)
        yield run
        runs._current.reset(before)

    def test_same_again(self, app: celery.Celery, tracker: FakeTracker, run: Run) -> None:
        """A repeated run sends the same tokens."""
        app.tasks["add"].apply_async((1,), task_id="child")
        app.tasks["add"].apply_async((2,), task_id="child")
        first, second = tracker.recorded[1:]
        assert first.derived and second.derived and first.parent is None
        assert first.token == derived_token(run.claim.token, "child", 0)
        assert second.token == derived_token(run.claim.token, "child", 1)

    def test_retry(
        self, app: celery.Celery, tracker: FakeTracker, run: Run, client: redis.Redis
    ) -> None:
        """A retry supersedes the run; its header is not inherited."""
        inherited = {"jobguard": run.claim.token.hex, "jobguard-worker": "x" * 32}
        app.tasks["add"].apply_async((1,), task_id="me", retries=1, headers=inherited)
        retry = tracker.recorded[1]
        assert retry.parent is not None
        assert (retry.parent.token, retry.parent.claim) == (run.claim.token, 1)
        assert retry.attempt == 2 and retry.token != run.claim.token
        assert tracker.ended[run.claim.token] is Outcome.SUPERSEDED
        assert run.reported and tracker.notes("release")
        message = lists(client)["celery"][0]
        assert message["headers"]["jobguard"] == retry.token.hex
        assert "jobguard-worker" not in message["headers"]
        assert b"jobguard-worker" not in retry.envelope

    def test_refused(
        self, app: celery.Celery, tracker: FakeTracker, run: Run, client: redis.Redis
    ) -> None:
        """A retry of a task that has ended meanwhile is not sent."""
        tracker.close(run.claim.token, Outcome.CANCELLED)
        client.flushdb()
        app.tasks["add"].apply_async((1,), task_id="me", retries=1)
        assert not client.exists("celery") and run.reported

    def test_group(
        self, app: celery.Celery, tracker: FakeTracker, run: Run, client: redis.Redis
    ) -> None:
        """A run sends a group and a retry in one batch."""
        with tracker.batch():
            group(app.tasks["add"].s(n).set(task_id=f"g{n}") for n in range(3))()
            app.tasks["add"].apply_async((1,), task_id="me", retries=1)
            assert not run.reported
        assert [len(batch) for batch in tracker.batches] == [1, 4]
        assert all(delivery.derived for delivery in tracker.recorded[1:])
        assert run.reported

    def test_body(self, app: celery.Celery, tracker: FakeTracker, run: Run) -> None:
        """The body of a chord closes the chord's join."""
        with joining("g1", "body"):
            app.tasks["total"].apply_async(([1],), task_id="body")
            app.tasks["total"].apply_async(([1],), task_id="other")
        assert [delivery.closes for delivery in tracker.recorded[1:]] == ["g1", None]

    def test_another_apps_task(
        self, make_app: Make, guard: Guard, run: Run, client: redis.Redis
    ) -> None:
        """A task of another guarded broker is not derived from this run."""
        other = make_app(broker_transport_options={"global_keyprefix": "o:"})
        tracker = guard(other)
        other.tasks["add"].apply_async((1,), task_id="me")
        (delivery,) = tracker.recorded
        assert delivery.parent is None and not delivery.derived
        assert client.llen("o:celery") == 1


class TestRedisAway:
    """Redis is away: the record is accepted, and the call returns in bounded time."""

    @pytest.fixture
    def away(self, own_redis: RedisServer, make_app: Make, guard: Guard) -> Any:
        """Return an app whose Redis is killed after its first task, and its tracker."""
        app = make_app(broker_url=own_redis.url, result_backend=own_redis.url)
        tracker = guard(app)
        app.tasks["add"].delay(0)
        own_redis.kill()
        return app, tracker

    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make Redis refuse all writes."""
        from kombu.transport.redis import Channel

        def refuse(*_: Any, **__: Any) -> None:
            raise redis.exceptions.OutOfMemoryError("OOM command not allowed")

        monkeypatch.setattr(Channel, "_put", refuse)

    def test_accepted(self, away: Any) -> None:
        """The task is accepted, and the leader pushes it."""
        app, tracker = away
        begun = time.monotonic()
        app.tasks["add"].delay(1)
        assert time.monotonic() - begun < 30
        assert tracker.outbox == [tracker.recorded[1].token]
        assert tracker.notes("broker_failed")

    def test_known_to_be_away(self, away: Any) -> None:
        """No call waits for a Redis that has just failed for another call."""
        app, tracker = away
        tracker.in_doubt = True
        for n in range(20):
            app.tasks["add"].delay(n)
        assert not tracker.notes("broker_failed")  # no push was tried
        assert len(tracker.outbox) == 20

    def test_in_a_batch(self, away: Any) -> None:
        """A batch is accepted too."""
        app, tracker = away
        tracker.in_doubt = True
        group(app.tasks["add"].s(n) for n in range(20))()
        assert not tracker.notes("broker_failed")  # no push was tried
        assert len(tracker.outbox) == 20

    def test_results_are_subscribed_to_later(self, away: Any, own_redis: RedisServer) -> None:
        """A subscription to the result of an accepted task is made when Redis is back."""
        app, tracker = away
        tracker.in_doubt = True
        result = app.tasks["add"].delay(1)
        several = group(app.tasks["add"].s(n) for n in range(2))()
        tracker.in_doubt = False
        own_redis.start()
        for one in (result, *several):
            Timer(0.2, app.backend.store_result, (one.id, 7, "SUCCESS")).start()
        assert result.get(timeout=60) == 7
        assert several.get(timeout=60) == [7, 7]

    @pytest.mark.parametrize("led", [True, False])
    def test_the_size_of_a_chord(
        self, away: Any, monkeypatch: pytest.MonkeyPatch, led: bool
    ) -> None:
        """A chord is accepted if a leader restores its size; without a leader its body would never come."""
        app, tracker = away
        policy = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}
        monkeypatch.setitem(app.backend._transport_options, "retry_policy", policy)
        opened = Recorded(leader_live=led)
        monkeypatch.setattr(tracker, "open_join", lambda *_: opened)
        monkeypatch.setattr(
            tracker, "accepts_without_broker", lambda recorded: recorded.leader_live
        )
        if led:
            app.backend.set_chord_size("g", 2)
        else:
            with pytest.raises((OperationalError, redis.ConnectionError)):
                app.backend.set_chord_size("g", 2)

    def test_not_accepted(self, away: Any) -> None:
        """Without a leader, the library's error is raised, and a first delivery is withdrawn."""
        app, tracker = away
        tracker.accepting = False
        with pytest.raises(OperationalError):
            app.tasks["add"].apply_async((1,), ignore_result=True)
        assert tracker.withdrawn == [tracker.recorded[1]]

    def test_first_task_of_all(self, own_redis: RedisServer, make_app: Make, guard: Guard) -> None:
        """A process that never reached Redis sends its first task."""
        app = make_app(broker_url=own_redis.url, result_backend=own_redis.url)
        tracker = guard(app)
        own_redis.kill()
        tracker.in_doubt = True
        app.tasks["add"].delay(1)
        assert tracker.outbox == [tracker.recorded[0].token]

    def test_ambiguous(
        self,
        app: celery.Celery,
        tracker: FakeTracker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A message that may have reached Redis is never withdrawn."""
        from kombu.transport.redis import Channel

        put: Any = Channel._put

        def torn(self: Any, *args: Any, **kwargs: Any) -> None:
            put(self, *args, **kwargs)
            raise redis.ConnectionError("torn")

        monkeypatch.setattr(Channel, "_put", torn)
        app.tasks["add"].apply_async((1,), retry=False)
        (delivery,) = tracker.recorded
        assert tracker.outbox == [delivery.token] and not tracker.withdrawn
        tracker.accepting = False
        with pytest.raises(OperationalError) as raised:
            app.tasks["add"].apply_async((1,), retry=False, task_id="mine")
        chained = raised.value.__cause__ or raised.value.__context__ or raised.value
        assert "mine" in "".join(getattr(chained, "__notes__", []))
        assert not tracker.withdrawn

    @pytest.mark.usefixtures("full")
    def test_refused_by_redis(self, app: celery.Celery, tracker: FakeTracker) -> None:
        """A Redis that is full answers, so the task was certainly not taken."""
        tracker.accepting = False
        with pytest.raises(Exception, match="OOM"):
            app.tasks["add"].apply_async((1,), retry=False)
        assert tracker.withdrawn == tracker.recorded

    @pytest.mark.usefixtures("full")
    def test_refused_by_redis_in_a_batch_that_becomes_long(
        self, app: celery.Celery, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The call that fills the batch gets the error, and no task of the batch was taken."""
        monkeypatch.setattr("jobguard.host.batch._MOST", 2)
        tracker.accepting = False
        add = app.tasks["add"]
        with tracker.batch():
            add.apply_async((1,), retry=False)
            with pytest.raises(Exception, match="OOM"):
                add.apply_async((2,), retry=False)
        assert len(tracker.recorded) == 2 and tracker.withdrawn == tracker.recorded

    def test_deadline(self, app: celery.Celery, tracker: FakeTracker, client: redis.Redis) -> None:
        """After a record that took too long the leader pushes, not the producer."""
        tracker.push_deadline = -1.0
        app.tasks["add"].delay(1)
        assert tracker.outbox == [tracker.recorded[0].token]
        assert not client.exists("celery")


@pytest.mark.parametrize("where", ["after_record", "after_push"])
def test_failpoints(where: str, redis_url: str, tmp_path: Path, client: redis.Redis) -> None:
    """A producer can be killed between the record and the push, and after it."""
    program = f"""
import celery, os
from pathlib import Path
from jobguard import registry
from jobguard.adapters.celery import CeleryAdapter
from jobguard.host_safety import safe_tracker
from tests.fakes.adapters import FakeTracker
app = celery.Celery("x", broker={redis_url!r})
app.conf.broker_url
guarded = CeleryAdapter().sources(app, namespace="test", name=None)
tracker = FakeTracker(guarded.source, Path({str(tmp_path / "calls")!r}))
registry.register(tracker)
CeleryAdapter().install(safe_tracker(tracker), app)
app.send_task("add")
"""
    (tmp_path / where).touch()
    environ = {
        **os.environ,
        "JOBGUARD_TESTING": "1",
        "JOBGUARD_FAILPOINT": where,
        "JOBGUARD_FAILPOINT_LOGS": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environ, check=False)
    assert done.returncode == -9
    assert client.llen("celery") == (where == "after_push")


def test_ids_of_every_kind(app: celery.Celery, tracker: FakeTracker) -> None:
    """An id may be any value that becomes a string."""
    app.tasks["add"].apply_async((1,), task_id=str(uuid.uuid4()))
    app.tasks["add"].apply_async((1,), task_id="grüße/☃")
    assert tracker.recorded[1].job_id == "grüße/☃"


class TestClients:
    """A channel keeps its client."""

    def test_until_its_pool_is_closed(self, app: celery.Celery, tracker: FakeTracker) -> None:
        """Each command uses the client of the channel; after a lost connection it has a new one."""
        with app.connection_for_write() as connection:
            channel = connection.channel()
            first = channel._create_client()
            assert channel._create_client() is first
            assert channel._create_client(asynchronous=True) is not first
            channel._disconnect_pools()
            later = channel._create_client()
            assert later is not first
            assert later.connection_pool is channel.pool
            assert later.ping()
