from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
import rq
from redis.client import Pipeline
from rq import Callback, Queue
from rq.exceptions import InvalidJobOperation
from rq.group import Group
from rq.job import Dependency, Job
from rq.registry import FailedJobRegistry

from jobguard.adapters.rq import pipeline as staging
from jobguard.adapters.rq.envelope import Mode, decode
from jobguard.adapters.rq.layout import SPENT
from jobguard.errors import StoreUnavailable
from jobguard.model import Outcome
from tests.fakes.adapters import FakeTracker
from tests.integration.rq import tasks
from tests.integration.rq.versions import VERSION_OF_RQ
from tests.support import keyspace

needs_unique = pytest.mark.skipif(VERSION_OF_RQ < (2, 8), reason="unique= came with RQ 2.8")
needs_rate_limit = pytest.mark.skipif(VERSION_OF_RQ < (3, 0), reason="rate_limit= came with RQ 3.0")


def token_in(queue: Queue, job_id: str) -> UUID:
    """Return the token of a job in Redis."""
    field = queue.connection.hget(f"rq:job:{job_id}", "jg")
    assert isinstance(field, bytes), job_id
    return UUID(hex=field.decode())


def enqueue_job(queue: Queue) -> Job:
    """Enqueue a Job object that exists already."""
    return queue.enqueue_job(Job.create(tasks.add, (1, 2), connection=queue.connection))


def delay(queue: Queue) -> Job:
    """Enqueue with RQ's decorator."""
    from rq.decorators import job

    decorated = job(queue, connection=queue.connection)(tasks.add)
    made: Job = decorated.delay(1, 2)
    return made


