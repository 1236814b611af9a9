"""The reconciler's view: where deliveries are, and that they are put back once."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import celery
import pytest
import redis
from celery import chord
from kombu.entity import Exchange, Queue

from jobguard.adapters.celery import announce, consumers, scan
from jobguard.adapters.celery.broker import CeleryBroker
from jobguard.adapters.celery.envelope import token_in
from jobguard.client_list import Consumers
from jobguard.model import EndedPart, OpenJoin, Presence, Restored, new_token
from tests.fakes.adapters import lost
from tests.integration.celery.support import FakeTracker, aged, lists, observe, put_back, take
from tests.support import eventually

Make = Callable[..., celery.Celery]
Guard = Callable[[celery.Celery], FakeTracker]


class TestPresence:
    """The places in which a scan finds a delivery."""

    def test_all_lists_of_a_queue(
        self, make_app: Make, guard: Guard, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A delivery is found in every list of a queue, also in one longer than a chunk; protocol 1 too."""
        monkeypatch.setattr(scan, "CHUNK", 3)
        app = make_app()
        old = make_app(task_protocol=1, task_serializer="pickle")
        tracker, other = guard(app), guard(old)
        for n in range(7):
            app.tasks["add"].delay(n)
        for priority in range(10):
            app.tasks["add"].apply_async((1,), priority=priority)
            old.tasks["add"].apply_async((1,), priority=priority, queue="q2")
        app.tasks["add"].apply_async((1,), countdown=3600)
        recorded = tracker.recorded + other.recorded
        assert len(recorded) == 28
        seen = CeleryBroker(tracker.source, client).presence([aged(d) for d in recorded])
        assert {one.presence for one in seen.values()} == {Presence.WAITING}

    def test_taken(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """A delivery is found in ``unacked``, with the session of a guarded worker."""
        mine = uuid.uuid4().hex
        app.tasks["add"].delay(1)
        app.tasks["add"].delay(2)
        take(client)
        take(client, worker=mine)
        first, second = (observe(broker, delivery) for delivery in tracker.recorded)
        assert (first.presence, first.taken_by) == (Presence.WAITING, "")
        assert (second.presence, second.taken_by) == (Presence.WAITING, mine)

    def test_gone(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """An absent delivery is absent, and one scan never answers twice for the same delivery."""
        app.tasks["add"].delay(1)
        (delivery,) = tracker.recorded
        assert observe(broker, delivery).presence is Presence.WAITING
        client.delete("celery")
        assert observe(broker, delivery).presence is Presence.ABSENT

    def test_a_long_scan_is_read_on_at_the_ends(
        self,
        app: celery.Celery,
        tracker: FakeTracker,
        broker: CeleryBroker,
        client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A scan of a long queue is kept; what came to either end, and what came back, is read on."""
        monkeypatch.setattr("jobguard.adapters.celery.broker._LARGE", 1)
        monkeypatch.setattr("jobguard.adapters.celery.scan.CHUNK", 3)
        for n in range(10):
            app.tasks["add"].delay(n)
        take(client, worker=new_token().hex)
        deliveries = list(tracker.recorded)
        assert observe(broker, deliveries[0]).mark.startswith("unacked")
        kept = broker._scan
        assert kept is not None
        kept.full_cost = 60.0
        for n in range(7):
            app.tasks["add"].delay(n)
        new = tracker.recorded[10:]
        seen = broker.presence([aged(delivery, 0) for delivery in (*deliveries[1:], *new)])
        assert {one.presence for one in seen.values()} == {Presence.WAITING}
        assert broker._scan is kept
        lost = replace(new[0], token=new_token())
        assert observe(broker, lost).presence is Presence.ABSENT
        assert broker._scan is kept

    def test_one_scan_serves_several_pages(
        self,
        app: celery.Celery,
        tracker: FakeTracker,
        broker: CeleryBroker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A scan serves other pages for as long as it took, and for deliveries older than it."""
        for n in range(3):
            app.tasks["add"].delay(n)
        scans = []

        def costly(*args: Any) -> scan.Scan:
            scans.append(args)
            found = scan.read_broker(*args)
            found.cost = 60.0
            return found

        monkeypatch.setattr("jobguard.adapters.celery.broker.read_broker", costly)
        first, second, third = tracker.recorded
        broker.presence([aged(first, 60)])
        broker.presence([aged(second, 60)])
        assert len(scans) == 1
        broker.presence([aged(second, 60)])
        assert len(scans) == 2
        broker.presence([aged(third, 0)])
        assert len(scans) == 3

    def test_own_header_of_headers(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker
    ) -> None:
        """A user's header that resembles ours does not hide the token."""
        other = new_token().hex
        app.tasks["add"].apply_async((1,), headers={"mine": {"jobguard": other}})
        assert observe(broker, tracker.recorded[0]).presence is Presence.WAITING


class TestResults:
    """The stored result of an absent task."""

    @pytest.fixture
    def seen(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> Callable[..., Presence]:
        """Return the presence of a lost task with this stored result."""
        make_known(app, "w@h", "celery")

        def presence_of(age: float = 60.0, claim: int | None = 1, **meta: Any) -> Presence:
            result = app.tasks["add"].delay(1)
            client.delete("celery")
            stored = {
                "status": "SUCCESS",
                "result": 3,
                "date_done": datetime.now(UTC).isoformat(),
            }
            client.set(f"celery-task-meta-{result.id}", json.dumps({**stored, **meta}))
            released = meta.pop("released", 0)
            owed = aged(tracker.recorded[-1], age, claim_number=claim, claims=released)
            return broker.presence([owed])[owed.token].presence

        return presence_of

    def test_final(self, seen: Callable[..., Presence]) -> None:
        """A task with a final result has ended."""
        assert seen() is Presence.FINISHED
        assert seen(status="FAILURE", result={"exc_type": "ValueError"}) is Presence.FAILED
        assert seen(status="REVOKED") is Presence.CANCELLED

    def test_not_final(self, seen: Callable[..., Presence]) -> None:
        """A retry is not final, nor is a killed worker: the ledger decides about that."""
        assert seen(status="RETRY") is Presence.ABSENT
        assert seen(status="STARTED") is Presence.ABSENT
        killed = {"exc_type": "WorkerLostError", "exc_message": ["signal 9"]}
        assert seen(status="FAILURE", result=killed) is Presence.ABSENT

    def test_of_a_delivery_that_has_not_begun(self, seen: Callable[..., Presence]) -> None:
        """A failure before the start belongs to the attempt before: its retry could not be stored."""
        failure = {"status": "FAILURE", "result": {"exc_type": "ConnectionError"}}
        assert seen(claim=None, **failure) is Presence.ABSENT
        assert seen(claim=None, age=7_200, **failure) is Presence.FAILED
        assert seen(claim=None, status="REVOKED") is Presence.CANCELLED

    def test_of_a_delivery_that_went_back(self, seen: Callable[..., Presence]) -> None:
        """A failure whose worker released the claim was no end: Celery put the message back."""
        failure = {"status": "FAILURE", "result": {"exc_type": "TimeLimitExceeded"}}
        assert seen(claim=None, released=1, **failure) is Presence.ABSENT
        assert seen(claim=None, released=1, age=7_200, **failure) is Presence.ABSENT

    def test_of_an_earlier_life(self, seen: Callable[..., Presence]) -> None:
        """A result older than the record belongs to an earlier life of the id."""
        before = (datetime.now(UTC) - timedelta(minutes=2)).isoformat()
        assert seen(date_done=before) is Presence.ABSENT
        assert seen(date_done=None) is Presence.ABSENT
        naive = datetime.now(UTC).replace(tzinfo=None).isoformat()
        assert seen(date_done=naive) is Presence.FINISHED

    def test_unreadable(
        self,
        make_app: Make,
        guard: Guard,
        client: redis.Redis,
    ) -> None:
        """A pickled result is not read."""
        app = make_app(result_serializer="pickle")
        tracker = guard(app)
        broker = CeleryBroker(tracker.source, client)
        make_known(app, "w@h", "celery")
        result = app.tasks["add"].delay(1)
        client.delete("celery")
        client.set(f"celery-task-meta-{result.id}", b"\x80\x04.")
        assert observe(broker, tracker.recorded[0], age=60).presence is Presence.ABSENT

    def test_in_another_db_with_a_prefix(
        self, make_app: Make, guard: Guard, client: redis.Redis, redis_url: str
    ) -> None:
        """Results are found in their own db, under their own prefix."""
        db = client.connection_pool.connection_kwargs["db"]
        other = (db + 7) % 15 + 1
        app = make_app(
            result_backend=f"{redis_url.rpartition('/')[0]}/{other}",
            result_backend_transport_options={"global_keyprefix": "res"},
        )
        tracker = guard(app)
        broker = CeleryBroker(tracker.source, client)
        make_known(app, "w@h", "celery")
        result = app.tasks["add"].delay(1)
        client.delete("celery")
        app.backend.store_result(result.id, 3, "SUCCESS")
        try:
            assert observe(broker, tracker.recorded[0], age=60).presence is Presence.FINISHED
        finally:
            app.backend.client.flushdb()


class TestRestore:
    """Each delivery is put back once, or not at all."""

    def test_order_and_tags(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """Deliveries are put back in the order of recording, each with a tag of its own."""
        for n in range(3):
            app.tasks["add"].delay(n)
        before = lists(client)
        tags = _tags(client)
        client.flushdb()
        put_back(broker, *tracker.recorded)
        assert lists(client) == before
        assert len(_tags(client) | tags) == 6

    def test_a_present_message_is_left(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """Without an earlier scan, a restore makes one."""
        app.tasks["add"].delay(1)
        app.tasks["add"].delay(2)
        take(client)
        assert put_back(broker, *tracker.recorded) == [Restored.PRESENT, Restored.PRESENT]
        assert client.llen("celery") == 1

    def test_deadline(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """After its deadline, in Redis' time, a leader puts nothing back."""
        app.tasks["add"].delay(1)
        (delivery,) = tracker.recorded
        client.flushdb()
        done = broker.restore([lost(delivery)], deadline=time.time() - 1)
        assert done[delivery.token] is Restored.TOO_LATE
        assert not client.exists("celery")

    def test_expired(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """An expired message, which the worker would drop, is not put back."""
        app.tasks["add"].delay(1)
        client.flushdb()
        past = time.time() - 1
        assert put_back(broker, *tracker.recorded, expires_at=past) == [Restored.EXPIRED]
        assert not client.exists("celery")

    def test_two_leaders(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """Of two leaders that both scanned before the restore, only one puts the delivery back."""
        app.tasks["add"].delay(1)
        (delivery,) = tracker.recorded
        other = CeleryBroker(tracker.source, client)
        client.flushdb()
        assert (
            observe(broker, delivery).presence
            is observe(other, delivery).presence
            is Presence.ABSENT
        )
        assert put_back(broker, delivery) == [Restored.RESTORED]
        assert put_back(other, delivery) == [Restored.PRESENT]
        assert client.llen("celery") == 1
        client.delete("celery")  # lost again
        assert observe(other, delivery).presence is Presence.ABSENT
        assert put_back(other, delivery) == [Restored.RESTORED]

    def test_from_a_dead_worker(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """Messages of a dead worker are taken from it, and are next in line again, in their order."""
        dead = uuid.uuid4().hex
        for n in range(3):
            app.tasks["add"].delay(n)
        before = lists(client)
        take(client, worker=dead)
        take(client, worker=dead)
        taken_before = tracker.recorded[:2]
        assert {observe(broker, delivery).taken_by for delivery in taken_before} == {dead}
        assert put_back(broker, *taken_before, taken_by=dead) == [Restored.RESTORED] * 2
        assert lists(client) == before
        assert not client.exists("unacked") and not client.exists("unacked_index")

    def test_from_a_worker_that_has_it_no_more(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """A message that another worker has taken meanwhile is left there."""
        dead, alive = uuid.uuid4().hex, uuid.uuid4().hex
        app.tasks["add"].delay(1)
        (delivery,) = tracker.recorded
        tag = take(client, worker=dead)
        assert observe(broker, delivery).taken_by == dead
        message = json.loads(client.hget("unacked", tag) or b"")
        message[0]["headers"]["jobguard-worker"] = alive
        client.hset("unacked", tag, json.dumps(message))
        assert put_back(broker, delivery, taken_by=dead) == [Restored.PRESENT]
        assert not client.exists("celery") and client.hlen("unacked") == 1

    def test_requeued(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """After a person's requeue the message carries the new token."""
        app.tasks["add"].delay(1)
        (delivery,) = tracker.recorded
        client.flushdb()
        minted = new_token()
        done = broker.restore([lost(delivery, token=minted)], deadline=time.time() + 60)
        assert done[minted] is Restored.RESTORED
        raw: Any = client.lindex("celery", 0)
        assert token_in(raw) == minted.hex.encode()

    def test_unreadable(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """An envelope of another version is not restored."""
        app.tasks["add"].delay(1)
        client.flushdb()
        answers = put_back(broker, *tracker.recorded, envelope=b"\x09what")
        assert answers == [Restored.UNREADABLE]

    def test_a_running_delivery_is_not_pushed(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """A delivery that a live worker runs is not restored."""
        app.tasks["add"].delay(1)
        client.flushdb()
        put_back(broker, *tracker.recorded, running=True)
        assert not client.exists("celery")

    def test_bindings_come_back(self, make_app: Make, guard: Guard, client: redis.Redis) -> None:
        """A binding that Redis lost is restored, for a producer that declared its queue long ago."""
        app = make_app(task_queues=[Queue("tq", Exchange("t", "topic"), routing_key="a.#")])
        tracker = guard(app)
        app.tasks["add"].apply_async((1,), queue="tq", routing_key="a.b")
        table = client.smembers("_kombu.binding.t")
        client.flushdb()
        put_back(CeleryBroker(tracker.source, client), *tracker.recorded)
        assert client.smembers("_kombu.binding.t") == table
        client.flushdb()
        app.tasks["add"].apply_async((1,), queue="tq", routing_key="a.b")
        assert client.llen("tq") == 1

    def test_an_undeclared_exchange(
        self, make_app: Make, guard: Guard, client: redis.Redis
    ) -> None:
        """An undeclared exchange drops the message, with the guard as without it."""
        lengths = []
        for guarded in (False, True):
            exchange = Exchange(f"undeclared-{guarded}", "topic")
            app = make_app(task_queues=[Queue("uq", exchange, routing_key="a.#")])
            tracker = guard(app) if guarded else None
            app.tasks["add"].apply_async((1,), exchange=exchange.name, routing_key="a.b")
            lengths.append(client.llen("uq"))
            assert tracker is None or not tracker.recorded
        assert lengths == [0, 0]


@contextmanager
def waiting(client: redis.Redis, key: str) -> Iterator[None]:
    """Wait for an element of this list, on a connection that stays open until the end."""
    known = client.connection_pool.connection_kwargs
    other: Any = redis.Redis(host=known["host"], port=known["port"], db=known["db"])
    thread = threading.Thread(target=lambda: other.brpop([key], timeout=60))
    thread.start()
    try:
        yield
    finally:
        client.lpush(key, "the end")
        thread.join(20)
        client.delete(key)
        other.close()


class TestConsumers:
    """The consumers of a queue, guarded or not."""

    def test_unguarded_workers(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """A bound worker that listens is unguarded in every queue; a dead worker is not counted."""
        make_known(app, "good@h", "celery", "q2")
        bind(client, "good@h")
        assert broker.consumers()["celery"] == {"good@h"}
        assert broker.consumers()["q3"] == frozenset()
        bind(client, "bad@h")  # this worker was killed long ago
        with any_client(client).pubsub() as good:
            listen(client, good)
            fresh(broker)
            assert broker.consumers()["q2"] == {"good@h"}
            with any_client(client).pubsub() as bad:
                listen(client, bad)
                fresh(broker)
                assert broker.consumers()["q2"] == {"good@h", "bad@h"}
                assert broker.consumers()["q3"] == {"bad@h"}

    def test_after_a_loss(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """A guarded worker whose announcement was lost does not count as unguarded."""
        make_known(app, "good@h", "celery")
        broker.consumers()
        client.flushdb()
        bind(client, "good@h")
        with any_client(client).pubsub() as good:
            listen(client, good)
            assert broker.consumers()["q2"] == frozenset()

    def test_programs_that_wait_for_replies(
        self, app: celery.Celery, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """As many waiting connections as there are queues for replies are in doubt, also a moment later."""
        replies = "_kombu.binding.reply.celery.pidbox"
        client.sadd(replies, "x\x06\x16\x06\x16x.reply.celery.pidbox")

        def strangers(count: int) -> Consumers:
            eventually(lambda: len(broker.consumers()["celery"]) == count)
            return broker.consumers()

        with waiting(client, "x.reply.celery.pidbox"):
            found = strangers(1)
            assert found.passing == found["celery"]
            with waiting(client, "celery"):  # an unguarded worker
                assert strangers(2).passing == frozenset()
            asks = strangers(1)["celery"]
            client.srem(replies, "x\x06\x16\x06\x16x.reply.celery.pidbox")
            assert broker.consumers().passing == frozenset(), "it takes, and waits for no reply"
            client.sadd(replies, "x\x06\x16\x06\x16x.reply.celery.pidbox")
            assert broker.consumers().passing == asks
            client.lpush("x.reply.celery.pidbox", "an answer")
            client.srem(replies, "x\x06\x16\x06\x16x.reply.celery.pidbox")
            eventually(lambda: client.llen("x.reply.celery.pidbox") == 0)
            assert broker.consumers().passing == asks

    def test_one_that_takes_for_long(
        self,
        app: celery.Celery,
        broker: CeleryBroker,
        client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A connection that takes without a rest is no program that waits for a reply."""
        monkeypatch.setattr(consumers, "_LASTING", 0.3)
        client.sadd("_kombu.binding.reply.celery.pidbox", "of a program that was killed")
        with waiting(client, "celery"):
            eventually(lambda: broker.consumers().passing)
            eventually(lambda: not broker.consumers().passing)
            assert len(broker.consumers()["celery"]) == 1

    def test_several_of_one_process(self, app: celery.Celery, broker: CeleryBroker) -> None:
        """Workers that share a session are known by their own names and queues, as that session."""
        session = uuid.uuid4()
        for number, queue in enumerate(("q1", "q2")):
            make_known(app, f"{queue}@h", queue, session=session, number=number)
        found = broker.consumers()
        assert found["q1"] == {"q1@h"} and found["q2"] == {"q2@h"}
        assert found.sessions == {"q1@h": session.hex, "q2@h": session.hex}

    def test_one_that_left(
        self, app: celery.Celery, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """A worker that has left takes nothing any more, and one that is silent may be dead."""
        session = make_known(app, "good@h", "celery")
        silent = make_known(app, "silent@h", "q2")
        client.zincrby(broker._layout.workers, -60, f"{silent.hex}.0")
        found = broker.consumers()
        assert found.proved == {"good@h", "silent@h"} and found.alive == {"good@h"}
        announce.leave(app, session=session, number=0)
        assert broker.consumers()["celery"] == frozenset()


class TestBury:
    """A dead task is shown as failed."""

    def test_failure_is_stored(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker
    ) -> None:
        """Callers that wait for the result get a failure; a stored result is kept."""
        make_known(app, "w@h", "celery")
        lost_one, done = app.tasks["add"].delay(1), app.tasks["add"].delay(2)
        app.backend.store_result(done.id, 4, "SUCCESS")
        broker.bury([aged(delivery) for delivery in tracker.recorded], deadline=time.time() + 60)
        with pytest.raises(Exception, match="gave it up"):
            lost_one.get(timeout=5)
        assert done.get(timeout=5) == 4

    def test_messages_of_its_last_worker(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """A buried task does not come back after Celery's timeout; messages of other workers stay."""
        for n in range(2):
            app.tasks["add"].delay(n)
            take(client, worker=uuid.uuid4().hex)
        broker.bury([aged(tracker.recorded[0])], deadline=time.time() + 60)
        assert client.hlen("unacked") == client.zcard("unacked_index") == 1
        assert observe(broker, tracker.recorded[1]).presence is Presence.WAITING

    def test_nothing_is_known(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """Without a worker that announced the place of results, nothing is stored."""
        app.tasks["add"].delay(1)
        before = set(client.scan_iter())
        broker.bury([aged(delivery) for delivery in tracker.recorded], deadline=time.time() + 60)
        assert set(client.scan_iter()) == before


class TestRejoin:
    """The counters of a chord are put back."""

    def test_counts_and_finish(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """Missing counters are put back, and only these; and the last part is counted again."""
        result = chord([app.tasks["add"].s(n, n) for n in range(2)])(app.tasks["total"].s())
        group = result.parent.id
        members = tracker.recorded
        ((_, size),) = tracker.notes("open_join")
        assert size == "2"
        client.flushdb()
        join = OpenJoin(group, 2, tracker.joins[group], parts(app, group, members[:1]))
        for _ in range(2):
            broker.rejoin([join], finish=False, deadline=time.time() + 60)
        key = f"celery-taskset-meta-{group}"
        assert client.get(f"{key}.s") == b"2"
        assert client.zcard(f"{key}.j") == client.scard(f"{key}.d") == 1
        assert client.ttl(f"{key}.j") > 0

        both = OpenJoin(group, 2, tracker.joins[group], parts(app, group, members))
        broker.rejoin([both], finish=True, deadline=time.time() + 60)
        assert client.zcard(f"{key}.j") == client.scard(f"{key}.d") == 1
        raw: Any = client.lindex("celery", 0)
        message = json.loads(raw)
        assert message["headers"]["id"] == members[1].job_id
        assert message["headers"]["jobguard"] == members[1].token.hex
        assert "jobguard-part" in message["headers"]

    @pytest.mark.parametrize("conf", [{}, {"task_compression": "gzip"}, {"task_protocol": 2}])
    def test_parts_from_results(
        self, conf: dict[str, Any], make_app: Make, guard: Guard, client: redis.Redis
    ) -> None:
        """A part that was not reported is made from the stored result, in Celery's format."""
        app = make_app(**conf)
        tracker = guard(app)
        broker = CeleryBroker(tracker.source, client)
        make_known(app, "w@h", "celery")
        result = chord([app.tasks["add"].s(n, n) for n in range(2)])(app.tasks["total"].s())
        group = result.parent.id
        app.tasks["add"].delay(1, 1)
        first, _, single = tracker.recorded
        for delivery in (first, single):
            app.backend.store_result(delivery.job_id, {"ü": [1]}, "SUCCESS")
        parts = broker.parts([lost(delivery) for delivery in tracker.recorded])
        assert set(parts) == {first.token}
        line, member = parts[first.token].state.split(b"\n", 1)
        assert parts[first.token].join == group
        assert json.loads(line) == [group, first.job_id, 0]
        assert member.decode() == app.backend.encode([1, first.job_id, "SUCCESS", {"ü": [1]}])

    def test_deadline_and_done(
        self, app: celery.Celery, tracker: FakeTracker, broker: CeleryBroker, client: redis.Redis
    ) -> None:
        """After the deadline, or with the body on its way, nothing is changed."""
        result = chord([app.tasks["add"].s(1, 1)])(app.tasks["total"].s())
        group = result.parent.id
        join = OpenJoin(group, 1, tracker.joins[group], parts(app, group, tracker.recorded))
        client.flushdb()
        broker.rejoin([join], finish=True, deadline=time.time() - 1)
        assert not client.exists(f"celery-taskset-meta-{group}.s")
        client.set(f"celery-taskset-meta-{group}.c", "done")
        broker.rejoin([join], finish=True, deadline=time.time() + 60)
        assert not client.exists(f"celery-taskset-meta-{group}.s") and not client.exists("celery")


def parts(app: Any, group: str, members: Any) -> list[EndedPart]:
    """Return the ends of these header tasks, as a worker reports them."""
    ended = []
    for at, member in enumerate(members):
        line = json.dumps([group, member.job_id, at]).encode()
        result = app.backend.encode([1, member.job_id, "SUCCESS", at]).encode()
        state = line + b"\n" + result
        ended.append(EndedPart(member.token, member.job_id, "celery", state, member.envelope))
    return ended


def any_client(client: redis.Redis) -> Any:
    """Return it without its types, which are incomplete."""
    return client


def make_known(
    app: Any, name: str, *queues: str, session: uuid.UUID | None = None, number: int = 0
) -> uuid.UUID:
    """Announce a guarded worker as it does every few seconds; repeat it on a busy machine."""
    known = session or uuid.uuid4()

    def is_known() -> bool:
        send = announce.announcement(app, name=name, queues=queues, number=number)
        assert send is not None
        send(known)
        with redis.Redis.from_url(app.conf.broker_url) as client:
            return bool(client.hexists("jobguard:celery:about", f"{known.hex}.{number}"))

    eventually(is_known)
    return known


def bind(client: redis.Redis, name: str) -> None:
    """Bind the control queue of a worker, as the worker does at its start."""
    client.sadd("_kombu.binding.celery.pidbox", f"\x06\x16\x06\x16{name}.celery.pidbox")


def listen(client: redis.Redis, pubsub: Any) -> None:
    """Listen as a worker does."""
    db = client.connection_pool.connection_kwargs["db"]
    pubsub.psubscribe(f"/{db}.celery.pidbox")
    pubsub.get_message(timeout=5)


def fresh(broker: CeleryBroker) -> None:
    """Make the broker count the listeners again."""
    broker._workers._asked_at = float("-inf")


def _tags(client: redis.Redis) -> set[str]:
    there: Any = client
    raws = there.lrange("celery", 0, -1)
    return {json.loads(raw)["properties"]["delivery_tag"] for raw in raws}
