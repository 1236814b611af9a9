from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.utils
import rq
from rq import Queue, Retry, SimpleWorker, Worker
from rq.job import Job

from jobguard import registry
from jobguard.adapters.rq.layout import KEPT, SPENT
from jobguard.model import Outcome
from tests.fakes.adapters import FakeTracker
from tests.integration.rq import tasks
from tests.integration.rq.scheduler import move_scheduled
from tests.integration.rq.versions import VERSION_OF_RQ
from tests.support import ended_fork, eventually, keyspace

WORKERS = [SimpleWorker, Worker]
needs_returned_retry = pytest.mark.skipif(VERSION_OF_RQ < (2, 1), reason="RQ 2.1 brought it")
needs_repeat = pytest.mark.skipif(VERSION_OF_RQ < (2, 3), reason="RQ 2.3 brought it")


def work(kind: type[Any], queue: Queue, **settings: Any) -> None:
    """Run all jobs of the queue."""
    known = queue.connection.connection_pool.connection_kwargs
    # Use a separate client, because RQ's worker changes the timeouts of its client.
    connection = redis.Redis(host=known["host"], port=known["port"], db=known["db"])
    kind([queue.name], connection=connection, **settings).work(burst=True)


def ran(ledger: Path) -> int:
    """Return the number of runs of a job."""
    return len(ledger.read_text().splitlines())


