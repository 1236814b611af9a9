"""Changes that a program saves to a job after the push: a restore has the newest ones.

Faults that these tests were seen to catch: no amend in Job.save; no amend in Job.save_meta.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rq import Queue, SimpleWorker
from rq.job import Job

from tests.fakes.adapters import FakeTracker, lost, restore
from tests.integration.rq import tasks
from tests.integration.rq.test_worker import work
from tests.support import keyspace

if TYPE_CHECKING:
    from jobguard.adapters.rq.broker import RQBroker


def flag(job: Job) -> None:
    """Set a flag in the meta, as some applications do to cancel."""
    job.meta["cancelled"] = True
    job.save_meta()  # type: ignore[no-untyped-call]


def raise_timeout(job: Job) -> None:
    """Raise the timeout of the job."""
    job.timeout = 1000
    job.description = "longer"
    job.save()


def save_without_meta(job: Job) -> None:
    """Save all fields except the meta."""
    job.meta["forgotten"] = True
    job.timeout = 1000
    job.save(include_meta=False)


@pytest.mark.parametrize("change", [flag, raise_timeout, save_without_meta])
@pytest.mark.parametrize("fetched", [True, False])
def test_what_was_saved_comes_back(
    change: Any, fetched: bool, queue: Queue, tracker: FakeTracker, broker: RQBroker
) -> None:
    """After a loss and a restore, the keyspace is the same as before, for each way to save."""
    job = queue.enqueue(tasks.add, 1, meta={"a": 1}, at_front=True)
    change(Job.fetch(job.id, connection=queue.connection) if fetched else job)
    before = keyspace(queue.connection)
    queue.connection.flushdb()
    (delivery,) = tracker.owed.values()
    restore(broker, lost(delivery))
    assert keyspace(queue.connection) == before


def test_what_a_run_saves_of_itself_is_not_recorded(
    queue: Queue, tracker: FakeTracker, ledger: Path
) -> None:
    """Saves of a run to its own job are not recorded.

    A run may save many times a second. Redis has the data, and a horse has no connection to Postgres.
    """
    queue.enqueue(tasks.save_progress, str(ledger))
    (delivery,) = tracker.owed.values()
    work(SimpleWorker, queue)
    assert tracker.notes("amend") == []
    assert delivery.envelope == tracker.recorded[0].envelope


def test_what_has_ended_is_left_alone(queue: Queue, tracker: FakeTracker, ledger: Path) -> None:
    """A finished job can be saved, and its record does not change."""
    job = queue.enqueue(tasks.say, str(ledger))
    work(SimpleWorker, queue)
    flag(Job.fetch(job.id, connection=queue.connection))
    assert tracker.notes("amend") == []
    assert Job.fetch(job.id, connection=queue.connection).meta == {"cancelled": True}
