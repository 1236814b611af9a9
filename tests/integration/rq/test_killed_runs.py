from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from rq import Callback, Queue, Retry, SimpleWorker, Worker
from rq.job import Job

from tests.fakes.adapters import FakeTracker
from tests.integration.rq import tasks
from tests.integration.rq.test_worker import ran, work
from tests.support import eventually


@pytest.fixture
def led(tracker: FakeTracker) -> FakeTracker:
    """Return a tracker whose ledger has a leader that restores owed jobs."""
    tracker.led = True
    return tracker


class TestKilledHorse:
    """A horse that was killed, and not by RQ."""

    def test_is_not_failed(self, queue: Queue, led: FakeTracker, ledger: Path) -> None:
        """The claim is left to the leader; RQ does not fail or retry the job, and calls no callback."""
        job = queue.enqueue(
            tasks.die,
            retry=Retry(max=3),
            on_failure=Callback(tasks.note_failure),
            meta={"ledger": str(ledger)},
        )
        work(Worker, queue)

        (token,) = (delivery.token for delivery in led.recorded)
        assert led.notes("abandon") == [[token.hex]]
        assert not led.notes("end")
        assert queue.connection.hget(job.key, "status") == b"started"
        assert Job.fetch(job.id, connection=queue.connection).retries_left == 3
        assert len(queue.failed_job_registry) == 0
        assert ledger.read_text() == ""

    def test_nobody_leads(self, queue: Queue, tracker: FakeTracker) -> None:
        """Without a leader no process would restore the job, and RQ's decision stays valid."""
        queue.enqueue(tasks.die)
        work(Worker, queue)

        assert [end[1] for end in tracker.notes("end")] == ["failed"]
        assert len(queue.failed_job_registry) == 1

    def test_by_order(self, queue: Queue, led: FakeTracker) -> None:
        """If RQ itself kills the horse, far beyond the job's timeout, the job has failed."""

        class Impatient(Worker):
            def monitor_work_horse(self, *args: Any, **kwargs: Any) -> Any:
                kill(self)
                return super().monitor_work_horse(*args, **kwargs)

        queue.enqueue(tasks.sleep, 30)
        work(Impatient, queue)

        assert [end[1] for end in led.notes("end")] == ["failed"]
        assert not led.notes("abandon")

    def test_an_order_is_for_one_horse(self, queue: Queue, led: FakeTracker) -> None:
        """RQ's kill of one horse does not count for the next horse of the same worker."""

        class Once(Worker):
            seen = 0

            def monitor_work_horse(self, *args: Any, **kwargs: Any) -> Any:
                Once.seen += 1
                if Once.seen == 1:
                    kill(self)
                return super().monitor_work_horse(*args, **kwargs)

        first = queue.enqueue(tasks.sleep, 30)
        queue.enqueue(tasks.die)
        work(Once, queue)

        assert [end[:2] for end in led.notes("end")] == [[first.id, "failed"]]
        assert len(led.notes("abandon")) == 1

    def test_an_exit_of_its_own(self, queue: Queue, led: FakeTracker) -> None:
        """A function that ends its process has not returned; it is handled like a kill."""
        queue.enqueue(tasks.leave, 3)
        work(Worker, queue)

        assert len(led.notes("abandon")) == 1


@pytest.mark.parametrize("kind", [SimpleWorker, Worker])
class TestNeverBegan:
    """A run that ended before the call of its function, because Redis failed."""

    @pytest.fixture(params=["for a moment", "for the rest of the run", "it is full"])
    def breaking(self, kind: Any, request: pytest.FixtureRequest) -> type[Any]:
        """Return a worker whose Redis fails just before the call of the function."""
        full = request.param == "it is full"
        error = (
            redis.OutOfMemoryError("used memory > maxmemory")
            if full
            else redis.ConnectionError("full")
        )

        class Breaking(kind):  # type: ignore[misc]
            def prepare_job_execution(self, *args: Any, **kwargs: Any) -> Any:
                raise error

            def handle_execution_ended(self, *args: Any, **kwargs: Any) -> Any:
                if self.is_horse and request.param != "for a moment":
                    raise error  # the horse exits with code 1
                return super().handle_execution_ended(*args, **kwargs)

        return Breaking

    def test_is_not_failed(self, breaking: Any, queue: Queue, led: FakeTracker) -> None:
        """The job goes back without a crash: RQ decides about a function that was never called."""
        job = queue.enqueue(tasks.add, 1, retry=Retry(max=2))
        work(breaking, queue)

        assert not led.notes("end")
        assert not led.notes("abandon")
        assert [note[0] for note in led.notes("give_back")] == [job.id]
        assert job.get_status() not in ("failed", "finished")
        assert Job.fetch(job.id, connection=queue.connection).retries_left == 2

    def test_nobody_leads(self, breaking: Any, queue: Queue, tracker: FakeTracker) -> None:
        """Without a leader no process would restore the job, and RQ's decision stays valid."""
        queue.enqueue(tasks.add, 1)
        work(breaking, queue)

        assert [end[1] for end in tracker.notes("end")] == ["failed"]


