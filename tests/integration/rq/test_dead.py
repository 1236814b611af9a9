"""A job with a spent crash budget: RQ's own failure path runs once, and the function never runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from rq import Callback, Queue, Retry, SimpleWorker, Worker
from rq.job import Job

from jobguard.adapters.rq import SpawnWorker
from jobguard.adapters.rq.broker import RQBroker
from jobguard.model import Outcome, Refusal, Refused
from tests.fakes.adapters import FakeSession, FakeTracker, lost
from tests.integration.rq import tasks
from tests.integration.rq.test_worker import work
from tests.support import newly_owed


def written(ledger: Path) -> list[str]:
    """Return the lines that were written, if there are any."""
    return ledger.read_text().split() if ledger.exists() else []


def enqueued(queue: Queue, ledger: Path, **options: Any) -> Job:
    """Enqueue a job that would write a line when it runs."""
    meta = {"ledger": str(ledger)}
    return queue.enqueue(tasks.say, str(ledger), meta=meta, retry=Retry(max=3), **options)


def bury(tracker: FakeTracker, queue: Queue, *, all_of_them: bool = False) -> None:
    """Bury a job as the leader does."""
    (delivery,) = tracker.recorded
    tracker.close(delivery.token, Outcome.DEAD)
    queue.connection.delete(queue.key)  # a worker had taken it
    owed = newly_owed(delivery.token, job_id=delivery.job_id, queue=delivery.queue)
    broker = RQBroker(tracker.source, queue.connection)
    broker.bury([owed], deadline=time.time() + 60)
    broker.report([lost(delivery)], deadline=time.time() + 60, all_of_them=all_of_them)


@pytest.mark.parametrize("kind", [Worker, SimpleWorker, SpawnWorker])
def test_its_failure_callback_runs_once(
    kind: Any, queue: Queue, tracker: FakeTracker, ledger: Path
) -> None:
    """RQ stores the error, shows the job as failed, and calls on_failure in a worker."""
    job = enqueued(queue, ledger, on_failure=Callback(tasks.note_failure))
    bury(tracker, queue)
    assert queue.job_ids == [job.id]

    work(kind, queue)
    assert written(ledger) == ["failed"]
    found = Job.fetch(job.id, connection=queue.connection)
    assert found.get_status() == "failed"
    result = found.latest_result()
    assert result is not None and "WorkersDied" in str(result.exc_string)
    assert queue.failed_job_registry.get_job_ids() == [job.id]
    assert len(tracker.recorded) == 1  # RQ's retries are spent

    queue.connection.rpush(queue.key, job.id)  # its id is pushed once more
    work(kind, queue)
    assert written(ledger) == ["failed"]
    assert not queue.job_ids


@pytest.mark.parametrize("callback", [Callback(tasks.note_failure), None])
def test_a_dead_job_that_vanished_is_reported(
    queue: Queue, tracker: FakeTracker, ledger: Path, callback: Callback | None
) -> None:
    """RQ shows a job as failed that it had lost; without a callback, only where a worker asks for it."""
    job = enqueued(queue, ledger, on_failure=callback)
    queue.connection.delete(job.key)
    bury(tracker, queue, all_of_them=callback is None)
    assert queue.job_ids == [job.id]

    work(SimpleWorker, queue)
    assert written(ledger) == ["failed"] * (callback is not None)
    assert queue.failed_job_registry.get_job_ids() == [job.id]
    result = Job.fetch(job.id, connection=queue.connection).latest_result()
    assert result is not None and "WorkersDied" in str(result.exc_string)
    assert not queue.job_ids


def test_without_a_callback_nothing_is_pushed(
    queue: Queue, tracker: FakeTracker, ledger: Path
) -> None:
    """A dead job without a callback is only in the registry of failed jobs."""
    job = enqueued(queue, ledger)
    bury(tracker, queue)

    assert not queue.job_ids
    assert queue.failed_job_registry.get_job_ids() == [job.id]
    assert written(ledger) == []


@pytest.mark.parametrize("kind", [Worker, SimpleWorker])
def test_spent_by_the_very_start(
    kind: Any,
    queue: Queue,
    tracker: FakeTracker,
    ledger: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker whose claim is refused because of the crash budget reports the job as failed."""
    job = enqueued(queue, ledger, on_failure=Callback(tasks.note_failure))

    def spent(self: FakeSession, token: Any, describe: Any) -> Refused:
        return Refused(token, Refusal.SPENT)

    monkeypatch.setattr(FakeSession, "start", spent)
    work(kind, queue)

    assert written(ledger) == ["failed"]
    assert queue.failed_job_registry.get_job_ids() == [job.id]
    assert not queue.job_ids