@pytest.mark.parametrize("kind", WORKERS)
class TestEnds:
    """The ends of a run in RQ's two kinds of worker."""

    def test_completed(self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path) -> None:
        """A function that returned is completed; the worker itself reports this once."""
        job = queue.enqueue(tasks.say, str(ledger))
        work(kind, queue)

        assert ran(ledger) == 1
        assert tracker.notes("end") == [[job.id, "completed", ""]]
        assert tracker.pids("end") == [os.getpid()], "the worker reports, not a horse"
        assert [session.closed for session in tracker.sessions] == [True]

    def test_result_ttl_zero(self, kind: Any, queue: Queue, tracker: FakeTracker) -> None:
        """A job whose result is not kept is also completed."""
        job = queue.enqueue(tasks.add, 1, result_ttl=0)
        work(kind, queue)

        assert tracker.notes("end") == [[job.id, "completed", ""]]

    def test_failed(self, kind: Any, queue: Queue, tracker: FakeTracker) -> None:
        """A function that raised has failed, and its error is reported."""
        job = queue.enqueue(tasks.fail)
        work(kind, queue)

        ((job_id, outcome, error),) = tracker.notes("end")
        assert (job_id, outcome) == (job.id, "failed")
        assert error.rstrip().endswith("ValueError: as it must")

    def test_retry_at_once(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A retry supersedes the claim that failed, and counts attempts."""
        queue.enqueue(tasks.fail, str(ledger), retry=Retry(max=2))
        work(kind, queue)

        assert ran(ledger) == 3
        first, second, third = tracker.notes("record")
        assert first[2:] == ["", "", "", "1"]
        assert second[2:] == [first[1], "1", "superseded", "2"]
        assert third[2:] == [second[1], "1", "superseded", "3"]
        assert [end[1] for end in tracker.notes("end")] == ["failed"]
        assert tracker.notes("release") == [[first[1]], [second[1]]]

    def test_retry_later_is_moved_by_the_scheduler(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A retry that waits is one delivery; its move to the queue is the next one, without a claim."""
        job = queue.enqueue(tasks.fail, str(ledger), retry=Retry(max=1, interval=60))
        work(kind, queue)
        first, second = tracker.notes("record")
        assert second[2:] == [first[1], "1", "superseded", "2"]
        assert queue.connection.zscore("rq:scheduled:default", job.id)
        assert not tracker.notes("end")

        queue.connection.zadd("rq:scheduled:default", {job.id: time.time() - 1})
        move_scheduled(queue)
        work(kind, queue)

        third = tracker.notes("record")[2]
        assert third[2:] == [second[1], "None", "superseded", "2"]
        assert ran(ledger) == 2
        assert [end[1] for end in tracker.notes("end")] == ["failed"]

    @needs_returned_retry
    def test_returned_retry(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A function that returns Retry is pushed again, and the push supersedes its claim."""
        queue.enqueue(tasks.ask_again, str(ledger), 1)
        work(kind, queue)

        first, second = tracker.notes("record")
        assert second[2:] == [first[1], "1", "superseded", "2"]
        assert [end[1] for end in tracker.notes("end")] == ["completed"]

    @needs_returned_retry
    def test_returned_retry_once_too_often(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A function that returns Retry more often than allowed has failed."""
        queue.enqueue(tasks.return_retry, str(ledger))
        work(kind, queue)

        assert ran(ledger) == 2
        assert [end[1] for end in tracker.notes("end")] == ["failed"]

    @needs_repeat
    @pytest.mark.parametrize("interval", [0, 60])
    def test_repeat(
        self, kind: Any, interval: int, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A repeat supersedes a run that completed."""
        queue.enqueue(tasks.say, str(ledger), repeat=rq.Repeat(times=1, interval=interval))
        work(kind, queue)

        first, second = tracker.notes("record")
        assert second[2:] == [first[1], "1", "completed", "1"]
        assert [end[1] for end in tracker.notes("end")] == ([] if interval else ["completed"])

    def test_a_refused_retry_is_not_pushed(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A worker that was declared dead pushes no retry over the newer delivery."""
        queue.enqueue(tasks.fail, str(ledger), job_id="late", retry=Retry(max=1))
        tracker.refusing = {"late"}
        work(kind, queue)

        assert ran(ledger) == 1
        assert not queue.job_ids
        assert not tracker.notes("end")
        assert queue.connection.hget("rq:job:late", "retries_left") == b"1"

    def test_redis_gone_at_the_end(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A function that returned is completed, although Redis fails right after the return."""
        job = queue.enqueue(tasks.break_redis, str(ledger), retry=Retry(max=1))
        with suppress(redis.ConnectionError):  # RQ's worker cannot remove its registration
            work(kind, queue)

        assert ran(ledger) == 1
        assert tracker.notes("end")[0] == [job.id, "completed", ""]
        assert len(tracker.notes("end")) == 1
        assert len(tracker.notes("record")) == 1, "no retry of a job that completed"

    def test_redis_gone_for_a_moment_at_the_end(
        self,
        kind: Any,
        queue: Queue,
        tracker: FakeTracker,
        ledger: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A function that returned is completed: no retry, "finished" in RQ, and its child is released."""
        parent = queue.enqueue(tasks.say, str(ledger), job_id="parent", retry=Retry(max=3))
        queue.enqueue(tasks.say, str(ledger), "child", job_id="child", depends_on=parent)
        heartbeat, blinks = Job.heartbeat, [1]

        def blinking(self: Job, *args: Any, **kwargs: Any) -> Any:
            if self.id == "parent" and self.ended_at is not None and blinks:
                blinks.pop()
                raise redis.ConnectionError("for a moment")
            return heartbeat(self, *args, **kwargs)

        monkeypatch.setattr(Job, "heartbeat", blinking)
        work(kind, queue)
        work(kind, queue)

        assert ledger.read_text().split() == ["ran", "child"]
        assert parent.get_status() == "finished"
        ends = [end[:2] for end in tracker.notes("end")]
        assert ends == [["parent", "completed"], ["child", "completed"]]
        assert queue.connection.zcard("rq:wip:default") == 0

    def test_everything_lost_while_it_ran(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A parent that lost its hash while it ran is completed, with or without a restored child."""
        parent = queue.enqueue(tasks.flush, str(ledger))
        child = queue.enqueue(tasks.say, str(ledger), depends_on=parent)
        tracker_child = tracker.recorded[1]
        queue.connection.set("envelope", b"")
        tasks.RESTORED[:] = [tracker_child, tracker.source]
        try:
            work(kind, queue)
        finally:
            tasks.RESTORED.clear()

        assert [end[:2] for end in tracker.notes("end")] == [
            [parent.id, "completed"],
            [child.id, "completed"],
        ]
        assert ran(ledger) == 2

    def test_unguarded_push(
        self, kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A job that an unguarded program pushed is recorded at its start, with a token."""
        registry.unregister(tracker)
        job = queue.enqueue(tasks.say, str(ledger))
        registry.register(tracker)
        assert not queue.connection.hexists(job.key, "jg")
        work(kind, queue)

        ((token,),) = tracker.notes("adopt")
        assert queue.connection.hget(job.key, "jg") == (token + SPENT).encode()
        assert [end[1] for end in tracker.notes("end")] == ["completed"]


class TestHorse:
    """Behaviour of a worker that forks."""

    def test_killed(self, queue: Queue, tracker: FakeTracker) -> None:
        """A killed horse is a failure that its parent reports."""
        job = queue.enqueue(tasks.die)
        work(Worker, queue)

        ((job_id, outcome, error),) = tracker.notes("end")
        assert (job_id, outcome) == (job.id, "failed")
        assert "Work-horse terminated unexpectedly" in error

    def test_killed_with_retry(self, queue: Queue, tracker: FakeTracker, ledger: Path) -> None:
        """If a killed horse has retries left, its parent pushes the job again and supersedes the claim."""
        queue.enqueue(tasks.die, str(ledger), retry=Retry(max=1))
        work(Worker, queue)

        first, second = tracker.notes("record")
        assert second[2:] == [first[1], "1", "superseded", "2"]
        assert tracker.pids("record")[1] == os.getpid()
        assert ran(ledger) == 2

    def test_orphan_reports_for_itself(
        self, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A horse whose parent was killed reports its end itself, before it exits."""
        job = queue.enqueue(tasks.kill_parent, str(ledger))
        worker = ended_fork(lambda: work(Worker, queue))
        assert worker.exitcode == -signal.SIGKILL

        eventually(lambda: tracker.notes("flush"))
        assert tracker.notes("end") == [[job.id, "completed", ""]]
        assert worker.pid not in tracker.pids("end")

    def test_a_horse_knows_that_its_worker_turned_away(
        self, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A horse takes over the beats if its worker leaves after an error of Redis."""

        class Quitting(Worker):
            def monitor_work_horse(self, *args: Any, **kwargs: Any) -> Any:
                eventually(lambda: ledger.read_text())
                raise redis.ConnectionError("gone")

        queue.enqueue(tasks.say_and_wait, str(ledger))
        with suppress(redis.ConnectionError):
            work(Quitting, queue)

        eventually(lambda: tracker.notes("orphaned"))
        assert tracker.pids("orphaned") != [os.getpid()]
        ledger.with_suffix(".go").touch()
        eventually(lambda: tracker.notes("end"))

    def test_a_horse_whose_worker_lives_is_no_orphan(
        self, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A horse does not take over while its worker waits, nor after both are done."""
        queue.enqueue(tasks.say, str(ledger))
        work(Worker, queue)

        assert not tracker.notes("orphaned")

    @pytest.mark.skipif(
        not hasattr(redis.utils, "get_lib_version"), reason="this redis-py knows no version"
    )
    def test_a_horse_reads_no_version_from_files(
        self, queue: Queue, tracker: FakeTracker, ledger: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The version that a horse's connection reports was read by its worker."""
        real, noted = importlib.metadata.version, ledger.with_suffix(".read")

        def version(name: str) -> str:
            with noted.open("a") as file:
                print(os.getpid(), file=file)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        known = queue.connection.connection_pool.connection_kwargs
        address = f"redis://{known['host']}:{known['port']}/{known['db']}"
        queue.enqueue(tasks.say, str(ledger))
        Worker([queue.name], connection=redis.Redis.from_url(address)).work(burst=True)

        assert ran(ledger) == 1
        readers = noted.read_text().split() if noted.exists() else []
        assert set(readers) <= {str(os.getpid())}

    def test_long_error(self, queue: Queue, tracker: FakeTracker) -> None:
        """An error text of a megabyte does not block the horse and is not lost."""
        queue.enqueue(tasks.fail_at_length)
        work(Worker, queue)

        ((_, outcome, error),) = tracker.notes("end")
        assert outcome == "failed"
        assert 1_000 < len(error) <= 5_000

    def test_no_descriptor_is_left(self, queue: Queue, tracker: FakeTracker) -> None:
        """The pipes of a hundred runs are closed."""
        queue.enqueue(tasks.add, 1)
        work(Worker, queue)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            queue.enqueue(tasks.add, 1)
        work(Worker, queue)

        assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.skipif(
    VERSION_OF_RQ < (3, 0), reason="before RQ 3.0 the horse is always a plain Worker"
)
class TestSpawnedHorse:
    """A horse that is a new interpreter."""

    @pytest.mark.parametrize(
        ("task", "outcome"), [("add", "completed"), ("fail", "failed"), ("die", "failed")]
    )
    def test_end(self, task: str, outcome: str, queue: Queue, tracker: FakeTracker) -> None:
        """A spawned horse finds its run, and reports through the same pipe."""
        from jobguard.adapters.rq import SpawnWorker

        args = (1,) if task == "add" else ()
        job = queue.enqueue(f"tests.integration.rq.tasks.{task}", *args)
        SpawnWorker([queue], connection=queue.connection).work(burst=True)

        assert [end[:2] for end in tracker.notes("end")] == [[job.id, outcome]]
        assert tracker.pids("end") == [os.getpid()]
        assert "JOBGUARD_RQ_RUN" not in os.environ


class TestSkip:
    """The handling of a job that a worker must not run."""

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [
            (Outcome.COMPLETED, b"finished"),
            (Outcome.FAILED, b"failed"),
            (Outcome.DEAD, b"failed"),
            (Outcome.CANCELLED, b"canceled"),
            (Outcome.SUPERSEDED, b"finished"),
        ],
    )
    def test_ended(
        self,
        outcome: Outcome,
        status: bytes,
        queue: Queue,
        tracker: FakeTracker,
        ledger: Path,
    ) -> None:
        """A job that ended does not run, gets its status in Redis, and RQ does not retry it."""
        job = queue.enqueue(tasks.say, str(ledger), retry=Retry(max=3))
        token = tracker.recorded[0].token
        tracker.close(token, outcome)
        work(SimpleWorker, queue)

        assert ran(ledger) == 0
        assert queue.connection.hget(job.key, "status") == status
        kept = KEPT[status == b"failed"]
        assert kept - 60 < queue.connection.ttl(job.key) <= kept
        assert queue.connection.llen(queue.intermediate_queue_key) == 0
        assert not queue.job_ids
        assert not tracker.notes("end")

        queue.connection.delete("rq:clean_registries:default")
        work(SimpleWorker, queue)
        assert not queue.job_ids

    def test_children_of_a_finished_parent(
        self, queue: Queue, tracker: FakeTracker, ledger: Path
    ) -> None:
        """A parent that finished before a rollback of Redis releases its child."""
        parent = queue.enqueue(tasks.fail)
        queue.enqueue(tasks.say, str(ledger), depends_on=parent)
        tracker.close(tracker.recorded[0].token, Outcome.COMPLETED)
        work(SimpleWorker, queue)

        assert ran(ledger) == 1

    def test_newer_life(self, queue: Queue, tracker: FakeTracker, ledger: Path) -> None:
        """An id that is in the list twice runs once: the second start finds the end."""
        queue.enqueue(tasks.say, str(ledger), job_id="same")
        queue.enqueue(tasks.say, str(ledger), job_id="same")
        work(SimpleWorker, queue)

        assert ran(ledger) == 1
        assert [end[1] for end in tracker.notes("end")] == ["completed"]


def test_abandoned_job_with_retry(queue: Queue, tracker: FakeTracker, ledger: Path) -> None:
    """A job of a dead worker that RQ itself retries supersedes the delivery without a claim."""
    job = queue.enqueue(tasks.say, str(ledger), retry=Retry(max=1))
    queue.connection.lpop(queue.key)
    queue.connection.hset(job.key, "status", "started")
    queue.connection.zadd("rq:wip:default", {f"{job.id}:dead": 1})
    queue.started_job_registry.cleanup()

    first, second = tracker.recorded
    assert second.parent is not None
    assert (second.parent.token, second.parent.claim) == (first.token, None)
    assert queue.job_ids == [job.id]


@pytest.mark.parametrize("ended", [Outcome.COMPLETED, Outcome.FAILED])
def test_what_ended_is_not_moved_from_a_delay_queue_that_went_back_in_time(
    ended: Outcome, queue: Queue, tracker: FakeTracker, ledger: Path
) -> None:
    """If a job has ended, also in RQ, its id leaves the delay queue and does not run."""
    job = queue.enqueue_in(timedelta(seconds=-5), tasks.say, str(ledger))
    move_scheduled(queue)
    delay = queue.connection.zadd
    work(SimpleWorker, queue)
    assert ran(ledger) == 1
    delay("rq:scheduled:default", {job.id: 1})
    if ended is Outcome.FAILED:
        queue.connection.hset(job.key, "status", "failed")
    move_scheduled(queue)
    work(SimpleWorker, queue)

    assert ran(ledger) == 1
    assert not queue.job_ids
    assert queue.connection.zcard("rq:scheduled:default") == 0


def test_one_refused_job_does_not_hold_up_the_scheduler(queue: Queue, tracker: FakeTracker) -> None:
    """A scheduled job that has ended leaves the delay queue, and the others are moved."""
    for job_id in ("a", "ended", "b"):
        queue.enqueue_in(timedelta(seconds=-5), tasks.add, 1, job_id=job_id)
    tracker.close(tracker.recorded[1].token, Outcome.CANCELLED)
    move_scheduled(queue)

    assert queue.job_ids == ["a", "b"]
    assert queue.connection.zcard("rq:scheduled:default") == 0


def test_a_custom_description_does_not_hide_the_task(queue: Queue, tracker: FakeTracker) -> None:
    """A job with a custom description is moved with its function's name, and is not unpickled."""
    queue.enqueue_in(timedelta(seconds=-5), tasks.add, 1, description="the daily report")
    move_scheduled(queue)

    assert tracker.recorded[1].task == "tests.integration.rq.tasks.add"


@pytest.mark.parametrize(
    "how", [["--worker-class", "jobguard.adapters.rq.Worker"], ["-c", "jobguard.adapters.rq"]]
)
def test_rq_worker_commands(how: list[str], redis_url: str) -> None:
    """The commands of the manual start a worker with hooked classes."""
    probe = (
        "import sys, rq.cli, rq.worker.base as b\n"
        "try:\n    rq.cli.main()\nexcept SystemExit: pass\n"
        "print('hooked', b.BaseWorker.register_birth.__module__, "
        "b.BaseWorker.register_birth.__code__.co_filename)"
        if VERSION_OF_RQ >= (2, 7)
        else "import rq.cli, rq.worker as b\n"
        "try:\n    rq.cli.main()\nexcept SystemExit: pass\n"
        "print('hooked', b.Worker.register_birth.__module__, "
        "b.Worker.register_birth.__code__.co_filename)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "worker", "--burst", "--url", redis_url, *how, "default"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert "jobguard/patching.py" in done.stdout, done.stderr


def test_the_worker_changes_nothing_else(queue: Queue, tracker: FakeTracker) -> None:
    """After a run, the keyspace has the keys that RQ's own worker leaves, and the token's field."""
    job = queue.enqueue(tasks.add, 1, job_id="job")
    work(SimpleWorker, queue)
    guarded = keyspace(queue.connection)
    queue.connection.flushdb()
    registry.unregister(tracker)
    queue.enqueue(tasks.add, 1, job_id="job")
    work(SimpleWorker, queue)
    registry.register(tracker)
    bare = keyspace(queue.connection)

    def names(keys: dict[str, object]) -> set[str]:
        return {re.sub("[0-9a-f]{32}", "*", key) for key in keys}

    assert names(guarded) == names(bare)
    ours, theirs = guarded[job.key], bare[job.key]
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert set(ours) - set(theirs) == {b"jg", b"jg_attempt", b"jg_task"}


def test_fetch_knows_the_token(queue: Queue, tracker: FakeTracker) -> None:
    """A job that was fetched from Redis is cancelled by its token."""
    job = queue.enqueue(tasks.add, 1)
    Job.fetch(job.id, connection=queue.connection).cancel()

    assert tracker.cancelled[0][0] == (tracker.recorded[0].token,)