def test_a_function_that_redis_failed_has_failed(queue: Queue, led: FakeTracker) -> None:
    """A function that uses a Redis itself and lets its error through was called, and has failed."""
    queue.enqueue(tasks.ask_redis)
    work(SimpleWorker, queue)

    assert [end[1] for end in led.notes("end")] == ["failed"]


class TestAbandoned:
    """A run whose worker has sent RQ no heartbeat for too long."""

    @pytest.fixture
    def job(self, queue: Queue, tracker: FakeTracker, ledger: Path) -> Job:
        """Return a job in the state in which RQ leaves it when its worker dies."""
        job = queue.enqueue(tasks.say, str(ledger))
        queue.connection.lpop(queue.key)
        queue.connection.hset(job.key, "status", "started")
        queue.connection.zadd("rq:wip:default", {f"{job.id}:dead": 1})
        return job

    def test_is_left_to_the_leader(self, queue: Queue, job: Job, led: FakeTracker) -> None:
        """RQ's maintenance neither fails nor removes the run, and skips it also the next time."""
        for _ in range(2):
            queue.started_job_registry.cleanup()

        assert job.get_status() == "started"
        assert len(queue.failed_job_registry) == 0
        assert queue.connection.zcard("rq:wip:default") == 1

    def test_nobody_leads(self, queue: Queue, job: Job, tracker: FakeTracker) -> None:
        """Without a leader RQ's decision stays valid."""
        queue.started_job_registry.cleanup()

        assert job.get_status() == "failed"
        assert queue.connection.zcard("rq:wip:default") == 0

    def test_what_is_not_owed_is_rqs(self, queue: Queue, job: Job, led: FakeTracker) -> None:
        """RQ fails a run without a record, also beside a run that the leader restores."""
        led.owed.clear()
        owed = queue.enqueue(tasks.add, 1)
        queue.connection.lrem(queue.key, 0, owed.id)
        queue.connection.hset(owed.key, "status", "started")
        queue.connection.zadd("rq:wip:default", {f"{owed.id}:dead": 1})
        queue.started_job_registry.cleanup()

        assert (job.get_status(), owed.get_status()) == ("failed", "started")

    def test_our_bug(
        self, queue: Queue, job: Job, led: FakeTracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An error of jobguard does not change RQ's maintenance."""

        def broken(_tokens: object) -> frozenset[Any]:
            raise RuntimeError("ours")

        monkeypatch.setattr(led, "recovers", broken)
        queue.started_job_registry.cleanup()

        assert job.get_status() == "failed"


class TestStuckInTheIntermediateList:
    """A job that a one-queue worker took and never started."""

    @pytest.fixture
    def job(self, queue: Queue, tracker: FakeTracker, ledger: Path) -> Job:
        """Return a job that RQ's maintenance is about to give up."""
        job = queue.enqueue(tasks.say, str(ledger))
        queue.connection.lmove(queue.key, queue.intermediate_queue_key)
        first_seen = f"{queue.intermediate_queue_key}:first_seen:{job.id}"
        queue.connection.set(first_seen, 1)
        return job

    def test_is_left_to_the_leader(self, queue: Queue, job: Job, led: FakeTracker) -> None:
        """RQ's maintenance does not fail the job."""
        clean(queue)

        assert job.get_status() == "queued"
        assert len(queue.failed_job_registry) == 0
        assert not led.notes("end")

    def test_nobody_leads(self, queue: Queue, job: Job, tracker: FakeTracker) -> None:
        """Without a leader RQ's decision stays valid."""
        clean(queue)

        assert job.get_status() == "failed"


def kill(worker: Any) -> None:
    """Let RQ kill its horse after the horse has left this process group: RQ kills the whole group."""
    eventually(lambda: os.getpgid(worker.horse_pid) == worker.horse_pid)
    worker.kill_horse()


def clean(queue: Queue) -> None:
    """Run RQ's maintenance."""
    worker = SimpleWorker([queue], connection=queue.connection)
    cast(Any, queue.intermediate_queue).cleanup(worker, queue)


@pytest.mark.parametrize("kind", [SimpleWorker, Worker])
def test_a_failure_is_a_failure(kind: Any, queue: Queue, led: FakeTracker, ledger: Path) -> None:
    """A job whose function raised has failed, with or without a leader."""
    queue.enqueue(tasks.fail)
    queue.enqueue(tasks.say, str(ledger))
    work(kind, queue)

    assert [end[1] for end in led.notes("end")] == ["failed", "completed"]
    assert ran(ledger) == 1