WAYS: dict[str, Callable[[Queue], Job]] = {
    "enqueue": lambda queue: queue.enqueue(tasks.add, 1, right=2),
    "by name": lambda queue: queue.enqueue("tests.integration.rq.tasks.add", 1),
    "enqueue_call": lambda queue: queue.enqueue_call(tasks.add, (1, 2), timeout=7),
    "enqueue_job": enqueue_job,
    "delay": delay,
    "at_front": lambda queue: queue.enqueue(tasks.add, 1, at_front=True),
    "custom id": lambda queue: queue.enqueue(tasks.add, 1, job_id="mine"),
    "enqueue_many": lambda queue: queue.enqueue_many([Queue.prepare_data(tasks.add, (1,))])[0],
    "enqueue_in": lambda queue: queue.enqueue_in(timedelta(hours=1), tasks.add, 1),
    "enqueue_at": lambda queue: queue.enqueue_at(
        datetime.now(UTC) + timedelta(hours=1), tasks.add, 1
    ),
    "callbacks": lambda queue: queue.enqueue(tasks.add, 1, on_success=Callback(tasks.say)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_pushed_was_recorded_before(way: str, queue: Queue, tracker: FakeTracker) -> None:
    """Every way to enqueue records one delivery, with exactly the bytes that are then in Redis."""
    seen: list[dict[str, object]] = []
    tracker.before_record = lambda: seen.append(keyspace(queue.connection))

    job = WAYS[way](queue)

    (delivery,) = tracker.recorded
    assert all(job.id not in key for key in seen[0]), "nothing of it was in Redis yet"
    _, fields = decode(delivery.envelope)
    assert fields == queue.connection.hgetall(job.key)
    assert fields[b"jg"] == delivery.token.hex.encode()
    assert (delivery.job_id, delivery.queue) == (job.id, "default")
    assert delivery.task == "tests.integration.rq.tasks.add"
    assert delivery.parent is None
    assert delivery.attempt == 1
    assert delivery.fresh is (way != "custom id")


def test_a_scheduled_job_is_recorded_with_its_due_time(queue: Queue, tracker: FakeTracker) -> None:
    """The record of a scheduled job has the second at which RQ will move it."""
    job = queue.enqueue_in(timedelta(hours=1), tasks.add, 1)

    (delivery,) = tracker.recorded
    assert delivery.due_at == queue.connection.zscore("rq:scheduled:default", job.id)
    assert decode(delivery.envelope)[0].mode is Mode.SCHEDULED


def test_a_ttl_is_a_deadline(queue: Queue, tracker: FakeTracker) -> None:
    """The record of a job with a ttl has the time at which RQ would drop it."""
    queue.enqueue(tasks.add, 1, ttl=60)

    (delivery,) = tracker.recorded
    assert delivery.expires_at == pytest.approx(time.time() + 60, abs=40)


def test_enqueue_many_is_one_record(queue: Queue, tracker: FakeTracker) -> None:
    """All jobs of one enqueue_many are recorded in one call, in their order."""
    jobs = queue.enqueue_many(Queue.prepare_data(tasks.add, (n,)) for n in range(50))

    (batch,) = tracker.batches
    assert [delivery.job_id for delivery in batch] == [job.id for job in jobs]
    assert queue.job_ids == [job.id for job in jobs]


def test_a_group_is_one_record(queue: Queue, tracker: FakeTracker) -> None:
    """The jobs of a group are recorded in one call, with their group."""
    group = Group.create(connection=queue.connection, name="g")
    group.enqueue_many(queue, [Queue.prepare_data(tasks.add, (n,)) for n in range(3)])

    (batch,) = tracker.batches
    assert {decode(delivery.envelope)[0].group for delivery in batch} == {"g"}


def test_a_child_is_recorded_as_deferred_and_superseded_when_released(
    queue: Queue, tracker: FakeTracker, ledger: Any
) -> None:
    """A job that waits for its parent is one delivery, and its release to the queue is the next one."""
    parent = queue.enqueue(tasks.say, str(ledger))
    child = queue.enqueue(tasks.say, str(ledger), depends_on=parent)

    deferred = tracker.recorded[1]
    routing, fields = decode(deferred.envelope)
    assert routing.mode is Mode.DEFERRED
    assert routing.parents == (parent.id,)
    assert fields == queue.connection.hgetall(child.key)

    rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)

    released = tracker.recorded[2]
    assert released.job_id == child.id
    assert released.parent is not None
    assert (released.parent.token, released.parent.claim) == (deferred.token, None)
    assert tracker.ended[deferred.token] is Outcome.SUPERSEDED
    assert ledger.read_text().splitlines() == ["ran", "ran"]
    assert not tracker.owed


def test_enqueue_many_with_dependencies(queue: Queue, tracker: FakeTracker) -> None:
    """enqueue_many records children that must wait as deferred, and other jobs as queued."""
    parent = queue.enqueue(tasks.add, 1)
    done = queue.enqueue(tasks.add, 1, job_id="done")
    queue.connection.hset(done.key, "status", "finished")
    free, waits, goes = queue.enqueue_many(
        [
            Queue.prepare_data(tasks.add, (1,), job_id="free"),
            Queue.prepare_data(tasks.add, (2,), job_id="waits", depends_on=parent),
            Queue.prepare_data(tasks.add, (3,), job_id="goes", depends_on=done),
        ]
    )

    owed = {one.job_id: decode(one.envelope)[0].mode for one in tracker.owed.values()}
    assert owed[free.id] is Mode.QUEUED
    assert owed[waits.id] is Mode.DEFERRED
    assert owed[goes.id] is Mode.QUEUED
    for job in (free, waits, goes):
        assert token_in(queue, job.id) in tracker.owed


class TestForeignPipeline:
    """Jobs on a pipeline of the caller, whose transaction decides about the push."""

    def test_executed(self, queue: Queue, tracker: FakeTracker) -> None:
        """Jobs on a pipeline are recorded in one call, when the pipeline executes."""
        with queue.connection.pipeline() as pipe:
            jobs = [queue.enqueue(tasks.add, n, pipeline=pipe) for n in range(3)]
            jobs += queue.enqueue_many([Queue.prepare_data(tasks.add, (4,))], pipeline=pipe)
            assert not tracker.recorded
            pipe.execute()

        (batch,) = tracker.batches
        assert [delivery.job_id for delivery in batch] == [job.id for job in jobs]
        assert queue.job_ids == [job.id for job in jobs]
        assert all(token_in(queue, job.id) in tracker.owed for job in jobs)

    def test_dropped(self, queue: Queue, tracker: FakeTracker) -> None:
        """A dropped pipeline records nothing, also if it is used again."""
        with queue.connection.pipeline() as pipe:
            queue.enqueue(tasks.add, 1, pipeline=pipe)
        pipe.set("other", 1)
        pipe.execute()

        assert not tracker.recorded
        assert not queue.job_ids

    def test_lost_race(self, queue: Queue, tracker: FakeTracker) -> None:
        """If a pipeline loses its WATCH, its records are withdrawn."""
        with queue.connection.pipeline() as pipe:
            pipe.watch("watched")  # type: ignore[no-untyped-call]
            pipe.multi()
            queue.enqueue(tasks.add, 1, pipeline=pipe)
            queue.connection.set("watched", 1)
            with pytest.raises(redis.WatchError):
                pipe.execute()

        assert len(tracker.withdrawn) == 1
        assert not tracker.owed

    def test_lost_race_of_a_move(self, queue: Queue, tracker: FakeTracker) -> None:
        """After a move lost its WATCH, RQ's next tries are pushed, as often as needed."""
        job = queue.enqueue_in(timedelta(seconds=-5), tasks.add, 1)
        for losses in (2, 1, 0):
            with queue.connection.pipeline() as pipe, suppress(redis.WatchError):
                pipe.watch("watched")  # type: ignore[no-untyped-call]
                pipe.multi()
                again = Job.fetch(job.id, connection=queue.connection)
                queue._enqueue_job(again, pipeline=pipe)
                if losses:
                    queue.connection.incr("watched")
                pipe.execute()

        assert queue.job_ids == [job.id]
        assert set(tracker.owed) == {token_in(queue, job.id)}
        assert not tracker.withdrawn

    def test_results_are_the_callers(self, queue: Queue, tracker: FakeTracker) -> None:
        """The answers of the caller's commands keep their positions in the result."""
        with queue.connection.pipeline() as pipe:
            pipe.multi()  # RQ requires this
            pipe.set("before", 1)
            queue.enqueue(tasks.add, 1, pipeline=pipe)
            pipe.get("before")
            answers = pipe.execute()

        assert answers[0] is True
        assert answers[-1] == b"1"


class TestIntent:
    """A job that a person removes stays removed."""

    def test_delete(self, queue: Queue, tracker: FakeTracker) -> None:
        """Deleting a job cancels it."""
        job = queue.enqueue(tasks.add, 1)
        job.delete()

        assert [ids for _, ids, _ in tracker.cancelled] == [(job.id,)]

    @pytest.mark.parametrize("act", ["delete", "cancel"])
    def test_a_job_made_from_its_id(self, act: str, queue: Queue, tracker: FakeTracker) -> None:
        """A Job object that was not read from Redis knows no queue, and is cancelled all the same."""
        job = queue.enqueue(tasks.add, 1)
        getattr(Job(job.id, connection=queue.connection), act)()

        assert [ids for _, ids, _ in tracker.cancelled] == [(job.id,)]

    def test_delete_of_a_finished_job(self, queue: Queue, tracker: FakeTracker) -> None:
        """Deleting a finished job does not cancel it."""
        job = queue.enqueue(tasks.add, 1)
        rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)
        Job.fetch(job.id, connection=queue.connection).delete()

        assert not tracker.cancelled

    def test_result_ttl_zero(self, queue: Queue, tracker: FakeTracker) -> None:
        """A job whose result is not kept is completed, not cancelled."""
        queue.enqueue(tasks.add, 1, result_ttl=0)
        rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)

        assert not tracker.cancelled
        assert list(tracker.ended.values()) == [Outcome.COMPLETED]

    def test_failure_ttl_zero(self, queue: Queue, tracker: FakeTracker) -> None:
        """A job whose failure is not kept has failed, and no field of jobguard stays in Redis."""
        job = queue.enqueue(tasks.fail, failure_ttl=0)
        rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)

        assert not queue.connection.exists(job.key)
        assert not tracker.cancelled
        assert list(tracker.ended.values()) == [Outcome.FAILED]

    def test_empty(self, queue: Queue, tracker: FakeTracker) -> None:
        """Emptying a queue cancels the jobs in its list; scheduled jobs stay, as in RQ."""
        job = queue.enqueue(tasks.add, 1)
        queue.enqueue_in(timedelta(hours=1), tasks.add, 1)
        queue.empty()  # type: ignore[no-untyped-call]

        assert tracker.cancelled == [((), (job.id,), None)]

    @pytest.mark.parametrize("delete_jobs", [True, False])
    def test_delete_queue(self, delete_jobs: bool, queue: Queue, tracker: FakeTracker) -> None:
        """Deleting a queue cancels its waiting jobs, once."""
        job = queue.enqueue(tasks.add, 1)
        queue.delete(delete_jobs=delete_jobs)

        assert tracker.cancelled == [((), (job.id,), None)]

    @pytest.mark.parametrize("by", ["id", "job"])
    def test_remove(self, by: str, queue: Queue, tracker: FakeTracker) -> None:
        """Removing a job from the list or the delay queue cancels it, and marks its token as spent."""
        jobs = [
            queue.enqueue(tasks.add, 1, job_id="listed"),
            queue.enqueue_in(timedelta(hours=1), tasks.add, 1, job_id="delayed"),
        ]
        listed, delayed = jobs if by == "job" else [job.id for job in jobs]
        queue.remove(listed)
        queue.scheduled_job_registry.remove(delayed)

        assert list(tracker.ended.values()) == [Outcome.CANCELLED] * 2
        for job in jobs:
            assert str(queue.connection.hget(job.key, "jg")).endswith(f"{SPENT}'")

    def test_removed_and_put_back_by_hand(
        self, queue: Queue, tracker: FakeTracker, ledger: Any
    ) -> None:
        """A job that was removed from the list and pushed again runs, as another delivery."""
        job = queue.enqueue(tasks.say, str(ledger))
        queue.remove(job)
        queue.push_job_id(job.id)
        rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)

        assert ledger.read_text().splitlines() == ["ran"]
        assert len(tracker.notes("adopt")) == 1

    @pytest.mark.parametrize("to", ["another queue", "the front", "now"])
    def test_moved(self, to: str, queue: Queue, tracker: FakeTracker, ledger: Any) -> None:
        """A job that is enqueued in another place and then removed from its old place runs once."""
        other = Queue("other", connection=queue.connection)
        if to == "another queue":
            job = queue.enqueue(tasks.say, str(ledger))
            other.enqueue_job(job)
            queue.remove(job)
        elif to == "the front":
            job = queue.enqueue(tasks.say, str(ledger))
            queue.enqueue_job(job, at_front=True)
            queue.remove(job)
        else:
            job = queue.enqueue_in(timedelta(hours=1), tasks.say, str(ledger))
            queue.enqueue_job(job)
            queue.scheduled_job_registry.remove(job)
        rq.SimpleWorker([queue, other], connection=queue.connection).work(burst=True)

        assert ledger.read_text().splitlines() == ["ran"]
        assert Outcome.CANCELLED not in tracker.ended.values()

    def test_tidying_up_after_a_loss(self, queue: Queue, tracker: FakeTracker) -> None:
        """If RQ removes an id without a hash, the job is lost, not cancelled."""
        job = queue.enqueue(tasks.add, 1)
        queue.connection.delete(job.key)
        assert queue.fetch_job(job.id) is None

        assert not queue.job_ids
        assert not tracker.cancelled

    def test_cancel_on_a_dropped_pipeline(self, queue: Queue, tracker: FakeTracker) -> None:
        """A cancel on a dropped pipeline cancels nothing."""
        job = queue.enqueue(tasks.add, 1)
        with queue.connection.pipeline() as pipe:
            job.cancel(pipeline=pipe)

        assert not tracker.cancelled

    @needs_rate_limit
    def test_cancel_that_rq_refuses(self, queue: Queue, tracker: FakeTracker) -> None:
        """A job that RQ does not cancel on the caller's pipeline stays owed."""
        from rq.rate_limit import RateLimit

        job = queue.enqueue(tasks.add, 1, rate_limit=RateLimit("key", concurrency=1))
        with queue.connection.pipeline() as pipe:
            with pytest.raises(InvalidJobOperation):
                job.cancel(pipeline=pipe)
            pipe.set("something", "else")
            pipe.execute()

        assert not tracker.cancelled


