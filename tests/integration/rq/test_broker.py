from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis
from rq import Queue, Retry, SimpleWorker, Worker
from rq.job import Dependency, Job

from jobguard.adapters.rq import broker as broker_module
from jobguard.adapters.rq.broker import RQBroker
from jobguard.adapters.rq.envelope import decode
from jobguard.model import Delivery, Join, Observation, Presence, Restored, new_token
from tests.fakes.adapters import FakeTracker, lost, observe, owed, restore
from tests.integration.rq import tasks
from tests.integration.rq.versions import VERSION_OF_RQ
from tests.support import keyspace

needs_rate_limit = pytest.mark.skipif(VERSION_OF_RQ < (3, 0), reason="rate_limit= came with RQ 3.0")


class TestPresence:
    """The presence of a delivery, as an inspection reports it."""

    def test_long_list(
        self,
        queue: Queue,
        tracker: FakeTracker,
        broker: RQBroker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A waiting job is found in a list that is longer than one read."""
        monkeypatch.setattr("jobguard.members.CHUNK", 7)
        monkeypatch.setattr(broker_module, "IDS_A_CALL", 5)
        for length in (13, 1):  # 13, then 14: with and without a remainder
            queue.enqueue_many(Queue.prepare_data(tasks.add, (n,)) for n in range(length))
            seen = broker.presence([owed(delivery) for delivery in tracker.recorded])
            assert {one.presence for one in seen.values()} == {Presence.WAITING}

    def test_scheduled_and_deferred(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker
    ) -> None:
        """Jobs in the delay queue and jobs behind a parent count as scheduled."""
        parent = queue.enqueue_in(timedelta(hours=1), tasks.add, 1)
        queue.enqueue(tasks.add, 1, depends_on=parent)
        for delivery in tracker.recorded:
            assert observe(broker, delivery).presence is Presence.SCHEDULED

    def test_missing(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A job without a hash, or with a hash without data, is missing."""
        job = queue.enqueue(tasks.add, 1)
        client.delete(job.key)
        missing = Observation(Presence.ABSENT, "missing", bodiless=True)
        assert observe(broker, tracker.recorded[0]) == missing
        client.hset(job.key, "last_heartbeat", "now")
        assert observe(broker, tracker.recorded[0]) == Observation(
            Presence.ABSENT, "missing", bodiless=True
        )

    def test_stranded(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A job with a complete hash that no worker can find is absent, with a mark of its delivery."""
        job = queue.enqueue(tasks.add, 1)
        client.lpop(queue.key)
        queued = observe(broker, tracker.recorded[0])
        client.hset(job.key, "status", "started")
        started = observe(broker, tracker.recorded[0])
        client.hset(job.key, "status", "scheduled")
        scheduled = observe(broker, tracker.recorded[0])
        client.rpush(queue.intermediate_queue_key, job.id)
        client.hset(job.key, "status", "queued")
        taken = observe(broker, tracker.recorded[0])

        observations = (queued, started, scheduled, taken)
        assert {one.presence for one in observations} == {Presence.ABSENT}
        assert len({one.mark for one in observations}) == 4
        assert queued.mark.startswith("stranded:queued:2")
        assert taken.mark.startswith("intermediate")

    def test_running(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A job with a registered execution is running."""
        job = queue.enqueue(tasks.add, 1)
        client.lpop(queue.key)
        client.hset(job.key, "status", "started")
        client.zadd(f"rq:executions:{job.id}", {"e": time.time() + 60})
        assert observe(broker, tracker.recorded[0]).presence is Presence.RUNNING
        client.zadd(f"rq:executions:{job.id}", {"e": time.time() - 1})
        assert observe(broker, tracker.recorded[0]).presence is Presence.ABSENT

    def test_ended(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """RQ's own end of a job is seen, after a run and after a cancel."""
        queue.enqueue(tasks.add, 1)
        queue.enqueue(tasks.fail)
        SimpleWorker([queue], connection=client).work(burst=True)
        queue.enqueue(tasks.add, 1).cancel()

        finished, failed, cancelled = tracker.recorded
        assert observe(broker, finished).presence is Presence.FINISHED
        assert observe(broker, failed).presence is Presence.FAILED
        assert observe(broker, cancelled).presence is Presence.CANCELLED

    def test_overwritten(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """An id that was pushed again, with or without a token, is overwritten."""
        queue.enqueue(tasks.add, 1, job_id="same")
        queue.enqueue(tasks.add, 2, job_id="same")
        first, second = tracker.recorded
        observation = observe(broker, first)
        assert (observation.presence, observation.other) == (Presence.OVERWRITTEN, second.token)

        client.hdel("rq:job:same", "jg")
        observation = observe(broker, second)
        assert (observation.presence, observation.other) == (Presence.OVERWRITTEN, None)

    def test_put_back_by_unguarded_hands(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A failed job that a dashboard requeued is another delivery, although it keeps the token."""
        job = queue.enqueue(tasks.fail)
        SimpleWorker([queue], connection=client).work(burst=True)
        client.hset(job.key, "status", "queued")
        client.rpush(queue.key, job.id)

        assert observe(broker, tracker.recorded[0]).presence is Presence.OVERWRITTEN
        assert restore(broker, lost(tracker.recorded[0])) == [Restored.CHANGED]


class TestJoins:
    """The parents of a waiting child, and whether Redis still has them."""

    @pytest.fixture
    def child(self, queue: Queue, tracker: FakeTracker) -> Delivery:
        """Return a child with two parents."""
        parents = [queue.enqueue(tasks.add, 1, job_id=job_id) for job_id in ("p1", "p2")]
        queue.enqueue(tasks.add, 1, depends_on=parents, job_id="child")
        return tracker.recorded[2]

    def test_waits_rightly(self, child: Delivery, broker: RQBroker, client: redis.Redis) -> None:
        """A parent in Redis that has not ended keeps the child waiting, also if another parent is lost."""
        assert observe(broker, child) == Observation(Presence.SCHEDULED, "deferred")
        client.delete("rq:job:p1")
        assert observe(broker, child).joins is None

    def test_forgotten_parents(
        self, child: Delivery, broker: RQBroker, client: redis.Redis
    ) -> None:
        """Parents that Redis lost are reported for a check in the ledger; finished parents are not."""
        client.delete("rq:job:p1")
        client.hset("rq:job:p2", "status", "finished")
        assert observe(broker, child).joins == Join(("p1",))
        client.hset("rq:job:p1", "last_heartbeat", "a ghost")
        assert observe(broker, child).joins == Join(("p1",))
        client.delete("rq:job:p2")
        assert observe(broker, child).joins == Join(("p1", "p2"))

    @pytest.mark.parametrize("status", ["finished", "failed", "canceled", "stopped"])
    @pytest.mark.parametrize("any_end", [False, True])
    def test_ended_parents(
        self,
        status: str,
        any_end: bool,
        queue: Queue,
        tracker: FakeTracker,
        broker: RQBroker,
        client: redis.Redis,
    ) -> None:
        """A child that RQ could have moved and did not move is found, by RQ's own rule."""
        parent = queue.enqueue(tasks.add, 1, job_id="parent")
        queue.enqueue(tasks.add, 1, depends_on=Dependency([parent], allow_failure=any_end))
        client.hset("rq:job:parent", "status", status)

        doubtful = (tracker.recorded[0].token,) if status == "failed" and not any_end else ()
        could = status == "finished" or status == "failed"
        expected = Join((), failure_will_do=any_end, doubtful=doubtful) if could else None
        assert observe(broker, tracker.recorded[1]).joins == expected

    @pytest.mark.parametrize("field", ["", "!"])
    def test_a_parent_whose_end_redis_missed(
        self, field: str, child: Delivery, tracker: FakeTracker, broker: RQBroker, client: Any
    ) -> None:
        """A parent with the status "started" is reported as doubtful; an unguarded parent is not."""
        token = tracker.recorded[0].token
        client.hset("rq:job:p1", mapping={"status": "started", "jg": token.hex + field})
        client.hset("rq:job:p2", "status", "finished")
        assert observe(broker, child).joins == Join((), doubtful=(token,))
        client.hdel("rq:job:p1", "jg")
        assert observe(broker, child).joins is None


class TestRestore:
    """Each delivery is restored by itself, atomically."""

    @pytest.fixture
    def delivery(self, queue: Queue, tracker: FakeTracker) -> Delivery:
        """Return a delivery that waits in the queue."""
        queue.enqueue(tasks.add, 1, job_id="job", retry=Retry(max=1))
        return tracker.recorded[0]

    @pytest.mark.parametrize("status", ["queued", "started"])
    def test_stranded(
        self,
        status: str,
        delivery: Delivery,
        queue: Queue,
        broker: RQBroker,
        client: redis.Redis,
    ) -> None:
        """A hash that no worker can find goes back to its queue, with the fields that the run wrote."""
        client.lpop(queue.key)
        client.hset("rq:job:job", mapping={"status": status, "meta": "newer"})
        client.rpush(queue.intermediate_queue_key, "job")

        assert restore(broker, lost(delivery)) == [Restored.RESTORED]
        assert queue.job_ids == ["job"]
        assert client.llen(queue.intermediate_queue_key) == 0
        assert client.hmget("rq:job:job", "status", "meta") == [b"queued", b"newer"]

    def test_stranded_scheduled(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A scheduled hash in no registry goes back to the delay queue, with its due time."""
        queue.enqueue_in(timedelta(hours=1), tasks.add, 1, job_id="job")
        delivery = tracker.recorded[0]
        client.delete("rq:scheduled:default")

        assert restore(broker, lost(delivery)) == [Restored.RESTORED]
        assert client.zscore("rq:scheduled:default", "job") == delivery.due_at

    def test_running(
        self, delivery: Delivery, queue: Queue, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A run with a registered execution is not changed until its worker is known to be dead."""
        client.lpop(queue.key)
        client.hset("rq:job:job", "status", "started")
        client.zadd("rq:executions:job", {"e": time.time() + 60})
        client.zadd("rq:wip:default", {"job:e": time.time() + 60, "other:e": time.time() + 60})

        assert restore(broker, lost(delivery)) == [Restored.PRESENT]
        assert restore(broker, lost(delivery, takeover=True)) == [Restored.RESTORED]
        assert queue.job_ids == ["job"]
        assert client.hget("rq:job:job", "status") == b"queued"
        assert client.zrange("rq:wip:default", 0, -1) == [b"other:e"]
        assert not client.exists("rq:executions:job")

    def test_abandoned(
        self, delivery: Delivery, queue: Queue, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A dead worker's run that must wait leaves RQ's registries, so that RQ does not fail it."""
        client.lpop(queue.key)
        client.hset("rq:job:job", "status", "started")
        client.zadd("rq:executions:job", {"e": time.time() - 60})
        client.zadd("rq:wip:default", {"job:e": time.time() - 60})

        broker.abandon([owed(delivery)], deadline=time.time() - 1)
        assert client.exists("rq:executions:job")  # past the deadline: nothing is changed
        broker.abandon([owed(delivery)], deadline=time.time() + 60)
        queue.started_job_registry.cleanup()

        assert client.hget("rq:job:job", "status") == b"queued"
        assert queue.failed_job_registry.count == 0
        assert broker.presence([owed(delivery)])[delivery.token].presence is Presence.ABSENT
        assert restore(broker, lost(delivery, takeover=True)) == [Restored.RESTORED]
        assert queue.job_ids == ["job"]

    def test_older_life(
        self,
        delivery: Delivery,
        queue: Queue,
        tracker: FakeTracker,
        broker: RQBroker,
        client: redis.Redis,
    ) -> None:
        """An older delivery that is superseded is replaced, in every place."""
        older = keyspace(client)["rq:job:job"]
        queue.enqueue_in(timedelta(hours=1), tasks.add, 2, job_id="job")
        client.flushdb()
        restore(broker, lost(delivery))
        assert keyspace(client)["rq:job:job"] == older

        retry = tracker.recorded[1]
        replaces = frozenset([uuid4(), delivery.token])
        assert restore(broker, lost(retry, replaces=replaces)) == [Restored.RESTORED]
        after = keyspace(client)
        assert after["rq:job:job"] == decode(retry.envelope)[1]
        assert "rq:queue:default" not in after
        assert client.zscore("rq:scheduled:default", "job") == retry.due_at

    def test_evicted_hash(
        self, delivery: Delivery, queue: Queue, broker: RQBroker, client: redis.Redis
    ) -> None:
        """An id whose hash was evicted is in its list once after a restore, not twice."""
        client.delete("rq:job:job")

        assert restore(broker, lost(delivery)) == [Restored.RESTORED]
        assert queue.job_ids == ["job"]

    def test_unreadable(self, delivery: Delivery, broker: RQBroker, client: redis.Redis) -> None:
        """An envelope of a later version is skipped, and the others are restored."""
        client.flushdb()
        strange = lost(delivery, token=new_token(), envelope=b"\x02what?")

        assert restore(broker, strange, lost(delivery)) == [
            Restored.UNREADABLE,
            Restored.RESTORED,
        ]

    def test_scripts_are_loaded_again(
        self, delivery: Delivery, broker: RQBroker, client: redis.Redis
    ) -> None:
        """The scripts are loaded again after a restart of Redis, which loses them."""
        restore(broker, lost(delivery))
        client.flushdb()
        client.script_flush()

        assert observe(broker, delivery).presence is Presence.ABSENT
        client.script_flush()
        assert restore(broker, lost(delivery)) == [Restored.RESTORED]

    def test_child_of_a_finished_parent(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A child whose parent has finished goes to its queue after a rollback."""
        parent = queue.enqueue(tasks.add, 1, job_id="parent")
        queue.enqueue(tasks.add, 1, depends_on=parent, job_id="child")
        client.delete("rq:job:child", "rq:deferred:default")
        client.hset("rq:job:parent", "status", "finished")

        assert restore(broker, lost(tracker.recorded[1])) == [Restored.RESTORED]
        assert "child" in queue.job_ids

    def test_a_running_job_is_seen(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A job that a live worker runs gets its hash with the status "started", and is in no list."""
        job = queue.enqueue(tasks.add, 1)
        client.flushdb()
        running = lost(tracker.recorded[0], running=True)

        assert observe(broker, tracker.recorded[0]).bodiless
        assert restore(broker, running) == [Restored.RESTORED]
        assert job.get_status() == "started"
        assert (queue.job_ids, client.ttl(job.key)) == ([], -1)
        assert restore(broker, running) == [Restored.PRESENT]
        assert not observe(broker, tracker.recorded[0]).bodiless

    @pytest.mark.parametrize("status", ["started", "finished"])
    def test_a_running_job_that_ended_unseen(
        self,
        status: str,
        queue: Queue,
        tracker: FakeTracker,
        broker: RQBroker,
        client: redis.Redis,
    ) -> None:
        """The restored hash of a running job is deleted, unless its worker has written the end."""
        job = queue.enqueue(tasks.add, 1)
        client.flushdb()
        restore(broker, lost(tracker.recorded[0], running=True))
        client.hset(job.key, "status", status)
        broker.hide([owed(tracker.recorded[0])])

        assert client.exists(job.key) == (status == "finished")

    def test_released(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A child whose parents have ended by the ledger goes to its queue, and waits in no registry."""
        parent = queue.enqueue(tasks.add, 1, job_id="parent")
        queue.enqueue(tasks.add, 1, depends_on=parent, job_id="child")
        child = lost(tracker.recorded[1], released=True)
        client.delete("rq:job:parent", queue.key)

        assert restore(broker, child) == [Restored.RESTORED]
        assert queue.job_ids == ["child"]
        assert client.hget("rq:job:child", "status") == b"queued"
        assert not client.exists("rq:job:parent:dependents", "rq:deferred:default")
        assert restore(broker, child) == [Restored.PRESENT]
        assert queue.job_ids == ["child"]

    @needs_rate_limit
    def test_released_to_wait_for_a_slot(
        self, queue: Queue, tracker: FakeTracker, broker: RQBroker, client: redis.Redis
    ) -> None:
        """A released child with a rate limit takes a slot, or waits for one."""
        from rq.rate_limit import RateLimit

        parent = queue.enqueue(tasks.add, 1, job_id="parent")
        limit = RateLimit("k", concurrency=1)
        for job_id in ("a", "b"):
            queue.enqueue(tasks.add, 1, depends_on=parent, job_id=job_id, rate_limit=limit)
        client.delete("rq:job:parent", queue.key)
        children = [lost(delivery, released=True) for delivery in tracker.recorded[1:]]

        assert restore(broker, *children) == [Restored.RESTORED] * 2
        assert queue.job_ids == ["a"]
        assert client.hget("rq:job:b", "status") == b"rate_limited"

    def test_many(self, queue: Queue, tracker: FakeTracker, broker: RQBroker) -> None:
        """A thousand jobs are restored in their order."""
        jobs = queue.enqueue_many(Queue.prepare_data(tasks.add, (n,)) for n in range(1000))
        queue.connection.flushdb()
        done = restore(broker, *map(lost, tracker.recorded))

        assert set(done) == {Restored.RESTORED}
        assert queue.job_ids == [job.id for job in jobs]


def test_consumers(queue: Queue, broker: RQBroker, client: redis.Redis) -> None:
    """The broker returns the workers that listen to each queue."""
    queue.enqueue(tasks.add, 1)
    Queue("idle", connection=client).enqueue(tasks.add, 1)
    worker: Any = Worker([queue], connection=client, name="w.1")
    worker.register_birth()

    assert broker.consumers() == {"default": frozenset(["w.1"]), "idle": frozenset()}


def test_a_prefix_of_its_own(
    client: redis.Redis, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Queue class with its own key prefix is a separate source and is restored under its own keys."""
    from jobguard import registry
    from jobguard.adapters.rq import RQAdapter

    class OwnJob(Job):
        redis_job_namespace_prefix = "own:job:"

    class OwnQueue(Queue):
        job_class = OwnJob
        redis_queue_namespace_prefix = "own:queue:"
        redis_queues_keys = "own:queues"

    queue = OwnQueue("default", connection=client)
    guarded = RQAdapter().sources(queue, namespace="test", name=None)
    assert guarded is not None
    assert guarded.source.id != tracker.source.id
    own = FakeTracker(guarded.source, tracker._log)
    registry.register(own)
    try:
        queue.enqueue(tasks.add, 1)
    finally:
        registry.unregister(own)
    assert not tracker.recorded
    before = keyspace(client)
    client.flushdb()
    broker = RQBroker(guarded.source, client)

    assert observe(broker, own.recorded[0]).presence is Presence.ABSENT
    assert restore(broker, lost(own.recorded[0])) == [Restored.RESTORED]
    assert keyspace(client) == before
    assert observe(broker, own.recorded[0]).presence is Presence.WAITING