class TestSameId:
    """RQ keeps one hash per id."""

    def test_twice(self, queue: Queue, tracker: FakeTracker) -> None:
        """The same id enqueued twice is two deliveries, and the first is superseded."""
        queue.enqueue(tasks.add, 1, job_id="same")
        queue.enqueue(tasks.add, 2, job_id="same")

        first, second = tracker.recorded
        assert tracker.ended == {first.token: Outcome.SUPERSEDED}
        assert token_in(queue, "same") == second.token

    @needs_unique
    def test_unique(self, queue: Queue, tracker: FakeTracker) -> None:
        """A unique id is recorded before RQ's script pushes it."""
        queue.enqueue(tasks.add, 1, job_id="one", unique=True)
        queue.enqueue_in(timedelta(hours=1), tasks.add, 1, job_id="two", unique=True)

        assert token_in(queue, "one") in tracker.owed
        assert token_in(queue, "two") in tracker.owed
        fields = decode(tracker.recorded[0].envelope)[1]
        assert fields == queue.connection.hgetall("rq:job:one")

    @pytest.mark.skipif(
        VERSION_OF_RQ < (3, 0), reason="before RQ 3.0 a unique job may be without an id"
    )
    def test_unique_without_an_id(self, queue: Queue, tracker: FakeTracker) -> None:
        """RQ refuses a unique job without an id; jobguard does not create an id by reading its key."""
        ways: list[Callable[[], Any]] = [
            lambda: queue.enqueue(tasks.add, 1, unique=True),
            lambda: queue.enqueue_in(timedelta(hours=1), tasks.add, 1, unique=True),
            lambda: queue.enqueue_job(queue.create_job(tasks.add, (1,)), unique=True),
        ]
        for refused in ways:
            with pytest.raises(ValueError, match="explicit job_id"):
                refused()

        assert not tracker.recorded
        assert not queue.connection.keys("rq:job:*")

    @needs_unique
    def test_refused_duplicate(self, queue: Queue, tracker: FakeTracker) -> None:
        """After a duplicate that RQ refuses, only the first delivery is owed."""
        from rq.exceptions import DuplicateJobError

        queue.enqueue(tasks.add, 1, job_id="one", unique=True)
        with pytest.raises(DuplicateJobError):
            queue.enqueue(tasks.add, 2, job_id="one", unique=True)

        assert set(tracker.owed) == {token_in(queue, "one")}
        assert not tracker.ended

    @needs_unique
    def test_refused_duplicate_in_a_race(
        self, queue: Queue, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A duplicate that appears after the check is withdrawn, and the first delivery stays owed."""
        from rq.exceptions import DuplicateJobError

        queue.enqueue(tasks.add, 1, job_id="one", unique=True)
        monkeypatch.setattr(queue.connection, "exists", lambda key: 0)
        with pytest.raises(DuplicateJobError):
            queue.enqueue(tasks.add, 2, job_id="one", unique=True)

        assert len(tracker.withdrawn) == 1
        assert set(tracker.owed) == {token_in(queue, "one")}

    def test_requeue_of_a_failed_job(self, queue: Queue, tracker: FakeTracker) -> None:
        """A job that is requeued from the failed registry is a new delivery without a parent."""
        job = queue.enqueue(tasks.fail)
        rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)
        FailedJobRegistry(queue=queue).requeue(job.id)

        failed, again = tracker.recorded
        assert tracker.ended[failed.token] is Outcome.FAILED
        assert again.parent is None
        assert again.token == token_in(queue, job.id)

    @pytest.mark.parametrize("how", ["registry.requeue", "Job.requeue"])
    def test_requeue_by_an_object_from_before_it_failed(
        self, how: str, queue: Queue, tracker: FakeTracker
    ) -> None:
        """A Job object from before the failure can be requeued, although it does not know the end."""
        job = queue.enqueue(tasks.fail)
        rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)
        assert job._status == "queued", "the object is as old as the enqueue"
        if how == "Job.requeue":
            job.requeue()
        else:
            FailedJobRegistry(queue=queue).requeue(job)

        assert queue.job_ids == [job.id]
        assert set(tracker.owed) == {token_in(queue, job.id)}

    def test_requeue_of_what_has_not_failed(self, queue: Queue, tracker: FakeTracker) -> None:
        """A requeue that RQ refuses does not change the delivery of the job."""
        job = queue.enqueue(tasks.add, 1)
        with pytest.raises(InvalidJobOperation):
            FailedJobRegistry(queue=queue).requeue(job)
        job.cancel()

        assert tracker.cancelled[0][0] == (tracker.recorded[0].token,)

    def test_requeue_by_unguarded_hands(
        self, queue: Queue, tracker: FakeTracker, ledger: Any
    ) -> None:
        """A failed job that an unguarded dashboard requeues is a new delivery."""
        job = queue.enqueue(tasks.fail, str(ledger))
        worker = rq.SimpleWorker([queue], connection=queue.connection)
        worker.work(burst=True)
        queue.connection.zrem("rq:failed:default", job.id)
        queue.connection.hset(job.key, "status", "queued")
        queue.connection.rpush(queue.key, job.id)
        worker.work(burst=True)

        assert ledger.read_text().splitlines() == ["ran", "ran"]
        assert len(tracker.notes("adopt")) == 1

    @needs_rate_limit
    def test_rate_limit(self, queue: Queue, tracker: FakeTracker) -> None:
        """Jobs that wait for a slot are recorded, and keep their token when they get one."""
        from rq.rate_limit import RateLimit

        jobs = [
            queue.enqueue(tasks.add, n, rate_limit=RateLimit("key", concurrency=1))
            for n in range(3)
        ]
        tokens = {job.id: token_in(queue, job.id) for job in jobs}
        assert set(tokens.values()) == set(tracker.owed)

        rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)

        assert all(tracker.ended[token] is Outcome.COMPLETED for token in tokens.values())


class TestUntouched:
    """Jobs and errors that jobguard must not change."""

    def test_eager_queue(self, queue: Queue, tracker: FakeTracker) -> None:
        """A queue with is_async=False runs its jobs in the caller, without a record."""
        eager = Queue("default", connection=queue.connection, is_async=False)
        job = eager.enqueue(tasks.add, 1, 2)

        assert job.get_status() == "finished"
        assert not tracker.recorded
        assert not queue.connection.hexists(job.key, "jg")

    def test_arguments_that_do_not_pickle(self, queue: Queue, tracker: FakeTracker) -> None:
        """RQ's own errors reach the caller, and nothing is recorded."""
        with pytest.raises(Exception, match="pickle"):
            queue.enqueue(tasks.add, lambda: 1)

        assert not tracker.recorded
        assert not queue.job_ids

    def test_our_bug(
        self, queue: Queue, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After an error of jobguard the job has no record, but it is enqueued."""

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("ours")

        monkeypatch.setattr(staging, "deliver", broken)
        job = queue.enqueue(tasks.add, 1)

        assert queue.job_ids == [job.id]


class TestRedisAway:
    """A Redis that is away at different moments of a push."""

    def test_in_doubt(self, queue: Queue, tracker: FakeTracker) -> None:
        """While Redis may be away, a job goes to the outbox, with the same fields as in a push of RQ."""
        queue.enqueue(tasks.add, 1, job_id="before")
        tracker.in_doubt = True
        job = queue.enqueue(tasks.add, 1, job_id="job")

        assert job.id == "job"
        assert queue.job_ids == ["before"]
        assert tracker.outbox == [tracker.recorded[1].token]
        before = decode(tracker.recorded[0].envelope)[1]
        assert decode(tracker.recorded[1].envelope)[1].keys() == before.keys()

    def test_refused_connection(self, tracker: FakeTracker) -> None:
        """While Redis is gone, each plain enqueue is accepted and left to the outbox."""
        queue = dead_queue(tracker)
        jobs = [queue.enqueue(tasks.add, 1), queue.enqueue_in(timedelta(hours=1), tasks.add, 1)]
        jobs += queue.enqueue_many(Queue.prepare_data(tasks.add, (n,)) for n in range(2))

        assert len(jobs) == 4
        assert len(tracker.outbox) == 4
        assert [one.job_id for one in tracker.recorded] == [job.id for job in jobs]

    def test_refused_connection_and_raise(self, tracker: FakeTracker) -> None:
        """If the job is not accepted, the caller gets the library's error, and the record is withdrawn."""
        tracker.accepting = False
        with pytest.raises(redis.ConnectionError):
            dead_queue(tracker).enqueue(tasks.add, 1)

        assert len(tracker.withdrawn) == 1
        assert not tracker.owed

    def test_in_doubt_but_not_accepted(self, queue: Queue, tracker: FakeTracker) -> None:
        """If jobs are not accepted and Redis may be away, the job is pushed when Redis answers."""
        tracker.in_doubt, tracker.accepting = True, False
        job = queue.enqueue(tasks.add, 1)

        assert queue.job_ids == [job.id]
        assert token_in(queue, job.id) in tracker.owed

    @pytest.mark.parametrize("accepting", [True, False])
    def test_push_of_unknown_fate(
        self, accepting: bool, queue: Queue, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A push that broke off may have happened: its record stays, and the leader checks it."""
        tracker.accepting = accepting
        fail_execute(monkeypatch, redis.TimeoutError("no answer"))
        if accepting:
            queue.enqueue(tasks.add, 1)
        else:
            with pytest.raises(redis.TimeoutError):
                queue.enqueue(tasks.add, 1)

        assert tracker.outbox == [tracker.recorded[0].token]
        assert not tracker.withdrawn
        assert tracker.notes("broker_failed")

    def test_what_must_read_redis_raises(self, tracker: FakeTracker) -> None:
        """A job with dependencies cannot be accepted without Redis: RQ's own error is raised."""
        with pytest.raises(redis.ConnectionError):
            dead_queue(tracker).enqueue(tasks.add, 1, depends_on=Dependency("parent"))

        assert not tracker.owed

    def test_out_of_memory(self, queue: Queue, tracker: FakeTracker, client: redis.Redis) -> None:
        """If Redis refuses a whole transaction, the record is withdrawn."""
        tracker.accepting = False
        client.config_set("maxmemory", 1)
        try:
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                queue.enqueue(tasks.add, 1)
        finally:
            client.config_set("maxmemory", 0)

        assert len(tracker.withdrawn) == 1
        assert not tracker.owed


class TestPostgresAway:
    """A Postgres that is slow or away."""

    def test_raise(self, queue: Queue, tracker: FakeTracker) -> None:
        """A caller that asked for StoreUnavailable gets it, and nothing is pushed."""

        def away() -> None:
            raise StoreUnavailable

        tracker.before_record = away
        with pytest.raises(StoreUnavailable):
            queue.enqueue(tasks.add, 1)
        with queue.connection.pipeline() as pipe:
            queue.enqueue(tasks.add, 1, pipeline=pipe)
            with pytest.raises(StoreUnavailable):
                pipe.execute()

        assert not queue.job_ids

    def test_too_late_to_push(
        self, queue: Queue, tracker: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the push deadline only the leader pushes."""
        monkeypatch.setattr(tracker, "push_deadline", -1.0)
        queue.enqueue(tasks.add, 1)
        with queue.connection.pipeline() as pipe:
            queue.enqueue(tasks.add, 1, pipeline=pipe)
            pipe.set("mine", 1)
            pipe.execute()

        assert len(tracker.outbox) == 2
        assert not queue.job_ids
        assert queue.connection.get("mine") == b"1"

    def test_refused(self, queue: Queue, tracker: FakeTracker) -> None:
        """A delivery that the ledger refuses is not pushed; the rest of its pipeline is."""
        tracker.refusing = {"no"}
        with queue.connection.pipeline() as pipe:
            for job_id in ("yes", "no", "also"):
                queue.enqueue(tasks.add, 1, job_id=job_id, pipeline=pipe)
            pipe.execute()

        assert queue.job_ids == ["yes", "also"]
        assert not queue.connection.exists("rq:job:no")


def dead_queue(tracker: FakeTracker) -> Queue:
    """Return a queue of the guarded Redis with a client that cannot reach it."""
    host, port = tracker.source.address.split("/")[0].split(":")
    gone = redis.Redis(host=host, port=int(port), db=int(tracker.source.address.split("/")[1]))

    class Refused(redis.Connection):
        def _connect(self) -> Any:
            raise ConnectionRefusedError(111, "Connection refused")

        connect = None  # type: ignore[assignment]

    del Refused.connect
    gone.connection_pool.connection_class = Refused
    gone.connection_pool.connection_kwargs["retry"] = None
    return Queue("default", connection=gone)


def fail_execute(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make the next transaction break off."""

    def broken(self: Pipeline, raise_on_error: bool = True) -> Any:
        raise error

    monkeypatch.setattr(Pipeline, "execute", broken)
